"""What integer softmax, norms, functions and products of activations give, in numpy's int64: their definition.

Nothing divides: a row's reciprocal, and its reciprocal square root, are Newton's steps, products and shifts. Every
intermediate number stays inside int64, which the docstrings argue and ``tests/kernels/test_integer_islands.py`` tries
at the extremes. Sources: I-BERT (arXiv 2101.01321) and I-ViT (arXiv 2207.01405) for what is computed; how it is
computed, and why otherwise than there: docs/decisions/013-integer-islands.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from intarsia.kernels.integers.golden import Array, clipped

ONE = 30
"""Binary digits behind the point of exponentials, reciprocals and roots."""

SEGMENT, FRACTION = 5, 12
"""Of a function of 16-bit codes: a knot stands at every 2**SEGMENT codes, in 2**-FRACTION steps of the result."""

NORMED = 22
"""Binary digits behind the point of what is normalized: at most sqrt(32,768) < 2**8."""

LARGEST = 2**30
"""Largest magnitude of a number in a function's table."""

FUNCTIONS: Mapping[str, Callable[[float], float]] = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0,
    "tanh": math.tanh,
}
"""What a table can hold."""


def function_table(function: str, input_scale: float, scale: float, bits: int) -> Array:
    """The results of all 256 codes of 8 bits in steps of ``scale``; of 16 bits the 2,049 knots, FRACTION digits finer.

    Rounded half to even in f64: i32 (256) or (2049).
    """
    codes, finer = (range(-128, 128), 1) if bits == 8 else (range(-(2**15), 2**15 + 1, 2**SEGMENT), 2**FRACTION)
    found = [round(FUNCTIONS[function](code * input_scale) / scale * finer) for code in codes]
    return np.clip(np.array(found, np.int64), -LARGEST, LARGEST).astype(np.int32)


def apply_table(input: Array, table: Array, low: int = -128, high: int = 127) -> Array:
    """What the table says of each code: its entry for i8; for i16 the straight line between two knots, rounded half up.

    A product is at most 2**30 * 2**5, in int64.
    """
    wide, known = input.astype(np.int64), table.astype(np.int64)
    if input.dtype == np.int8:
        return clipped(known[wide + 128], low, high)
    place, part = (wide + 2**15) >> SEGMENT, wide & (2**SEGMENT - 1)
    total = known[place] * (2**SEGMENT - part) + known[place + 1] * part
    return clipped((total + 2 ** (SEGMENT + FRACTION - 1)) >> (SEGMENT + FRACTION), low, high)


def exponentials(scale: float, bits: int) -> Array:
    """e**(-``scale`` * d) with ONE digits, for d from 0 to 255; for 16 bits before them those for 256 * d.

    Rounded half to even in f64: i32 (256) or (512).
    """
    steps = [*range(256)] if bits == 8 else [*range(0, 2**16, 256), *range(256)]
    return np.array([round(math.exp(-scale * step) * 2**ONE) for step in steps], np.int32)


def integer_softmax(input: Array, table: Array, multiplier: int, shift: int, low: int = -128, high: int = 127) -> Array:
    """Softmax over the last axis, times ``multiplier`` / 2**``shift``, rounded half up and clipped.

    e**-(largest - x) is at most 2**30 and at most 2**32 of them are summed, so a sum has 31 to 62 digits; the product
    with the row's multiplier, below 2**31, and half a unit is at most 2**62.
    """
    wide, known = input.astype(np.int64), table.astype(np.int64)
    below = wide.max(axis=-1, keepdims=True) - wide
    if input.dtype == np.int8:
        powers = known[below]
    else:
        powers = (known[below >> 8] * known[256 + (below & 255)] + 2 ** (ONE - 1)) >> ONE
    total = powers.sum(axis=-1, keepdims=True)
    length = bit_length(total)
    number = (reciprocal(total >> (length - 31)) * multiplier) >> 31
    digits = np.minimum(length + shift - 1, 62)
    return clipped((powers * number + (np.int64(1) << (digits - 1))) >> digits, low, high)


