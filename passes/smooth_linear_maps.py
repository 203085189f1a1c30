"""What can be done to the channels of a value and undone in a weight: factors, and rotations by blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from intarsia.ir.errors import SpecError
from intarsia.ir.spec import Spec

STEPS = 4
"""Factors between one power of two and the next: rounded to one of them, a factor is at most 9 % off."""

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""What each number from 0 to 63 is written as (base64url)."""

MIDDLE = 32
"""The digit of the factor 1, ``g``."""


@dataclass(frozen=True)
class Factors:
    """Channel j of the input divided by 2**((digits[j] - 32) / 4), column j of the weight multiplied by it.

    Attributes:
        shift: What is subtracted from all channels then, and added by the bias: grids are symmetric, and what comes
            from a GELU is not.
    """

    digits: tuple[int, ...]
    shift: float = 0.0

    @classmethod
    def of(cls, letters: str, shift: float = 0.0) -> Factors:
        """What a letter a channel stands for; SpecError for a letter that is none."""
        if wrong := [letter for letter in letters if letter not in DIGITS]:
            raise SpecError(f"smooth: factors are one of {DIGITS} for each channel, found {wrong[0]!r}")
        if not isfinite(shift):
            raise SpecError(f"smooth: shift is a finite number, found {shift}")
        return cls(tuple(map(DIGITS.index, letters)), shift)

    @classmethod
    def nearest(cls, exponents: Sequence[float]) -> Factors:
        """Those nearest to 2**exponents, 2**-8 to 2**7.75."""
        steps = (round(exponent * STEPS) + MIDDLE for exponent in exponents)
        return cls(tuple(min(max(step, 0), len(DIGITS) - 1) for step in steps))

    @property
    def exponents(self) -> tuple[float, ...]:
        """The binary logarithm of each channel's factor."""
        return tuple((digit - MIDDLE) / STEPS for digit in self.digits)

    def __str__(self) -> str:
        letters = "".join(DIGITS[digit] for digit in self.digits)
        return str(Spec("smooth", {"factors": letters} | ({"shift": self.shift} if self.shift else {})))


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
    if spec.name == "smooth" and set(spec.args) | {"shift"} == {"factors", "shift"}:
        letters, shift = spec.args["factors"], spec.args.get("shift", 0.0)
        if isinstance(letters, str) and isinstance(shift, int | float):
            return Factors.of(letters, float(shift))
    if spec.name == "rotate" and set(spec.args) == {"block"} and isinstance(block := spec.args["block"], int):
        if block < 2 or block & (block - 1):
            raise SpecError(f"rotate: block is a power of two, 2 or more, found {block}")
        return Rotation(block)
    raise SpecError(f"expected 'smooth(factors=..., shift=...)' or 'rotate(block=...)', found {option[:60]!r}")
