"""Rounding to a grid in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-8
"""Below it, a channel's largest magnitude is none. Source: HAWQ (github.com/Zhen-Dong/HAWQ), quant_utils.py."""

WIDEST = 2**31 - 1
"""Largest code of a bias in 32 bits."""


def fake_quantize(input: Tensor, scale: float, low: int, high: int) -> Tensor:
    """``input`` rounded to the multiples ``low``..``high`` of ``scale``, in its own dtype.

    What ``intarsia.dequantize_static`` makes of the codes of ``intarsia.quantize_static``: divided in f32, rounded half
    to even.
    """
    return (codes(input, scale).clamp(low, high) * scale).to(input.dtype)


def codes(input: Tensor, scale: float) -> Tensor:
    """The whole numbers of ``scale`` nearest to ``input``, unclipped, in f32."""
    # A tensor as divisor: on a GPU, dividing by a number multiplies by its rounded reciprocal.
    divisor = torch.full((), scale, dtype=torch.float32, device=input.device)
    return (input.float() / divisor).round()


def fake_quantize_channels(weight: Tensor, bits: int, grain: float = 0.0) -> Tensor:
    """``weight`` (O, ...) rounded to ``bits`` bits, symmetric, each channel O to a grid of its own, in its own dtype.

    Source: HAWQ-V3 (arXiv 2011.10680), section 3.1; scale as in its code, the largest magnitude over 2**(bits-1) - 1.
    """
    largest = 2 ** (bits - 1) - 1
    steps = channel_scale(weight, bits, grain).reshape(-1, *[1] * (weight.ndim - 1))
    return ((weight.float() / steps).round().clamp(-largest - 1, largest) * steps).to(weight.dtype)


def channel_scale(weight: Tensor, bits: int, grain: float = 0.0) -> Tensor:
    """One step of each channel's grid: f32 (O) of weight (O, ...), the next multiple of ``grain`` if that is not 0.

    A channel of zeros has the step of one whose largest magnitude is 1: its bias is counted in such steps, and HAWQ's
    1e-8 would leave none of it that fits into 32 bits.
    """
    magnitude = weight.float().flatten(1).abs().amax(dim=1)
    magnitude = torch.where(magnitude < SMALLEST, 1.0, magnitude)
    steps = magnitude / torch.full_like(magnitude, 2 ** (bits - 1) - 1)
    return (torch.ceil(steps.double() / grain) * grain).float() if grain else steps


def fake_quantize_bias(bias: Tensor, weight: Tensor, bits: int, input_scale: float, grain: float = 0.0) -> Tensor:
    """``bias`` (O) rounded to what one step of the input times one step of the weight (O, ...) is, in its own dtype.

    So it is rounded where the integer layer adds it to its sum. Source: HAWQ-V3, section 3.2 and appendix D.
    """
    steps = channel_scale(weight, bits, grain).double() * input_scale
    return ((bias.double() / steps).round().clamp(-WIDEST - 1, WIDEST) * steps).to(bias.dtype)
