"""What is measured of the policies of a loop's steps, and which of them is best."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.program import Program
from intarsia.ir.spec import spec_of
from intarsia.passes.step_caching import StepCaching, TeaCache
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Quality, measure
from intarsia.search.step_space import (
    KINDS,
    Allocated,
    Cached,
    CachedSeconds,
    Policy,
    loop_seconds,
    quickest,
    rules,
    space,
    thresholds,
)
from intarsia.search.trials import Deadline, digits
from intarsia.search.workload import Run, Split, Workload

TOLERANCE = 1.02
"""Measured time over the budget with which a policy still keeps it: as much as a clock is off."""


@dataclass(frozen=True)
class StepSearch:
    """How the steps of a loop are searched; ``steps(budget=0.5)``.

    Attributes:
        budget: Share of the dense loop's seconds that may be taken.
        finalists: Policies that are measured on validation noise, the best of each kind among them.
        held: Whether to look at what the paper has, held velocities and caches, alone.
    """

    budget: float = 0.5
    finalists: int = 5
    held: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise ValueError(f"budget is {self.budget}; it is a share of the dense loop's time, between 0 and 1")
        if self.finalists < 1:
            raise ValueError("finalists is at least 1")

    def __str__(self) -> str:
        return str(spec_of("steps", self))


class CachedRun(Protocol):
    """The network of a caching rule, which keeps for each loop whether its steps were computed."""

    @property
    def loops(self) -> Sequence[Sequence[bool]]:
        """Whether each step was computed, of each loop so far."""
        ...

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs; calls come step by step, one sample after the other."""
        ...


class Bench(Protocol):
    """What runs policies and times their calls."""

    steps: int

    def dense_seconds(self) -> float:
        """What a call of the unchanged network takes."""
        ...

    def seconds(self, caches: str, share: float) -> float:
        """What a call takes that computes a share of the tokens; 0 for share 0."""
        ...

    def cached_seconds(self, kind: type[StepCaching]) -> CachedSeconds:
        """What steps of a caching rule take; Unsupported if the network cannot be cut for it."""
        ...

    def dense(self) -> Run:
        """The unchanged network."""
        ...

    def allocated(self, policy: Allocated) -> Run:
        """The network of a policy; calls come step by step, one sample after the other."""
        ...

    def cached(self, rule: StepCaching) -> CachedRun:
        """The network of a caching rule."""
        ...

    def coefficients(self, workload: Workload) -> tuple[float, ...]:
        """TeaCache's polynomial for this network, from its loop on calibration noise."""
        ...


@dataclass(frozen=True)
class Tried:
    """A policy and what was measured of it.

    Attributes:
        predicted: Share of the dense loop's seconds, from the seconds of single calls.
        calibration: PSNR in dB on calibration noise.
        quality: On validation noise, of a finalist.
        share: Share of the dense loop's seconds, measured on validation noise, of a finalist.
    """

    policy: Policy
    predicted: float
    calibration: float
    quality: Quality | None = None
    share: float | None = None

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        facts: dict[str, object] = {"kind": self.policy.kind, "policy": self.policy.notation}
        facts |= {"predicted": digits(self.predicted), "calibration_psnr": digits(self.calibration)}
        if self.quality is not None and self.share is not None:
            facts |= {"validation_psnr": digits(self.quality["psnr"].mean), "share": digits(self.share)}
        return facts


