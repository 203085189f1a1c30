"""TeaCache's polynomial of a network: how far its answer moves where its signal moves so far."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from intarsia.cached import CachedEngine, relative_change

DEGREE = 4
"""Of the polynomials that TeaCache's authors publish."""


class Recorded:
    """A loop's network that notes, from step to step, how far signal and answer move.

    Args:
        engine: With a threshold of 0, so that every step is computed.

    Attributes:
        moves: The relative changes of signal and velocity at each step but the first, of all loops.
    """

    def __init__(self, engine: CachedEngine) -> None:
        self.moves: list[tuple[float, float]] = []
        self._engine = engine
        self._before: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs."""
        answer = self._engine(*inputs)
        changes = self._engine.watch.changes
        if len(changes) > 1 and self._before is not None:
            self.moves.append((changes[-1], relative_change(answer[0], self._before)))
        self._before = answer[0]
        return answer

    def coefficients(self) -> tuple[float, ...]:
        """Of the polynomial through the moves in least squares, the highest power first, to five digits.

        Source: Liu et al., TeaCache, 2024, section 3, where it is fitted for each network in the same way.
        """
        signal, answer = zip(*self.moves, strict=True)
        return tuple(float(f"{one:.5g}") for one in np.polyfit(signal, answer, DEGREE))
