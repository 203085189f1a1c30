"""Dyadic numbers in TVM: in f64 where constants prove that every digit is kept, in i64 everywhere else.

A register of AVX2 holds four of either, but i64 has neither a shift with sign nor a minimum there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DIGITS = 53
"""Binary digits of an f64."""

Numbers = Sequence[Any]
"""Dyadic numbers as tensors (C) or (1): one, the ratios in f64, or two, multiplier and shift in i32."""


def numbers(
    multiplier: Any, shift: Any, known: Sequence[Tensor | None], *, largest: Tensor | int, ends: tuple[int, int] | None
) -> Numbers:
    """The form in which an operator multiplies: ``known`` are multiplier and shift where they are constants.

    ``largest`` is the largest magnitude that is multiplied, one or one a channel; ``ends`` are the two ends of the
    clamp, None if something is added before it.
    """
    constants = [one for one in known if one is not None]
    if len(constants) < 2 or not is_exact_in_f64(constants[0], constants[1], largest=largest, ends=ends):
        return [multiplier, shift]
    return [torch.ldexp(constants[0].double(), -constants[1])]


def is_exact_in_f64(multiplier: Tensor, shift: Tensor, *, largest: Tensor | int, ends: tuple[int, int] | None) -> bool:
    """Whether floor(x * ratio + 0.5) in f64 is the same as in whole numbers, for every channel.

    It is where product and half are whole multiples of 2**-shift below 2**53 of them; where the product is below a
    quarter, for then the answer is 0; and where all larger products are clipped.
    """
    product = torch.as_tensor(largest, dtype=torch.float64) * multiplier.double().abs()
    quarter = torch.ldexp(torch.ones_like(product), shift - 2)
    exact = (product < 2.0 ** (DIGITS - 1)) & (shift < DIGITS) | (product < quarter)
    if ends is not None:
        reach = max(-ends[0], ends[1] + 1).bit_length()
        exact |= shift + reach < DIGITS
    return bool(exact.all())


def rounded(x: Any, dyadic: Numbers, channel: Any) -> Any:
    """``x`` of up to 32 bits times a dyadic number, rounded half up: a whole number in f64 or i64, not clipped."""
    from tvm import tirx

    given = [one[0 if int(one.shape[0]) == 1 else channel] for one in dyadic]
    if len(given) == 1:
        return tirx.floor(x.astype("float64") * given[0] + tirx.const(0.5, "float64"))
    multiplier, wide = (one.astype("int64") for one in given)
    half = tirx.const(1, "int64") << (wide - 1)
    return (x.astype("int64") * multiplier + half) >> wide


def clipped(value: Any, *, low: int, high: int) -> Any:
    """A whole number in f32, f64 or i64 between ``low`` and ``high``, in the smallest element type that holds both."""
    from tvm import tirx

    least, most = (tirx.const(end, str(value.ty)) for end in (low, high))
    inside = tirx.max(tirx.min(value, most), least)
    dtype = element_type(low, high)
    return inside.astype("int32").astype(dtype)


def element_type(low: int, high: int) -> str:
    """The smallest of i8, i16 and i32 that holds both, as TVM calls it."""
    return next(f"int{bits}" for bits in (8, 16, 32) if -(1 << bits - 1) <= low and high < 1 << bits - 1)
