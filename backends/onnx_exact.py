"""When floating point gives exactly the integers of a dyadic number, proved at every sum at which the result changes.

Both what is defined, floor((x + bias) * multiplier / 2**shift + 1/2) clipped, and what floats compute of x never fall
as x grows. So they agree on all x if they agree on both sides of each step of the first, and those are few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from intarsia.kernels.integer_weights.sums import NARROW, WIDEST, Array, borders, countable, exactly, in_floats

DOUBLE = 53
"""Bits of a whole number that f64 holds."""

SINGLE = 1 << 24
"""Whole numbers below it are exact in f32."""

EVERY = 1 << 16
"""Up to so many numbers of a single channel are looked at one by one."""

NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)
"""How many f32 beside the nearest one a factor is tried."""

ENOUGH = len(NEIGHBOURS)
"""Trials after which a search is given up that has found what it looks for in less than half of the channels."""

TINY = 1e-30
"""In place of a factor of zero, which is no scale; times any int32 it is rounded to zero."""


@dataclass(frozen=True)
class Scaling:
    """What becomes of whole numbers x of each channel, lowest <= x <= highest: all arrays i64 (O).

    Attributes:
        low: To what the result is clipped from below.
        high: And from above.
    """

    multiplier: Array
    shift: Array
    bias: Array
    lowest: Array
    highest: Array
    low: int
    high: int

    @staticmethod
    def of(
        multiplier: Array,
        shift: Array,
        bias: Array | int,
        reach: tuple[Array | int, Array | int],
        ends: tuple[int, int],
    ) -> Scaling:
        """With numbers for arrays where all channels are alike."""
        lowest, highest = reach
        alike = np.broadcast_arrays(*(np.asarray(one, np.int64) for one in (multiplier, shift, bias, lowest, highest)))
        b, c, bias, lowest, highest = (np.atleast_1d(one).copy() for one in alike)
        # With the bias they are in int32, or mean nothing.
        lowest, highest = np.maximum(lowest, -(1 << 31) - bias), np.minimum(highest, (1 << 31) - 1 - bias)
        while (even := (b % 2 == 0) & (b != 0) & (c > 1)).any():
            b, c = np.where(even, b // 2, b), np.where(even, c - 1, c)
        return Scaling(b, c, bias, lowest, highest, *ends)

    def exactly(self, x: Array) -> Array:
        """What is defined, of x (O, any)."""
        return np.clip(self.unclipped(x), self.low, self.high)

    def unclipped(self, x: Array) -> Array:
        """The same before it is clipped."""
        return exactly(x + self.bias[:, None], self.multiplier, self.shift)

    @cached_property
    def bits(self) -> int:
        """Of the largest whole number that comes up before the shift, half a unit and the result's ends among them."""
        largest = np.maximum(abs(self.lowest + self.bias), abs(self.highest + self.bias))
        largest = np.maximum(largest, np.maximum(abs(self.lowest), abs(self.highest))) + abs(self.bias)
        numbers = zip(largest.tolist(), self.multiplier.tolist(), self.shift.tolist(), strict=True)
        return max((abs(x * b) + (1 << c) * (1 + abs(self.low)) for x, b, c in numbers), default=0).bit_length()

    @property
    def saturating_bits(self) -> int:
        """Of the largest whole number before the shift that the result's ends do not clip, half a unit among them."""
        return int(((self.high - self.low + 2) << int(self.shift.max(initial=1))).bit_length())

    @cached_property
    def borders(self) -> Array | None:
        """Numbers x (O, any) on both sides of all steps, and the ends; None where that is not known."""
        span = int((self.highest - self.lowest).max(initial=0))
        if len(self.lowest) == 1 and span <= EVERY:
            return np.arange(self.lowest[0], self.highest[0] + 1)[None]
        if self.multiplier.min(initial=1) < 1 or not countable(self.shift, self.low, self.high).all():
            return None
        if self.high - self.low > NARROW or abs(self.bias).max(initial=0) >= WIDEST:
            return None
        reached = self.lowest + self.bias, self.highest + self.bias
        return borders(self.multiplier, self.shift, reached, self.low, self.high) - self.bias[:, None]


def whole_scale(scaling: Scaling, zero: int) -> Array | None:
    """Factors f32 (O) with which QLinearConv and QLinearMatMul give what is defined; None if there are none.

    They add the bias in int32, multiply in f32, round half to even, add ``zero`` and saturate to u8.
    """

    def computed(part: Scaling, x: Array, factor: Array) -> Array:
        codes = np.clip(in_floats(x + part.bias[:, None], factor[:, 0]), -zero, 255 - zero).astype(np.int64)
        return np.clip(codes, scaling.low, scaling.high)

    factor = np.maximum(exact_affine(scaling, 0)[0], TINY).astype(np.float32)
    found = _search(scaling, computed, (factor,))
    return None if found is None else found[0]


