"""Codes, dyadic numbers and biases in plain PyTorch, equal to ``integers.golden``."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.kernels.fake_quantize.reference import channel_scale

LARGEST = 2**31 - 1
"""Of int32."""

LARGEST_SHIFT = 62
"""Up to this one, half a unit and the product of two int32 fit into int64."""


def quantize_channels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``weight`` (O, ...) as codes i8 of ``bits`` bits, rounded half to even, and a step for each channel, f32 (O).

    Source: HAWQ-V3 (arXiv 2011.10680), section 3.1; scale as in its code, the largest magnitude over 2**(bits-1) - 1.
    """
    largest = 2 ** (bits - 1) - 1
    scale = channel_scale(weight, bits)
    steps = weight.float() / scale.reshape(-1, *[1] * (weight.ndim - 1))
    return steps.round().clamp(-largest - 1, largest).to(torch.int8), scale


def dyadic(scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Multiplier and shift, i32 (O), whose quotient multiplier / 2**shift is nearest to ``scale`` (O) * ``factor``.

    31 bits of the product in f64, rounded half up; fewer where the shift would be above 62. Source: HAWQ
    (github.com/Zhen-Dong/HAWQ), quant_utils.py, ``batch_frexp``.
    """
    mantissa, exponent = torch.frexp(scale.double() * factor)
    shift = (31 - exponent).clamp(max=LARGEST_SHIFT)
    multiplier = torch.floor(torch.ldexp(mantissa, exponent + shift) + 0.5)
    full = multiplier == 2.0**31
    return torch.where(full, 2.0**30, multiplier).to(torch.int32), (shift - full.int()).to(torch.int32)


def quantize_bias(bias: Tensor, scale: Tensor, input_scale: float) -> Tensor:
    """``bias`` (O) in steps of ``scale`` (O) * ``input_scale``, in f64, rounded half to even, saturating: i32 (O).

    Source: HAWQ-V3, section 3.2 and appendix D.
    """
    steps = scale.double() * input_scale
    return (bias.double() / steps).round().clamp(-LARGEST - 1, LARGEST).to(torch.int32)
