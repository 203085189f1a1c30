"""What every integer operator gives, in numpy's int64: the definition that all references and engines are held against.

Arguments are those of the operators, arrays for tensors. A sum that int32 does not hold has no meaning: OverflowError.
Source: HAWQ-V3 (arXiv 2011.10680), sections 3.1 to 3.3, and its code (github.com/Zhen-Dong/HAWQ), quant_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

SMALLEST = np.float32(1e-8)
"""A channel whose largest magnitude is below it has no weights."""


def requantize(input: Array, multiplier: Array, shift: Array, axis: int, low: int = -128, high: int = 127) -> Array:
    """``input`` times multiplier / 2**shift of its place along ``axis``, or of all, rounded half up and clipped."""
    shape = [1] * input.ndim
    shape[axis] = -1
    return clipped(scaled(input, multiplier.reshape(shape), shift.reshape(shape)), low, high)


def scaled(input: Array, multiplier: Array, shift: Array) -> Array:
    """floor(``input`` * ``multiplier`` / 2**``shift`` + 1/2) for i32 and shifts in 1..62: i64, and never beyond it."""
    wide = shift.astype(np.int64)
    half = np.int64(1) << (wide - 1)
    result: Array = (input.astype(np.int64) * multiplier.astype(np.int64) + half) >> wide
    return result


def clipped(values: Array, low: int, high: int) -> Array:
    """``values`` clipped to ``low`` and ``high``, in the smallest of i8, i16 and i32 that holds both."""
    types = (np.int8, np.int16, np.int32)
    dtype = next(dtype for dtype in types if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
    return np.clip(values, low, high).astype(dtype)


def linear_i8i8(
    input: Array,
    weight: Array,
    bias: Array | None,
    multiplier: Array,
    shift: Array,
    low: int = -128,
    high: int = 127,
) -> Array:
    """``input`` (..., C) times ``weight`` (R, C) transposed, plus ``bias`` (R), requantized for each of R."""
    total = input.astype(np.int64) @ weight.astype(np.int64).T
    total = _held(total if bias is None else total + bias)
    return requantize(total, multiplier, shift, total.ndim - 1, low, high)


def conv2d_i8i8(
    input: Array,
    weight: Array,
    bias: Array | None,
    multiplier: Array,
    shift: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int = -128,
    high: int = 127,
) -> Array:
    """``input`` (N, C, H, W) with ``weight`` (O, C/groups, kh, kw), plus ``bias`` (O), requantized for each of O."""
    outputs, _, *taps = weight.shape
    spans = [(count - 1) * gap + 1 for count, gap in zip(taps, dilation, strict=True)]
    found = _windows(input, spans, stride, padding)[..., :: dilation[0], :: dilation[1]]
    batch, channels, height, width = found.shape[:4]
    parts = found.reshape(batch, groups, channels // groups, height, width, *taps)
    rows = weight.astype(np.int64).reshape(groups, outputs // groups, -1, *taps)
    total = np.einsum("ngchwij,gocij->ngohw", parts, rows).reshape(batch, outputs, height, width)
    total = _held(total if bias is None else total + bias.astype(np.int64)[:, None, None])
    return requantize(total, multiplier, shift, 1, low, high)


def add_requantized(
    input: Array,
    other: Array,
    multiplier: Array,
    shift: Array,
    other_multiplier: Array,
    other_shift: Array,
    low: int = -128,
    high: int = 127,
) -> Array:
    """The sum of two arrays, each scaled and rounded half up on its own, clipped. Source: HAWQ-V3, equation 7."""
    return clipped(scaled(input, multiplier, shift) + scaled(other, other_multiplier, other_shift), low, high)


def avg_pool2d_i8(
    input: Array,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    multiplier: Array,
    shift: Array,
    low: int = -128,
    high: int = 127,
) -> Array:
    """Sums over windows of ``input`` (N, C, H, W), padding counted as zeros, requantized: 1/(kh*kw) is the caller's."""
    total = _held(_windows(input, kernel_size, stride, padding).sum(axis=(-2, -1)))
    return requantize(total, multiplier, shift, 1, low, high)


def quantize_static(input: Array, scale: float, low: int = -128, high: int = 127) -> Array:
    """``input`` / ``scale``, divided in f32, rounded half to even, clipped."""
    return clipped(np.rint(input.astype(np.float32) / np.float32(scale)), low, high)


def dequantize_static(input: Array, scale: float) -> Array:
    """``input`` times ``scale``, multiplied in f32: f32, which narrower floats are cast from."""
    result: Array = input.astype(np.float32) * np.float32(scale)
    return result


def quantize_channels(weight: Array, bits: int, grain: float = 0.0) -> tuple[Array, Array]:
    """``weight`` (O, ...) as codes i8 of ``bits`` bits, rounded half to even, and a step for each channel, f32 (O).

    The step is the largest magnitude, 1 where there is none, over the largest code; or ``grain``'s next multiple.
    """
    largest = 2 ** (bits - 1) - 1
    real = weight.astype(np.float32)
    magnitude = np.abs(real).reshape(len(real), -1).max(axis=1)
    scale = np.where(magnitude < SMALLEST, np.float32(1), magnitude) / np.float32(largest)
    if grain:
        scale = (np.ceil(scale.astype(np.float64) / grain) * grain).astype(np.float32)
    return clipped(np.rint(real / scale.reshape(-1, *[1] * (real.ndim - 1))), -largest - 1, largest), scale


