"""Quantizing, dequantizing and requantizing in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = -128, 127
"""Range of an activation in eight bits."""


def quantize_static(input: Tensor, scale: float) -> Tensor:
    """``input`` / ``scale``, divided in f32, rounded half to even and clipped to int8."""
    # A tensor as divisor: on a GPU, dividing by a number multiplies by its rounded reciprocal.
    divisor = torch.full((), scale, dtype=torch.float32, device=input.device)
    return (input.float() / divisor).round().clamp(LOWEST, HIGHEST).to(torch.int8)


def dequantize_static(input: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``input`` int8 times ``scale``, computed in f32, in ``dtype``."""
    return (input.float() * scale).to(dtype)


def requantize(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int) -> Tensor:
    """``input`` i32 times the dyadic numbers ``multiplier`` / 2**``shift`` along ``axis``, rounded half up: int8.

    Exact: the product of two i32 and half a unit fit into i64. Source: HAWQ-V3 (arXiv 2011.10680), section 3.2.
    """
    shape = [1] * input.ndim
    shape[axis] = -1
    wide = shift.to(torch.int64).reshape(shape)
    half = torch.bitwise_left_shift(torch.ones_like(wide), wide - 1)
    product = input.to(torch.int64) * multiplier.to(torch.int64).reshape(shape) + half
    return torch.bitwise_right_shift(product, wide).clamp(LOWEST, HIGHEST).to(torch.int8)
