"""Counts of numbers in equal bins, which widen as larger numbers come, and the ranges that they tell."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.passes.quantize_integer_grids import Range, grid

BINS = 4096
"""On both sides of 0 together."""

CLIPS = 128
"""Ranges that ``least_error`` tries, from the widest down in equal steps."""

EXACT = 2**24
"""Numbers that are counted at once: from here on f32 counts no further."""


class Histogram:
    """Counts in equal bins from minus ``limit`` to ``limit``, which doubles when a larger number comes.

    Attributes:
        low: The least number seen.
        high: The largest number seen.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.low, self.high = float("inf"), float("-inf")

    def take(self, numbers: Tensor) -> None:
        """Count numbers, finite and in f32, of any extents."""
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
        largest = max(abs(self.low), abs(self.high))
        if largest == 0.0:
            self.counts[BINS // 2] += numbers.numel()
            return
        self.limit = self.limit or largest
        while largest > self.limit:
            self._double()
        for part in numbers.flatten().split(EXACT):
            self.counts += torch.histc(part, BINS, -self.limit, self.limit).double()

    def percentile(self, keep: float) -> Range:
        """Ends of the bins that are left where ``1 - keep`` of the numbers is cut off, half on either side."""
        if self.limit == 0.0:
            return self.low, self.high
        share = self.counts.cumsum(0) / self.counts.sum()
        beyond = (1 - keep) / 2
        first = int(torch.searchsorted(share, beyond, right=True))
        last = int(torch.searchsorted(share, 1 - beyond))
        edges = self._edges()
        low, high = float(edges[first]), float(edges[min(last, BINS - 1) + 1])
        return max(low, self.low), min(high, self.high)

    def least_error(self, bits: int) -> Range:
        """The range on whose grid of 4 or 8 bits the numbers change least in the mean square, clipped ones too."""
        if self.limit == 0.0:
            return self.low, self.high
        edges = self._edges()
        middles = (edges[1:] + edges[:-1]) / 2
        largest = max(abs(self.low), abs(self.high))
        clips = [largest * part / CLIPS for part in range(CLIPS, 0, -1)]
        tried = [(max(-clip, min(clip, self.low)), max(-clip, min(clip, self.high))) for clip in clips]
        return min(tried, key=lambda seen: self._error(middles, seen, bits))

    def _error(self, middles: Tensor, seen: Range, bits: int) -> float:
        """Squared error of a range's grid, all numbers of a bin taken for its middle: bins are finer than grids."""
        tried = grid(seen, bits)
        rounded = (middles / tried.scale).round().clamp(tried.low, tried.high) * tried.scale
        return float((self.counts * (rounded - middles).square()).sum())

    def _double(self) -> None:
        halved = self.counts.reshape(-1, 2).sum(1)
        beyond = torch.zeros(BINS // 4, dtype=torch.float64)
        self.counts = torch.cat([beyond, halved, beyond])
        self.limit *= 2

    def _edges(self) -> Tensor:
        return torch.linspace(-self.limit, self.limit, BINS + 1, dtype=torch.float64)
