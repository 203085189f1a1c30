"""Integer products of two activations in plain PyTorch: what backends decompose to, equal to their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.kernels.integers.reference import integer_dtype


def matmul_i8i8(input: Tensor, other: Tensor, multiplier: int, shift: int, low: int = -128, high: int = 127) -> Tensor:
    """``input`` i8 (..., M, K) times ``other`` i8 (..., K, N), times ``multiplier`` / 2**``shift``, rounded half up.

    Summed in f64, where every whole number below 2**53 is exact.
    """
    total = torch.matmul(input.double(), other.double()).to(torch.int64)
    return ((total * multiplier + (1 << (shift - 1))) >> shift).clamp(low, high).to(integer_dtype(low, high))
