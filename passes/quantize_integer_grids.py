"""Grids of integers on which activations lie: how wide, how fine, and which range of numbers has none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from intarsia.ir.errors import PlanError

Range = tuple[float, float]
"""Lowest and highest value that calibration saw."""

TRUNK = 16
"""Bits of the residual trunk. Source: HAWQ-V3's code (github.com/Zhen-Dong/HAWQ), q_resnet.py, ``quant_act_int32``."""

SMALLEST = 2.0**-126
"""Smallest step of a grid: what is smaller is no normal f32, in which activations are divided by it."""


@dataclass(frozen=True)
class Grid:
    """The multiples ``low``..``high`` of ``scale``; the zero point is 0."""

    scale: float
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Bits that its codes take: 4, 8 or 16."""
        codes = self.high - self.low + 1
        return math.ceil(math.log2(codes))

    @property
    def suffix(self) -> str:
        """What a value on this grid is called after its name: ``i8``, ``u4``, ``i16``."""
        return f"{'u' if self.low == 0 else 'i'}{self.bits}"


def grid(seen: Range, bits: int) -> Grid:
    """The grid of 4, 8 or 16 bits for what calibration saw; ``why_no_grid`` is None for it.

    Eight and sixteen bits are signed, so that after a ReLU eight bits hold 0..127; four bits are unsigned where nothing
    is negative. Source: HAWQ-V3 (arXiv 2011.10680), section 3.1, and its code.
    """
    low, high = seen
    if bits == 4 and low >= 0:
        return Grid(high / 15, 0, 15)
    largest = 2 ** (bits - 1) - 1
    return Grid(max(abs(low), abs(high)) / largest, -largest - 1, largest)


def why_no_grid(name: str, seen: Range | None) -> str | None:
    """Why the value called ``name`` lies on no grid, in one line; None if it does."""
    if seen is None:
        return f"%{name} has no calibrated range; run calibrate first"
    low, high = seen
    if math.isnan(low) or math.isnan(high) or math.isinf(low) or math.isinf(high):
        return f"%{name} was calibrated to {low} to {high}; a range is finite, look for NaN and infinity in the data"
    if low > high:
        return f"%{name} was calibrated to {low} to {high}; the lower end comes first"
    if low == high == 0:
        return f"%{name} was zero on all calibration data; a range of 0 has no scale, calibrate on data that reaches it"
    if max(abs(low), abs(high)) / (2 ** (TRUNK - 1) - 1) < SMALLEST:
        return f"%{name} was calibrated to {low} to {high}; its scale underflows f32"
    return None


def code(number: float, scale: float) -> int:
    """The whole number of ``scale`` nearest to ``number``, halves to even, as ``intarsia.fake_quantize`` rounds."""
    return round(number / scale)


def dyadic_shift(ratio: float, where: str) -> int:
    """The shift of the dyadic number of ``ratio``; PlanError if it has none.

    Source: HAWQ-V3, equation 5, and ``batch_frexp`` of its code: 31 bits of multiplier.
    """
    mantissa, exponent = math.frexp(ratio)
    shift = 31 - exponent - (math.floor(mantissa * 2**31 + 0.5) == 2**31)
    if 1 <= shift <= 62:
        return shift
    what = "underflows" if shift > 62 else "overflows"
    raise PlanError(
        f"{where}: one step is {ratio:.3g} of the next grid's, which {what} a dyadic number (shift {shift}, 1 to 62 "
        "are possible); look at the calibrated ranges, or keep the layers around it"
    )
