"""Integer convolution in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from intarsia.kernels.integers.reference import requantize


def conv2d_i8i8(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """``input`` i8 (N, C, H, W) with ``weight`` i8 (O, C/groups, kh, kw), plus ``bias`` i32 (O), requantized.

    Summed in f64, where every whole number below 2**53 is exact, because PyTorch convolves no integers.
    """
    real = conv2d(input.double(), weight.double(), None, list(stride), list(padding), list(dilation), groups)
    total = real.to(torch.int32)
    return requantize(total if bias is None else total + bias[:, None, None], multiplier, shift, 1, low, high)
