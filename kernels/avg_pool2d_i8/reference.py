"""Average pooling of integers in plain PyTorch: what backends decompose to, equal to ``integers.golden``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from intarsia.kernels.integers.reference import requantize


def avg_pool2d_i8(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Sums over windows of ``input`` i8 or i16 (N, C, H, W), padding counted as zeros, requantized.

    Summed in f64, where every whole number below 2**53 is exact: ``avg_pool2d`` with 1 for divisor.
    """
    total = avg_pool2d(input.double(), list(kernel_size), list(stride), list(padding), divisor_override=1)
    return requantize(total.to(torch.int32), multiplier, shift, 1, low, high)
