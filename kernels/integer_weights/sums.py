"""Between which whole numbers a layer's sums lie, and at which of them the result of a dyadic number steps.

What is defined, floor(sum * multiplier / 2**shift + 1/2) clipped, never falls as the sum grows, and neither does
what floats make of a sum. So the two agree everywhere if they agree on both sides of each step of the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NARROW = 255
"""Steps of a result of eight bits."""

WIDEST = 1 << 62
"""Below it, every number that comes up on the way fits into i64."""


def reach(codes: Array, low: int, high: int) -> tuple[Array, Array]:
    """The lowest and the highest sum of each row of ``codes`` (O, ...) times integers low..high: i64 (O)."""
    flat = codes.reshape(len(codes), -1)
    above = np.maximum(flat, 0).sum(axis=1, dtype=np.int64)
    below = flat.sum(axis=1, dtype=np.int64) - above
    # Padding is zero, so no product is certain to be there.
    low, high = min(low, 0), max(high, 0)
    return above * low + below * high, above * high + below * low


def borders(multiplier: Array, shift: Array, reached: tuple[Array, Array], low: int, high: int) -> Array:
    """Sums i64 (O, any) on both sides of all steps between ``low`` and ``high``, and the ends of what is ``reached``.

    Multipliers are above zero, and ``countable`` together with the shifts; all arrays are i64 (O).
    """
    steps = np.arange(low + 1, high + 1)[None] << shift[:, None]
    half = np.int64(1) << (shift[:, None] - 1)
    above = -((half - steps) // multiplier[:, None])
    sides: Array = np.concatenate([above, above - 1, np.stack(reached, axis=1)], axis=1)
    return sides.clip(reached[0][:, None], reached[1][:, None])


def countable(shift: Array, low: int, high: int) -> Array:
    """Of which channels i64 holds the steps."""
    largest = max(abs(low), abs(high)) + 1
    fits: Array = shift < (WIDEST // largest).bit_length() - 1
    return fits


def exactly(sums: Array, multiplier: Array, shift: Array) -> Array:
    """What is defined of sums (O, any), before it is clipped: i64."""
    b, c = multiplier[:, None], shift[:, None]
    found: Array = (sums * b + (np.int64(1) << (c - 1))) >> c
    return found


def in_floats(sums: Array, factor: Array) -> Array:
    """Sums (O, any) times factors f32 (O), in f32, halves to even, before it is clipped: whole numbers in f32."""
    found: Array = np.rint(sums.astype(np.float32) * factor[:, None])
    return found
