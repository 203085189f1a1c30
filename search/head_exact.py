"""The exact choice: errors of the whole answer for every head, option and phase, and an integer program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.sparse_attention import DENSE
from intarsia.search.head_moments import Moments, output_moments
from intarsia.search.head_study import Decided, HeadStudy, served
from intarsia.search.head_table import Choice, Floats, HeadTable, load_errors
from intarsia.search.search import EFFORTS
from intarsia.search.trials import digits

DRIFTS = {"quick": (3.0,), "default": (0.0, 1.5, 3.0, 4.5), "full": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)}
"""How much more errors at the beginning of the loop weigh than at its end, as the logarithm of a ratio, by effort.

Phases made sparse one at a time do not tell: an answer that left its course early goes on from another place, so errors
of many phases together do more than add up, the more the earlier they are.
"""

SHARE = 0.05
"""Step of the shares of the mean: heads that are alike get texts that are alike."""

PROBE_DENSITY = 0.25
"""Share of the pairs at which a phase alone is tried, to see what its errors do to the whole answer."""


class ExactStudy(HeadStudy):
    """Chooses by the first-order error of the guided answer, phase by phase weighted by whole answers."""

    _drift = 0.0

    def decide(self) -> Decided:
        """The choice of least error within the budget, or the cheapest that meets the goal."""
        table = self.table
        table = self._drifting(table, self._budget(table) if self.how.bounded else self._probe(table))
        if self.how.bounded:
            choice, self.facts["gap"] = table.exact(self._budget(table))
            self._kept_by_budget(table, choice)
        else:
            choice = self._within_goal(table)
            self.decided = table, choice
        if self.how.transfer and self.effort != "quick" and self.workload is not None and self.trials:
            self.facts["transfer"] = self._transfer(table, choice)
        return table, choice

    def _probe(self, table: HeadTable) -> float:
        """A budget at which errors show and answers are still like the dense ones."""
        return max(table.dense * PROBE_DENSITY, table.cheapest)

    def _drifting(self, table: HeadTable, budget: float) -> HeadTable:
        """The table with the drift whose choice at this budget has the best answers, of those that the effort tries."""
        if len(table.phases) == 1 or self.workload is None:
            return table
        drifts = DRIFTS[self.effort]
        found = [self._measured(tilted, tilted.exact(budget)[0]) for tilted in (_tilted(table, d) for d in drifts)]
        metric = next(iter(found[0].quality.metrics))
        best = max(range(len(drifts)), key=lambda number: found[number].quality[metric].mean)
        self.facts["drift"] = self._drift = drifts[best]
        return _tilted(table, self._drift)

    def _within_goal(self, table: HeadTable) -> Choice:
        """The cheapest choice found that meets the goal: a bisection over the logarithm of the budget."""
        assert self.goal is not None
        good = self._dense_meets(table)
        low, high = max(table.cheapest, table.dense * 0.01), table.dense
        for number in range(EFFORTS[self.effort].trials - 1):
            middle = max(self._probe(table), low) if number == 0 else math.sqrt(low * high)
            choice, gap = table.exact(middle)
            if self._measured(table, choice).margin >= 0:
                good, high, self.facts["gap"] = choice, table.cost(choice), gap
            else:
                low = middle
            if high / low < EFFORTS[self.effort].tolerance ** 0.5:
                break
        return good

    def _transfer(self, table: HeadTable, choice: Choice) -> dict[str, object]:
        """How far the choice serves prompts and noise that it was not made on: what those would have chosen."""
        other = self._table("validation").weighted(self._weights)
        other = _tilted(other, self._drift)
        theirs, _ = other.exact(table.cost(choice) * (1 + 1e-9))
        mine = next(t for t in self.trials if t.selection == tuple(choice.reshape(-1).tolist()))
        their = self._measured(table, theirs)
        name = next(iter(mine.quality.metrics))
        return {
            "agreement": digits(float((choice == theirs).mean())),
            "loss_db": digits(their.quality[name].mean - mine.quality[name].mean),
            "metric": name,
        }

    @cached_property
    def table(self) -> HeadTable:
        """Errors on calibration noise, each phase weighted by what its errors do to the whole answer."""
        if not self.how.table:
            return self._table("calibration").weighted(self._weights)
        errors = load_errors(
            Path(self.how.table), steps=self.steps, heads=len(self.heads.places), options=self.heads.width
        )
        phases = np.stack([errors[first : last + 1].sum(axis=0) for first, last in self.ranges])
        return HeadTable(self.ranges, self.heads.places, self.heads.options, phases, self.costs)

    def _table(self, split: str) -> HeadTable:
        """First-order errors of the answer, phase by phase, on a split; means as calibration has them."""
        errors = np.stack([moments.errors(self._shares) for moments in self._moments(split)])
        return HeadTable(self.ranges, self.heads.places, self._options, errors, self.costs)

    @cached_property
    def _shares(self) -> Floats:
        """What share of each option's result (N, O) is the mean of all values, the same in all phases."""
        if not self.how.means:
            return np.zeros_like(self.costs)
        shares = (Moments.best(self._moments("calibration")) / SHARE).round() * SHARE
        for row, options in zip(shares, self.heads.options, strict=True):
            row[: len(options)] *= [option == DENSE or find_pattern(option).mean == 0 for option in options]
        return np.asarray(shares)

    @cached_property
    def _options(self) -> tuple[tuple[str, ...], ...]:
        """The options of each head, with these shares."""
        return tuple(
            tuple(_with_mean(option, share) for option, share in zip(options, row, strict=False))
            for options, row in zip(self.heads.options, self._shares.tolist(), strict=True)
        )

    def _moments(self, split: str) -> Sequence[Moments]:
        """First-order errors of the answer in each phase, for any share of the mean."""
        if split not in self._known_moments:
            self._known_moments[split] = self._measured_moments(split)
        return self._known_moments[split]

    @cached_property
    def _known_moments(self) -> dict[str, Sequence[Moments]]:
        return {}

    def _measured_moments(self, split: str) -> Sequence[Moments]:
        calls, heads = self._calls(split), self.heads
        self.progress.start(f"errors of heads, {split}", len(calls))
        found = []
        for number, batches in enumerate(calls):
            told = f"{self.ranges} {number} {self.how.probes} {self.seed} {heads.fingerprint}"
            key = self._key(f"moments {split} {told}")
            known = self.journal.get(key)
            if not isinstance(known, list):
                moments = output_moments(
                    self._materialized,
                    batches,
                    heads,
                    guide=self.loop.guide if self.loop else lambda rows: rows,
                    probes=self.how.probes,
                    seed=self.seed,
                )
                known = [_rounded(part) for part in (moments.moved, moments.crossed, moments.means)]
                self.journal.put(key, known)
            parts = np.array([[[np.inf if e is None else e for e in row] for row in part] for part in known])
            found.append(Moments(*parts))
            self.progress.advance()
            self.deadline.check()
        return found

    @cached_property
    def _weights(self) -> Floats:
        """By how much a phase's errors move the whole answer: measured with that phase alone made sparse."""
        if len(self.ranges) == 1 or self.workload is None:
            return np.ones(len(self.ranges))
        table = self._table("calibration")
        weights = []
        self.progress.start("weights of phases", len(self.ranges))
        for number in range(len(self.ranges)):
            alone = replace(table, phases=table.phases[number : number + 1], errors=table.errors[number : number + 1])
            choice = np.zeros((len(self.ranges), len(self.heads.places)), dtype=np.int64)
            choice[number] = alone.exact(self._probe(alone))[0][0]
            graphs = self._graphs(table, choice)
            key = self._key(f"moved {served(graphs)}")
            moved = self.journal.get(key)
            if not isinstance(moved, float):
                outputs = self._outputs(graphs, "calibration")
                moved = float((outputs - self._dense).double().square().mean())
                self.journal.put(key, moved)
            weights.append(moved / max(table.error(choice), 1e-300))
            self.progress.advance()
            self.deadline.check()
        return np.array(weights)

    @cached_property
    def _dense(self) -> Tensor:
        """Whole answers with every head dense, on calibration noise."""
        dense = np.zeros((1, len(self.heads.places)), dtype=np.int64)
        return self._outputs(self._graphs(self._kept, dense), "calibration")


def _with_mean(option: str, share: float) -> str:
    """The pattern with this share of the mean."""
    if option == DENSE or share == 0:
        return option
    begun = option.removesuffix("()")
    return f"{begun[:-1]}, mean={share:.2g})" if begun.endswith(")") else f"{begun}(mean={share:.2g})"


def _rounded(part: Floats) -> list[list[float | None]]:
    return [[None if np.isinf(e) else float(f"{e:.9g}") for e in row] for row in part]


def _tilted(table: HeadTable, drift: float) -> HeadTable:
    """The table with errors that weigh the less the later they are: by ``exp(-drift)`` at the end of the loop."""
    middles = np.array([(first + last) / 2 for first, last in table.phases])
    return table.weighted(np.exp(-drift * middles / table.phases[-1][1])) if drift else table
