"""Quantizing, dequantizing and requantizing in plain PyTorch: what backends decompose to, equal to ``golden``."""

from __future__ import annotations

import torch
from torch import Tensor


def integer_dtype(low: int, high: int) -> torch.dtype:
    """The smallest of int8, int16 and int32 that holds both."""
    types = (torch.int8, torch.int16, torch.int32)
    return next(dtype for dtype in types if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)


def quantize_static(input: Tensor, scale: float, low: int = -128, high: int = 127) -> Tensor:
    """``input`` / ``scale``, divided in f32, rounded half to even and clipped to ``low`` and ``high``: i8 or i16."""
    # A tensor as divisor: on a GPU, dividing by a number multiplies by its rounded reciprocal.
    divisor = torch.full((), scale, dtype=torch.float32, device=input.device)
    return (input.float() / divisor).round().clamp(low, high).to(integer_dtype(low, high))


def dequantize_static(input: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``input`` i8, i16 or i32 times ``scale``, computed in f32, in ``dtype``."""
    return (input.float() * scale).to(dtype)


def requantize(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int, low: int = -128, high: int = 127) -> Tensor:
    """``input`` i8, i16 or i32 times the dyadic numbers along ``axis``, or one for all, clipped to ``low``, ``high``.

    Source: HAWQ-V3 (arXiv 2011.10680), section 3.2.
    """
    shape = [1] * input.ndim
    shape[axis] = -1
    return scaled(input, multiplier.reshape(shape), shift.reshape(shape)).clamp(low, high).to(integer_dtype(low, high))


def scaled(input: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """``input`` * ``multiplier`` / 2**``shift``, rounded half up, not clipped: i64.

    Exact: the product of two i32 and half a unit fit into i64.
    """
    wide = shift.to(torch.int64)
    half = torch.bitwise_left_shift(torch.ones_like(wide), wide - 1)
    return torch.bitwise_right_shift(input.to(torch.int64) * multiplier.to(torch.int64) + half, wide)
