"""Eight-bit weights in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

LARGEST = 127
"""Largest magnitude of a rounded weight; -128 is left out, so that the range is symmetric."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scale of a row of zeros, which then rounds to zeros."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``weight`` (R, C) to int8 (R, C) with one f32 scale for each row (R): the row's largest magnitude over 127.

    Source: HAWQ-V3 (arXiv 2011.10680), section 3.1, symmetric and per output channel.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    # A tensor as divisor: on a GPU, dividing by a number multiplies by its rounded reciprocal.
    scale = (largest / torch.full_like(largest, LARGEST)).clamp(min=SMALLEST_SCALE)
    rounded = (wide / scale[:, None]).round().clamp(-LARGEST, LARGEST)
    return rounded.to(torch.int8), scale


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (R, C) in ``dtype`` for which ``weight`` int8 (R, C) and ``scale`` f32 (R) stand."""
    return (weight.float() * scale[:, None]).to(dtype)


def linear_i8(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Input (..., C) times the dequantized weight (R, C) transposed, plus bias (R): (..., R) in input's dtype."""
    return linear(input, dequantize_rows(weight, scale, input.dtype), bias)
