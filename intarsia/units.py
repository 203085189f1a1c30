"""Numbers as people read them."""

from __future__ import annotations

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_COUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def duration(seconds: float) -> str:
    """``1.25 ms``: seconds to three digits in the unit that fits; minutes from two minutes on."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    for factor, unit in _SECONDS:
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.2g} ns"


def size(count: float) -> str:
    """``7.14 MB``: bytes to three digits in decimal units."""
    for factor, unit in _BYTES:
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def amount(count: float) -> str:
    """``6.93 T``: a count to three digits with a decimal prefix."""
    for factor, prefix in _COUNTS:
        if count >= factor:
            return f"{count / factor:.3g} {prefix}"
    return f"{count:g} "


def ratio(before: float, after: float) -> str:
    """``3.4x`` smaller or faster; a dash where there is nothing to divide by."""
    return f"{before / after:.3g}x" if after > 0 else "-"


def growth(before: float, after: float) -> str:
    """``3.4x smaller`` or ``1.2x larger``, of two sizes."""
    return f"{ratio(after, before)} larger" if after > before else f"{ratio(before, after)} smaller"


def speed(before: float, after: float) -> str:
    """``2.5x as fast``, of two times in seconds; within one percent ``as fast as before``."""
    return "as fast as before" if abs(before - after) < 0.01 * after else f"{ratio(before, after)} as fast"
