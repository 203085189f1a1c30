"""Codes, dyadic numbers and biases in plain PyTorch, equal to ``integers.golden``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from intarsia.kernels.fake_quantize.reference import channel_scale
from intarsia.kernels.integer_weights.sums import NARROW, Array, borders, countable, exactly, in_floats, reach

LARGEST = 2**31 - 1
"""Of int32."""

LARGEST_SHIFT = 62
"""Up to this one, half a unit and the product of two int32 fit into int64."""

GRAIN = 1 << 7
"""A multiplier of 31 bits that is a multiple of it has 24 bits: what f32 holds."""

STRIDE = 1 << 12
"""Between two multipliers that are tried; 31 of them are 1.2e-4 of the smallest."""

COARSE = 1 << 11
"""A multiplier of 31 bits that is a multiple of it has 20 bits."""

FRACTION_BITS = 7
"""Behind the point of a number that f32 multiplies by to 16 bits, and may still add a bias."""

TRIES = 63
"""Multipliers that are tried; 29 were enough of 240 whose results saturate at sums of 2**19 (docs/decisions/012)."""


def quantize_channels(weight: Tensor, bits: int, grain: float = 0.0) -> tuple[Tensor, Tensor]:
    """``weight`` (O, ...) as codes i8 of ``bits`` bits, rounded half to even, and a step for each channel, f32 (O).

    Source: HAWQ-V3 (arXiv 2011.10680), section 3.1; scale as in its code, the largest magnitude over 2**(bits-1) - 1.
    """
    largest = 2 ** (bits - 1) - 1
    scale = channel_scale(weight, bits, grain)
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


def quantize_bias(bias: Tensor, scale: Tensor, input_scale: float, largest: int = LARGEST) -> Tensor:
    """``bias`` (O) in steps of ``scale`` (O) * ``input_scale``, in f64, rounded half to even: i32 (O).

    It saturates at -``largest`` - 1 and ``largest``, which leave room for the sum that it is added to.

    Source: HAWQ-V3, section 3.2 and appendix D.
    """
    steps = scale.double() * input_scale
    return (bias.double() / steps).round().clamp(-largest - 1, largest).to(torch.int32)


def exact_dyadic(
    multiplier: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_low: int,
    input_high: int,
    low: int = -128,
    high: int = 127,
) -> tuple[Tensor, Tensor]:
    """Dyadic numbers beside those given, i32 (O), that f32 multiplies by exactly: of 24 bits, and the first of each

    channel with which rounding (sum + bias) * multiplier / 2**shift in f32, halves to even, is what is defined for
    every sum that ``weight`` i8 (O, ...) makes of integers input_low..input_high, or for these integers themselves.
    The given number where none of those tried is one. Results of more than eight bits have the nearest number of 20
    bits, if it has at most ``FRACTION_BITS`` behind the point. Why: docs/decisions/012-integer-forms.md.
    """
    b, c = (one.cpu().numpy().astype(np.int64) for one in (multiplier, shift))
    if high - low > NARROW:
        b, c = _short(b, c)
        return torch.from_numpy(b).to(multiplier), torch.from_numpy(c).to(shift)
    added = np.int64(0) if bias is None else bias.cpu().numpy().astype(np.int64)
    alone = np.full_like(b, input_low), np.full_like(b, input_high)
    sums = alone if weight is None else reach(weight.cpu().numpy(), input_low, input_high)
    lowest, highest = (np.clip(one + added, -LARGEST - 1, LARGEST) for one in sums)
    found = b.copy()
    open_ = np.flatnonzero((b >= 1 << 30) & countable(c, low, high))
    for tried in range(TRIES):
        away = (tried + 1) // 2 * (STRIDE if tried % 2 else -STRIDE)
        near = (b[open_] + GRAIN // 2) // GRAIN * GRAIN + away
        good = (near >= 1 << 30) & (near < 1 << 31)
        good[good] = _is_exact(near[good], c[open_][good], (lowest[open_][good], highest[open_][good]), low, high)
        found[open_[good]] = near[good]
        open_ = open_[~good]
    return torch.from_numpy(found).to(multiplier), shift.clone()


def _short(multiplier: Array, shift: Array) -> tuple[Array, Array]:
    """Those of the numbers in 20 bits that have few bits behind the point then."""
    near = (multiplier + COARSE // 2) // COARSE * COARSE
    whole = (near << FRACTION_BITS) % (np.int64(1) << shift) == 0
    full = whole & (near == 1 << 31) & (shift > 1)
    near, shift = np.where(full, 1 << 30, near), shift - full
    return np.where(whole & (near < 1 << 31), near, multiplier), shift


def _is_exact(multiplier: Array, shift: Array, reached: tuple[Array, Array], low: int, high: int) -> Array:
    """Of which channels f32 gives what is defined for all sums that are reached."""
    sums = borders(multiplier, shift, reached, low, high)
    factor = np.ldexp(multiplier.astype(np.float32), -shift.astype(np.int32))
    wanted = exactly(sums, multiplier, shift).clip(low, high)
    same: Array = (in_floats(sums, factor).clip(low, high) == wanted).all(axis=1)
    return same
