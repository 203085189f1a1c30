"""The paper's choice: head by head in closed loop, with the epsilon that fits the budget or the goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.search.head_policy import Policy
from intarsia.search.head_study import Decided, HeadStudy
from intarsia.search.head_table import HeadTable
from intarsia.search.progress import Silent
from intarsia.search.search import EFFORTS
from intarsia.search.trials import digits


class GreedyStudy(HeadStudy):
    """Chooses by Sparse-vDiT's algorithm 1."""

    def decide(self) -> Decided:
        """What the closed loop decides with the given epsilon, or with the one that bisection finds."""
        if self.how.epsilon:
            return self._kept_by_budget(*self._policy(self.how.epsilon))
        return self._bisected()

    def _bisected(self) -> Decided:
        """The policy of the largest epsilon that keeps the goal, or of the smallest that keeps the budget."""
        bounded = self.how.bounded
        low, high = 1e-4, 1e4
        kept = replace(self._kept, phases=self.ranges, errors=np.zeros((len(self.ranges), *self.costs.shape)))
        best: Decided | None = None if bounded else (kept, self._dense_meets(kept))
        for _ in range(EFFORTS[self.effort].trials):
            epsilon = math.sqrt(low * high)
            table, choice = self._policy(epsilon)
            if bounded:
                enough = table.cost(choice) <= self._budget(table)
                low, high = (low, epsilon) if enough else (epsilon, high)
                best = self.decided = (table, choice) if enough else best
            else:
                met = self._measured(table, choice).margin >= 0
                low, high = (epsilon, high) if met else (low, epsilon)
                best = (table, choice) if met else best
            self.facts["epsilon"] = digits(high if bounded else low)
        if best is None:
            raise UsageError(
                f"strategy heads: no epsilon keeps the budget of {self.how}: with the largest, heads cost "
                f"{table.cost(choice):.4g} of {table.dense:.4g}; raise weight, which is cost's, or the budget"
            )
        return self._kept_by_budget(*best) if bounded else best

    def _policy(self, epsilon: float) -> Decided:
        """What the closed loop decides with this epsilon, and the errors that it saw."""
        relative = self.costs / np.maximum(self.costs[:, :1], 1e-300)
        told = f"{self.ranges} {self.how.score} {epsilon!r} {self.how.weight!r} {self.how.rows}"
        policy = Policy(
            program=self._materialized,
            heads=self.heads,
            costs=relative,
            score=self.how.score,
            epsilon=epsilon,
            weight=self.how.weight,
            rows=self.how.rows,
            journal=self.journal,
            key=self._key(f"policy {told} {self.heads.fingerprint} {relative.tolist()}"),
            firsts=frozenset(first for first, _ in self.ranges),
        )
        if self.loop is None:
            assert self.workload is not None
            policy.step(self.workload.calibration)
        else:
            self.progress.start(f"closed loop, epsilon {epsilon:.3g}", self.loop.steps)

            def step(batches: Sequence[tuple[Tensor, ...]]) -> Sequence[Tensor]:
                self.deadline.check()
                found = policy.step(batches)
                self.progress.advance()
                return found

            self.loop.together(step, "calibration", Silent())
        firsts = [first for first, _ in self.ranges]
        errors = np.stack([policy.errors[first] for first in firsts])
        table = HeadTable(self.ranges, self.heads.places, self.heads.options, errors, self.costs)
        return table, np.stack([policy.chosen[first] for first in firsts])
