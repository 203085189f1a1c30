"""Integer linear layer in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from intarsia.kernels.integers.reference import requantize


def linear_i8i8(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """``input`` i8 (..., C) times ``weight`` i8 (R, C) transposed, plus ``bias`` i32 (R), requantized: (..., R).

    Summed in f64, where every whole number below 2**53 is exact, because PyTorch multiplies integer matrices neither on
    all devices nor fast.
    """
    total = linear(input.double(), weight.double()).to(torch.int32)
    return requantize(total if bias is None else total + bias, multiplier, shift, total.ndim - 1, low, high)
