"""What can be done to the channels of a value and undone in a weight: factors, and rotations by blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from intarsia.ir.errors import SpecError
from intarsia.ir.spec import Literal, Spec

STEPS = 4
"""Factors between one power of two and the next: rounded to one of them, a factor is at most 9 % off."""

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""What the numbers from 0 to 63 are written as (base64url)."""

MIDDLE = 32
"""The digit of the factor 1 and of no shift, ``g``."""


@dataclass(frozen=True)
class Factors:
    """Channel j of the input divided by 2**((digits[j] - 32) / 4), column j of the weight multiplied by it.

    Attributes:
        shifts: What is subtracted from each channel then, and added by the bias, 32 for nothing, in steps of ``unit``;
            empty where nothing is. Grids are symmetric about 0, and what a GELU gives is not.
    """

    digits: tuple[int, ...]
    shifts: tuple[int, ...] = ()
    unit: float = 0.0

    @classmethod
    def nearest(cls, exponents: Sequence[float], offsets: Sequence[float] = ()) -> Factors:
        """Those nearest to 2**exponents, from 2**-8 to 2**7.75, and to what is subtracted from the divided channels."""
        digits = tuple(_digit(exponent * STEPS) for exponent in exponents)
        largest = max(map(abs, offsets), default=0.0)
        if not largest:
            return cls(digits)
        unit = float(f"{largest / (len(DIGITS) - 1 - MIDDLE):.4g}")
        return cls(digits, tuple(_digit(offset / unit) for offset in offsets), unit)

    @property
    def exponents(self) -> tuple[float, ...]:
        """The binary logarithm of each channel's factor."""
        return tuple((digit - MIDDLE) / STEPS for digit in self.digits)

    @property
    def offsets(self) -> tuple[float, ...]:
        """What is subtracted from each channel; empty where nothing is."""
        return tuple((digit - MIDDLE) * self.unit for digit in self.shifts)

    def __str__(self) -> str:
        args: dict[str, Literal] = {"factors": _letters(self.digits)}
        if self.shifts:
            args |= {"shifts": _letters(self.shifts), "unit": self.unit}
        return str(Spec("smooth", args))


@dataclass(frozen=True)
class Rotation:
    """Every ``block`` neighbouring channels multiplied by the Hadamard matrix of that order over sqrt(block)."""

    block: int

    def __str__(self) -> str:
        return str(Spec("rotate", {"block": self.block}))


Map = Factors | Rotation


def map_of(option: str) -> Map:
    """What ``smooth(factors='ghf')`` or ``rotate(block=64)`` stands for; SpecError if it is neither."""
    spec = Spec.parse(option)
    if spec.name == "smooth" and set(spec.args) in ({"factors"}, {"factors", "shifts", "unit"}):
        return _factors(spec)
    if spec.name == "rotate" and set(spec.args) == {"block"} and isinstance(block := spec.args["block"], int):
        if block < 2 or block & (block - 1):
            raise SpecError(f"rotate: block is a power of two, 2 or more, found {block}")
        return Rotation(block)
    raise SpecError(f"expected 'smooth(factors=...)' or 'rotate(block=...)', found {option[:60]!r}")


def _factors(spec: Spec) -> Factors:
    unit = spec.args.get("unit", 0.0)
    if not isinstance(unit, int | float) or not isfinite(unit):
        raise SpecError(f"smooth: unit is a finite number, found {unit!r}")
    digits, shifts = (_digits(spec.args.get(key, "")) for key in ("factors", "shifts"))
    if shifts and len(shifts) != len(digits):
        raise SpecError(f"smooth: {len(digits)} factors and {len(shifts)} shifts; there is one of each for a channel")
    return Factors(digits, shifts, float(unit))


def _digits(letters: object) -> tuple[int, ...]:
    wrong = [letter for letter in letters if letter not in DIGITS] if isinstance(letters, str) else [letters]
    if wrong:
        raise SpecError(f"smooth: a channel's letter is one of {DIGITS}, found {wrong[0]!r}")
    return tuple(map(DIGITS.index, str(letters)))


def _letters(digits: Sequence[int]) -> str:
    return "".join(DIGITS[digit] for digit in digits)


def _digit(number: float) -> int:
    return min(max(round(number) + MIDDLE, 0), len(DIGITS) - 1)
