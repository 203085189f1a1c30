"""Requantized addition in plain PyTorch: what backends decompose to, equal to ``integers.golden``."""

from __future__ import annotations

from torch import Tensor

from intarsia.kernels.integers.reference import integer_dtype, scaled


def add_requantized(
    input: Tensor,
    other: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    other_multiplier: Tensor,
    other_shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """``input`` and ``other``, i8, i16 or i32, each by its dyadic number (1), rounded half up on its own, then added.

    Source: HAWQ-V3 (arXiv 2011.10680), equation 7.
    """
    total = scaled(input, multiplier, shift) + scaled(other, other_multiplier, other_shift)
    return total.clamp(low, high).to(integer_dtype(low, high))
