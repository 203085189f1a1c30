"""An option of a place with what it brings: seconds, bytes, error."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weighed:
    """An option with what it brings beyond the first.

    Attributes:
        seconds: Predicted change of the time of one call; negative is faster.
        bytes: Predicted change of the memory of the weights; negative is smaller.
        error: Relative squared error of the outputs with this option alone; None if no search measured it.
        interval: Where the error lies in 95 of 100 cases, where that is known.
        bops: Operations on bits of one call, of a layer whose bits were searched.
    """

    option: str
    seconds: float
    bytes: int
    error: float | None
    interval: tuple[float, float] | None = None
    bops: float | None = None


def share(error: float | None, total: float | None) -> str:
    """``at 1.2% of the plan's error`` with a space before it; empty where nothing was measured."""
    if error is None:
        return ""
    return f" at {error / total:.1%} of the plan's error" if total else f" at an error of {error:.2g}"