def affine(scaling: Scaling, offset: int) -> tuple[Array, Array] | None:
    """Factors and summands f32 (O): floor(x * factor + summand) is what is defined, plus ``offset``; None if none are.

    Multiplied and added in f32, each rounded on its own, and clipped before floor.
    """
    low, high = scaling.low + offset, scaling.high + offset

    def computed(part: Scaling, x: Array, factor: Array, summand: Array) -> Array:
        real = np.clip(x.astype(np.float32) * factor + summand, np.float32(low), np.float32(high))
        return np.floor(real).astype(np.int64) - offset

    if max(abs(low), abs(high)) >= SINGLE:
        return None
    if (plain := lossless(scaling, offset)) is not None:
        return plain
    factor, summand = exact_affine(scaling, offset)
    found = _search(scaling, computed, (factor.astype(np.float32), summand.astype(np.float32)))
    return None if found is None else (found[0], found[1])


def lossless(scaling: Scaling, offset: int) -> tuple[Array, Array] | None:
    """The same of numbers with so few bits behind the point that f32 holds all that is not clipped; None of others.

    Also twice as far as the ends, so that an integer between them may be added before it is clipped and rounded.
    """
    factor, summand = exact_affine(scaling, offset)
    ends = 2.0 * (max(abs(scaling.low), abs(scaling.high)) + abs(offset) + 1) + abs(summand).max(initial=0)
    if ends * 2.0 ** int(scaling.shift.max(initial=1)) > SINGLE or scaling.multiplier.min(initial=1) < 1:
        return None
    return factor.astype(np.float32), summand.astype(np.float32)


def divided(scaling: Scaling) -> float | None:
    """The f32 by which a tensor's integers, divided and rounded half to even, are what is defined; None if none is.

    As QuantizeLinear divides. What is clipped is not looked at beyond the ends.
    """
    span = int((scaling.highest - scaling.lowest).max(initial=0))
    if len(scaling.lowest) > 1 or span > EVERY or scaling.bias.any() or scaling.multiplier.min(initial=1) < 1:
        return None

    def computed(part: Scaling, x: Array, divisor: Array) -> Array:
        return np.clip(np.rint(x.astype(np.float32) / divisor), part.low, part.high).astype(np.int64)

    whole = 1 / np.ldexp(scaling.multiplier.astype(np.float64), -scaling.shift)
    found = _search(scaling, computed, (whole.astype(np.float32),))
    return None if found is None else float(found[0][0])


def whole_sum(one: Scaling, other: Scaling, ends: tuple[int, int], zero: int) -> tuple[float, float] | None:
    """Scales f32 with which QLinearAdd gives the sum of two tensors of 8 bits, clipped to ``ends``; None if none do.

    It multiplies what u8 holds, adds, with what the zeros make, in any order in f32, rounds half to even, adds ``zero``
    and saturates. So nothing may be rounded before, and then each of the at most 65,536 sums is looked at.
    """
    both = one, other
    if any(len(part.bias) > 1 or part.bias.any() or part.highest - part.lowest > 255 for part in both):
        return None
    factors = [exact_affine(part, 0)[0].item() for part in both]
    if (2 * 255 * sum(map(abs, factors)) + 255) * 2.0 ** max(part.shift.item() for part in both) > SINGLE:
        return None
    x, y = (np.arange(part.lowest.item(), part.highest.item() + 1)[None] for part in both)
    wanted = (one.unclipped(x).T + other.unclipped(y)).clip(*ends)
    found = np.rint(factors[0] * x.T + factors[1] * y).clip(-zero, 255 - zero).clip(*ends)
    return (factors[0], factors[1]) if (found == wanted).all() else None


def exact_affine(scaling: Scaling, offset: int) -> tuple[Array, Array]:
    """The same in f64, without proof: exact if ``scaling.bits`` are at most ``DOUBLE``."""
    factor = np.ldexp(scaling.multiplier.astype(np.float64), -scaling.shift)
    return factor, factor * scaling.bias + (0.5 + offset)


def _search(scaling: Scaling, computed: Callable[..., Array], start: tuple[Array, ...]) -> tuple[Array, ...] | None:
    """The parameters near ``start``, arrays f32 (O), of which ``computed`` is right at all borders."""
    points = scaling.borders
    if points is None:
        return None
    expected, found = scaling.exactly(points), [one.copy() for one in start]
    open_ = np.arange(len(points))
    for count, steps in enumerate(product(NEIGHBOURS, repeat=len(start)), start=1):
        tried = [_stepped(one[open_], step) for one, step in zip(start, steps, strict=True)]
        part = replace(scaling, bias=scaling.bias[open_])
        whole = computed(part, points[open_], *(one[:, None] for one in tried))
        good = (whole == expected[open_]).all(axis=1)
        for one, other in zip(found, tried, strict=True):
            one[open_[good]] = other[good]
        open_ = open_[~good]
        if not len(open_):
            return tuple(found)
        if count == ENOUGH and 2 * len(open_) > len(points):
            return None
    return None


def _stepped(values: Array, steps: int) -> Array:
    for _ in range(abs(steps)):
        values = np.nextafter(values, np.float32(np.inf if steps > 0 else -np.inf))
    return values
