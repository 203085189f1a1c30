"""A number known from samples: their mean, and how far it may be off."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of independent samples, at least one."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all samples."""
        return math.fsum(self.samples) / len(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true mean lies in 95 of 100 cases, by Student's t; all numbers where there is one sample."""
        if len(self.samples) < 2:
            return -math.inf, math.inf
        from scipy.stats import t

        error = statistics.stdev(self.samples) / math.sqrt(len(self.samples))
        reach = float(t.ppf((1 + CONFIDENCE) / 2, len(self.samples) - 1)) * error
        return self.mean - reach, self.mean + reach

    def times(self, factor: float) -> Estimate:
        """Of ``factor`` times the number."""
        return Estimate(tuple(factor * sample for sample in self.samples))
