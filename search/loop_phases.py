"""Into which ranges of steps a denoising loop is cut."""

from __future__ import annotations

from itertools import pairwise

SLOW_START = 1.5
"""Power by which phases grow longer along the loop; 1 would make all of a length."""


def step_ranges(steps: int, count: int) -> tuple[tuple[int, int], ...]:
    """First and last step of each of ``count`` ranges, at most one a step; the first is the shortest.

    Steps at the beginning place what the video shows.
    """
    count = min(count, steps)
    borders = [0]
    for number in range(1, count + 1):
        wanted = round(steps * (number / count) ** SLOW_START)
        borders.append(min(max(wanted, borders[-1] + 1), steps - count + number))
    return tuple((first, end - 1) for first, end in pairwise(borders))