@dataclass
class Study:
    """A search as it goes on; its arguments are those of ``search_steps``.

    Attributes:
        tried: Policies that were measured on calibration noise.
        refused: Kinds of policies that the network does not take, and why.
    """

    program: Program
    workload: Workload
    bench: Bench
    how: StepSearch
    journal: Journal
    progress: Progress
    deadline: Deadline

    def __post_init__(self) -> None:
        self.tried: list[Tried] = []
        self.refused: dict[str, str] = {}
        self._references: dict[Split, Tensor] = {}

    def run(self) -> None:
        """Measure all policies on calibration noise, and the best on validation noise."""
        dense = self.bench.steps * self.bench.dense_seconds()
        limit = self.how.budget * dense
        policies = space(self.bench.steps, limit, self.bench.seconds, held=self.how.held)
        self.progress.start("policies", len(policies))
        for policy in policies:
            predicted = loop_seconds(policy, self.bench.steps, self.bench.seconds) / dense
            self.tried.append(Tried(policy, predicted, self._calibration(policy)))
            self._advance()
        for kind in () if self.how.held else KINDS:
            self._cached(kind, limit, dense)
        if not self.tried:
            least = quickest(self.bench.steps, self.bench.seconds) / dense
            raise UsageError(
                f"{self.program.graph.name}: no policy takes {self.how.budget:.1%} of the dense loop's time; the "
                f"quickest, one step of {self.bench.steps}, takes {least:.1%}: give a larger budget"
            )
        for number in self._finalists():
            self.tried[number] = self._validated(self.tried[number])
            self.deadline.check()

    def _advance(self) -> None:
        best = max((one.calibration for one in self.tried), default=None)
        self.progress.advance(note="nothing so far" if best is None else f"best so far {best:.1f} dB")
        self.deadline.check()

    def _cached(self, kind: type[StepCaching], limit: float, dense: float) -> None:
        """Look for thresholds of a kind of rules that keep the limit."""
        try:
            seconds = self.bench.cached_seconds(kind)
        except Unsupported as error:
            self.refused[kind.name] = str(error)
            return
        open_ = list(self._rules(kind, limit, seconds))
        self.progress.start(kind.name, len(open_))
        first = kind().threshold
        for rule in open_:

            def taken(value: float, rule: StepCaching = rule) -> float:
                self.deadline.check()
                return seconds.loop(self.bench.steps, self._watched(replace(rule, threshold=value))[1])

            found = thresholds(taken, limit, first=first)
            for made in (replace(rule, threshold=value) for value in found):
                calibration, share = self._watched(made)
                self.tried.append(Tried(Cached(made), seconds.loop(self.bench.steps, share) / dense, calibration))
            first = found[0] if found else first
            self._advance()

    def _rules(self, kind: type[StepCaching], limit: float, seconds: CachedSeconds) -> Iterator[StepCaching]:
        """Rules of a kind without thresholds: TeaCache as it is, and with the polynomial of this network."""
        for rule in rules(self.bench.steps, limit, seconds, kind):
            yield rule
            if isinstance(rule, TeaCache):
                yield replace(rule, coefficients=self._coefficients())

    def _coefficients(self) -> tuple[float, ...]:
        key = "steps/teacache/coefficients"
        known = self.journal.get(key)
        if not isinstance(known, list):
            known = list(self.bench.coefficients(self.workload))
            self.journal.put(key, known)
        return tuple(known)

    def _watched(self, rule: StepCaching) -> tuple[float, float]:
        """PSNR on calibration noise, and the share of all steps that were computed."""
        key = f"steps/{rule}"
        known = self.journal.get(key)
        if isinstance(known, list):
            return known[0], known[1]
        run = self.bench.cached(rule)
        outputs = self.workload.outputs(run, "calibration", Silent())
        every = [computed for loop in run.loops for computed in loop]
        found = measure(outputs, self._reference("calibration"))["psnr"].mean, sum(every) / len(every)
        self.journal.put(key, list(found))
        return found

    def best(self) -> Tried | None:
        """The finalist of highest PSNR that keeps the budget, or the quickest; the best so far where none was timed."""
        timed = [(one, one.quality["psnr"].mean, one.share) for one in self.tried if one.quality and one.share]
        if within := [one for one in timed if one[2] <= self.how.budget * TOLERANCE]:
            return max(within, key=lambda one: one[1])[0]
        if timed:
            return min(timed, key=lambda one: one[2])[0]
        return max(self.tried, key=lambda one: one.calibration, default=None)

    def notes(self) -> dict[str, object]:
        """What was learnt, as plain JSON values: finalists, and the best of every kind on calibration noise."""
        ranked = sorted(self.tried, key=lambda one: -one.calibration)
        return {
            "policies": len(self.tried),
            "finalists": [one.to_json() for one in ranked if one.quality is not None],
            "tried": [one.to_json() for one in ranked],
            "refused": self.refused,
        }

    def _finalists(self) -> list[int]:
        """The best of all, and the best of each kind."""
        ranked = sorted(range(len(self.tried)), key=lambda number: -self.tried[number].calibration)
        firsts = {self.tried[number].policy.kind: number for number in reversed(ranked)}
        return list(dict.fromkeys([*ranked[: self.how.finalists], *firsts.values()]))

    def _calibration(self, policy: Allocated) -> float:
        key = f"steps/{policy.notation}"
        known = self.journal.get(key)
        if isinstance(known, float):
            return known
        outputs = self.workload.outputs(self.bench.allocated(policy), "calibration", Silent())
        found = measure(outputs, self._reference("calibration"))["psnr"].mean
        self.journal.put(key, found)
        return found

    def _validated(self, tried: Tried) -> Tried:
        """Quality and share of the time on validation noise, the dense loop timed in turn."""
        reference = self._reference("validation")
        policy = tried.policy
        run = self.bench.cached(policy.rule) if isinstance(policy, Cached) else self.bench.allocated(policy)
        outputs, ours = self._timed(run)
        _, dense = self._timed(self.bench.dense())
        return replace(tried, quality=measure(outputs, reference), share=ours / dense)

    def _timed(self, run: Run) -> tuple[Tensor, float]:
        start = time.perf_counter()
        outputs = self.workload.outputs(run, "validation", self.progress)
        return outputs, time.perf_counter() - start

    def _reference(self, split: Split) -> Tensor:
        if split not in self._references:
            self._references[split] = self.workload.outputs(self.bench.dense(), split, self.progress)
        return self._references[split]