def norm_numbers(weight: Array | None, bias: Array | None, scale: float, channels: int) -> tuple[Array, Array, Array]:
    """Weight and bias (C) in steps of ``scale`` with as many digits as fit, in f64: i32 (C), i64 (C), and i32 (1).

    The last is how many digits the bias has behind the point; the weight has NORMED fewer. A weight is at most 2**30, a
    bias 2**60, no digit is behind the 48th. Rounded half to even.
    """
    factor = np.ones(channels) if weight is None else weight.astype(np.float64)
    summand = np.zeros(channels) if bias is None else bias.astype(np.float64)
    factor, summand = factor / scale, summand / scale
    digits = min(48, 30 + NORMED - _exponent(factor), 60 - _exponent(summand))
    if digits < 1:
        raise OverflowError(f"a weight of {abs(factor).max()} steps and a bias of {abs(summand).max()} have no digits")
    made = np.rint(np.ldexp(factor, digits - NORMED)).astype(np.int32)
    return made, np.rint(np.ldexp(summand, digits)).astype(np.int64), np.array([digits], np.int32)


def integer_norm(
    input: Array,
    weight: Array,
    bias: Array,
    shift: Array,
    epsilon: int,
    centered: bool,
    low: int = -128,
    high: int = 127,
) -> Array:
    """``input`` i8 or i16 (..., C), C up to 32,768, normalized over the last axis, times ``weight``, plus ``bias``.

    With N = C and S, Q the sums of x and x**2: (N x - S) / sqrt(N Q - S**2 + ``epsilon``); not ``centered``, S is 0,
    which is an RMS norm. ``epsilon``, from 1 to 2**61, is N**2 eps in the input's steps squared. N Q is at most 2**60,
    |N x - S| below 2**31 and the root at most 2**31, what is normalized at most 2**30, its product with the weight
    2**60, and with the bias and half a unit below 2**62.
    """
    wide, count = input.astype(np.int64), input.shape[-1]
    total = wide.sum(axis=-1, keepdims=True) if centered else np.int64(0)
    spread = count * (wide * wide).sum(axis=-1, keepdims=True) - total * total + epsilon
    half = (bit_length(spread) + 1) >> 1
    root = inverse_root((spread << (62 - 2 * half)) >> 31)
    digits = half + (ONE - NORMED)
    normed = ((count * wide - total) * root + (np.int64(1) << (digits - 1))) >> digits
    behind = shift.astype(np.int64)
    result = (normed * weight.astype(np.int64) + bias + (np.int64(1) << (behind - 1))) >> behind
    return clipped(result, low, high)


def matmul_i8i8(input: Array, other: Array, multiplier: int, shift: int, low: int = -128, high: int = 127) -> Array:
    """``input`` i8 (..., M, K) times ``other`` i8 (..., K, N), times ``multiplier`` / 2**``shift``, rounded half up."""
    total = input.astype(np.int64) @ other.astype(np.int64)
    if total.size and (total.min() < -(2**31) or total.max() >= 2**31):
        raise OverflowError(f"a sum of {total.min()} to {total.max()} leaves int32")
    return clipped((total * multiplier + (np.int64(1) << (shift - 1))) >> shift, low, high)


def bit_length(number: Array) -> Array:
    """How many binary digits positive numbers below 2**62 have."""
    found: Array = (number[..., None] >= np.int64(1) << np.arange(62)).sum(axis=-1)
    return found


def reciprocal(number: Array) -> Array:
    """1 / x with ONE digits, for x from 1/2 to 1 with 31 digits: relative error below 2**-28.

    It begins with 48/17 - 32/17 x, off by 1/17 at most, and squares that thrice: 1.4e-10; the rest is cutting off.
    """
    found = 3031741621 - ((2021161080 * number) >> 31)
    for _ in range(3):
        found = (found * ((2**62 - number * found) >> 31)) >> ONE
    return found


def inverse_root(number: Array) -> Array:
    """1 / sqrt(x) with ONE digits, for x from 1/4 to 1 with 31 digits: relative error below 2**-28.

    It begins with the straight line of the least relative error, 0.086; a step takes e to 1.5 e**2, four to 4e-15.
    """
    found = 2290047081 - ((1308598332 * number) >> 31)
    for _ in range(4):
        found = (found * ((3 * 2**61 - number * ((found * found) >> ONE)) >> 31)) >> 31
    return found


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "intarsia.function_table": function_table,
    "intarsia.apply_table": apply_table,
    "intarsia.exponentials": exponentials,
    "intarsia.integer_softmax": integer_softmax,
    "intarsia.norm_numbers": norm_numbers,
    "intarsia.integer_norm": integer_norm,
    "intarsia.matmul_i8i8": matmul_i8i8,
}
"""The definition of each operator, by its name."""


def _exponent(numbers: Array) -> int:
    """The least e for which all magnitudes are below 2**e."""
    return math.frexp(float(np.abs(numbers).max()))[1]
