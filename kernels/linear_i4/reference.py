"""Four-bit weights in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

LOWEST, HIGHEST = -8, 7
"""Range of a rounded weight: a signed four-bit number."""

RATIOS = tuple(1.0 - step / 32 for step in range(17))
"""Clipping ratios tried for each group, 1 to 0.5: which part of the largest magnitude the highest code stands for.

Rounding without clipping spends four bits on outliers; Frantar et al., GPTQ (arXiv 2210.17323), and AWQ (arXiv
2306.00978) search the ratio on such a grid.
"""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scale of a group of zeros, which then rounds to zeros."""

CHUNK = 1 << 21
"""Weights rounded at a time, so that the search over ratios stays in a few tens of megabytes."""


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round ``weight`` (R, C) to four bits: packed u8 (R, C/2), even column in the low nibble; scale f32 (R, C/group).

    The scale of a group is the one of ``RATIOS`` with the least squared error, the largest among equals.
    """
    rows, columns = weight.shape
    groups = weight.float().reshape(-1, group)
    parts = [_round(part) for part in groups.split(max(1, CHUNK // group))]
    codes = torch.cat([codes for codes, _ in parts]).view(rows, columns)
    scale = torch.cat([scale for _, scale in parts]).view(rows, columns // group)
    return pack(codes), scale


def _round(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (G, group) and scales f32 (G) for weights f32 (G, group)."""
    largest = groups.abs().amax(dim=1)
    best_scale = torch.zeros_like(largest)
    best_error = torch.full_like(largest, torch.inf)
    for ratio in RATIOS:
        scale = (largest * (ratio / HIGHEST)).clamp(min=SMALLEST_SCALE)
        error = (_codes(groups, scale) * scale[:, None] - groups).square().sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return _codes(groups, best_scale).to(torch.int8), best_scale


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale[:, None]).round().clamp(LOWEST, HIGHEST)


def pack(codes: Tensor) -> Tensor:
    """Codes int8 (R, C) in -8..7, two to a byte: u8 (R, C/2), even column in the low nibble."""
    nibbles = (codes & 0xF).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Codes int8 (R, C) in -8..7 from ``packed`` u8 (R, C/2)."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)
    signed: Tensor = (nibbles.to(torch.int8) ^ 8) - 8
    return signed


def dequantize_groups(packed: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The weight (R, C) in ``dtype`` for which ``packed`` u8 (R, C/2) and ``scale`` f32 (R, C/group) stand."""
    rows, groups = scale.shape
    codes = unpack(packed).float().view(rows, groups, group)
    return (codes * scale[:, :, None]).view(rows, groups * group).to(dtype)


def linear_i4(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Input (..., C) times the dequantized weight (R, C) transposed, plus bias (R): (..., R) in input's dtype."""
    return linear(input, dequantize_groups(packed, scale, group, input.dtype), bias)