def dyadic(scale: Array, factor: float) -> tuple[Array, Array]:
    """Multiplier and shift, i32 (O), of the real numbers ``scale`` (O) * ``factor``, multiplied in f64.

    The multiplier has 31 bits, fewer where the shift would be above 62, and is rounded half up.
    """
    numbers = [_dyadic(float(one) * factor) for one in scale]
    pairs = np.array(numbers, np.int32).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def exact_dyadic(
    multiplier: Array,
    shift: Array,
    weight: Array | None,
    bias: Array | None,
    input_low: int,
    input_high: int,
    low: int = -128,
    high: int = 127,
) -> tuple[Array, Array]:
    """The first of 63 multipliers of 24 bits, from ``multiplier`` outwards by 2**12, with which f32 gives what is

    defined of every sum that ``weight`` (O, ...) makes of integers input_low..input_high, plus ``bias``; or of these
    integers themselves. Where none does, ``multiplier``. For results beyond 8 bits, the nearest of 20 bits if it has at
    most 7 behind the point.
    """
    if high - low > 255:
        return _short(multiplier, shift)
    found = multiplier.copy()
    ends = min(input_low, 0), max(input_high, 0)
    for row, (b, c) in enumerate(zip(multiplier.tolist(), shift.tolist(), strict=True)):
        lowest, highest = input_low, input_high
        if weight is not None:
            corners = [(code * ends[0], code * ends[1]) for code in weight[row].reshape(-1).tolist()]
            lowest, highest = sum(map(min, corners)), sum(map(max, corners))
        added = 0 if bias is None else int(bias[row])
        reached = max(lowest + added, -(2**31)), min(highest + added, 2**31 - 1)
        nearest = (b + 2**6) // 2**7 * 2**7
        tried = (nearest + sign * away * 2**12 for away in range(32) for sign in (1, -1)[: away + 1])
        good = (one for one in tried if 2**30 <= one < 2**31 and _f32_is_exact(one, c, reached, low, high))
        if b >= 2**30 and c < 54:
            found[row] = next(good, b)
    return found, shift.copy()


def quantize_bias(bias: Array, scale: Array, input_scale: float, largest: int = 2**31 - 1) -> Array:
    """``bias`` (O) in steps of ``scale`` (O) * ``input_scale``, in f64, rounded half to even: i32 (O).

    It saturates at -``largest`` - 1 and ``largest``, so that its sum with what a layer sums up stays in int32.
    """
    steps = scale.astype(np.float64) * input_scale
    return np.clip(np.rint(bias.astype(np.float64) / steps), -largest - 1, largest).astype(np.int32)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "intarsia.requantize": requantize,
    "intarsia.linear_i8i8": linear_i8i8,
    "intarsia.conv2d_i8i8": conv2d_i8i8,
    "intarsia.add_requantized": add_requantized,
    "intarsia.avg_pool2d_i8": avg_pool2d_i8,
    "intarsia.quantize_static": quantize_static,
    "intarsia.dequantize_static": dequantize_static,
    "intarsia.quantize_channels": quantize_channels,
    "intarsia.dyadic": dyadic,
    "intarsia.exact_dyadic": exact_dyadic,
    "intarsia.quantize_bias": quantize_bias,
}
"""The definition of each operator, by its name."""


def _dyadic(real: float) -> tuple[int, int]:
    """In Python's own integers, which nothing rounds."""
    shift = min(31 - math.frexp(real)[1], 62)
    multiplier = math.floor(Fraction(real) * 2**shift + Fraction(1, 2))
    if multiplier == 2**31:
        multiplier, shift = 2**30, shift - 1
    if multiplier < 0 or shift < 1:
        raise OverflowError(f"{real} is no dyadic number of 31 bits with a shift of 1 to 62")
    return multiplier, shift


def _short(multiplier: Array, shift: Array) -> tuple[Array, Array]:
    """The nearest numbers of 20 bits, where they are whole multiples of 2**-7."""
    pairs = []
    for b, c in zip(multiplier.tolist(), shift.tolist(), strict=True):
        near = Fraction((b + 2**10) // 2**11 * 2**11, 2**c)
        whole = (near * 2**7).denominator == 1
        fits = [one for one in (c, c - 1) if one > 0 and near * 2**one < 2**31] if whole else []
        pairs.append((int(near * 2 ** fits[0]), fits[0]) if fits else (b, c))
    found = np.array(pairs, np.int32).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _f32_is_exact(multiplier: int, shift: int, reached: tuple[int, int], low: int, high: int) -> bool:
    """Whether f32, halves to even, is right on both sides of every sum at which the result steps, and at both ends."""
    steps = (-((2 ** (shift - 1) - (one << shift)) // multiplier) for one in range(low + 1, high + 1))
    sums = np.array([side for one in steps for side in (one, one - 1)] + list(reached), np.int64).clip(*reached)
    factor = np.float32(math.ldexp(multiplier, -shift))
    rounded = np.rint(sums.astype(np.float32) * factor).clip(low, high)
    wanted = [(one * multiplier + 2 ** (shift - 1)) >> shift for one in sums.tolist()]
    return bool((rounded == np.array(wanted).clip(low, high)).all())


def _windows(input: Array, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Array:
    """Of (N, C, H, W), with zeros around, those under each place of the window: i64 (N, C, H', W', kh, kw)."""
    edges = [(0, 0), (0, 0), *((width, width) for width in padding)]
    padded = np.pad(input.astype(np.int64), edges)
    found = np.lib.stride_tricks.sliding_window_view(padded, tuple(window), axis=(2, 3))
    return found[:, :, :: stride[0], :: stride[1]]


def _held(total: Array) -> Array:
    """The sums, if int32 holds every one."""
    if total.size and (total.min() < -(2**31) or total.max() >= 2**31):
        raise OverflowError(f"a sum of {total.min()} to {total.max()} leaves int32")
    return total
