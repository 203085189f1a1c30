"""Choose which tokens a denoising loop computes at which step, for a share of the time that all of it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.spec import spec_of
from intarsia.ir.target import Target
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal, Quality, measure
from intarsia.search.roofline import predict
from intarsia.search.search import SearchResult
from intarsia.search.step_space import TOKENS, WHOLE, Policy, loop_seconds, space
from intarsia.search.trials import Deadline, Spent, digits
from intarsia.search.workload import Run, Split, Workload


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


class Bench(Protocol):
    """What runs policies and times their calls."""

    steps: int

    def seconds(self, caches: str, share: float) -> float:
        """What a call takes that computes a share of the tokens; 0 for share 0."""
        ...

    def dense(self) -> Run:
        """The unchanged network."""
        ...

    def policy(self, policy: Policy) -> Run:
        """The network of a policy; calls come step by step, one sample after the other."""
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


def search_steps(
    program: Program,
    target: Target,
    workload: Workload,
    bench: Bench,
    goal: Goal | None,
    *,
    how: StepSearch,
    settings: dict[str, object] | None = None,
    journal: Journal | None = None,
    budget: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The policy that is nearest to the dense loop's answers within a share of its time.

    Every policy of the space is run on calibration noise, the same for all; the best of each kind and the best of all
    go on to validation noise, where they are timed too, in turns with the dense loop. So the answer may be that whole
    steps do better than tokens.

    Args:
        bench: Runs the loop's network; ``seconds`` says what calls take on the target.
        goal: Kept on validation noise; None for the best that there is.
        budget: Seconds for the search; what is best by then is the answer.

    Raises:
        UsageError: No policy is as quick as ``how.budget`` asks.
        QualityError: The best policy misses the goal.
    """
    study = _Study(program, workload, bench, how, journal or Journal(), progress or Silent(), Deadline.after(budget))
    complete = True
    try:
        study.run()
    except Spent:
        complete = False
    finally:
        study.progress.finish()
    best = study.best()
    if best is None:
        raise UsageError(f"{program.graph.name}: --budget was spent before a policy was measured; give more")
    if goal is not None and best.quality is not None and not goal.met(best.quality):
        raise QualityError(
            f"{program.graph.name}: within {how.budget:.0%} of the dense loop's time the best policy, "
            f"{best.policy.notation}, reaches {goal.reached(best.quality)}; allow more time or less quality"
        )
    before = predict(program.graph, target)
    share = best.share if best.share is not None else best.predicted
    notes = {**(settings or {}), "strategy": str(how), "complete": complete, "steps": study.notes()}
    plan = Plan(program.graph.fingerprint, target.name, (Phase((Step(best.policy.notation),)),), notes)
    after = replace(before, seconds=before.seconds * share)
    return SearchResult(plan, after, before, best.quality, (), 1 - share, complete)


@dataclass
class _Study:
    program: Program
    workload: Workload
    bench: Bench
    how: StepSearch
    journal: Journal
    progress: Progress
    deadline: Deadline

    def __post_init__(self) -> None:
        self.tried: list[Tried] = []
        self._references: dict[Split, Tensor] = {}
        self._dense_seconds = 0.0

    def run(self) -> None:
        """Measure all policies on calibration noise, and the best on validation noise."""
        dense = self.bench.steps * self.bench.seconds("held", 1.0)
        policies = space(self.bench.steps, self.how.budget * dense, self.bench.seconds, held=self.how.held)
        if not policies:
            least = min(self.bench.seconds("held", 1.0), dense) * 3 / dense
            raise UsageError(
                f"{self.program.graph.name}: no policy takes {self.how.budget:.0%} of the dense loop's time; "
                f"three whole steps alone are {least:.0%} of it"
            )
        self.progress.start("policies", len(policies))
        for policy in policies:
            predicted = loop_seconds(policy, self.bench.steps, self.bench.seconds) / dense
            self.tried.append(Tried(policy, predicted, self._calibration(policy)))
            self.progress.advance(note=f"best so far {max(one.calibration for one in self.tried):.1f} dB")
            self.deadline.check()
        for number in self._finalists():
            self.tried[number] = self._validated(self.tried[number])
            self.deadline.check()

    def best(self) -> Tried | None:
        """The finalist of highest PSNR that keeps the budget; of those that were not timed, where none was."""
        timed = [one for one in self.tried if one.quality is not None and one.share is not None]
        within = [one for one in timed if one.share is not None and one.share <= self.how.budget * 1.02]
        if within or timed:
            return max(within or timed, key=lambda one: one.quality["psnr"].mean if one.quality else 0.0)
        return max(self.tried, key=lambda one: one.calibration, default=None)

    def notes(self) -> dict[str, object]:
        """What was learnt, as plain JSON values: finalists, and the best of every kind on calibration noise."""
        ranked = sorted(self.tried, key=lambda one: -one.calibration)
        return {
            "policies": len(self.tried),
            "finalists": [one.to_json() for one in ranked if one.quality is not None],
            "tried": [one.to_json() for one in ranked],
        }

    def _finalists(self) -> list[int]:
        """The best of all, and the best of each kind."""
        ranked = sorted(range(len(self.tried)), key=lambda number: -self.tried[number].calibration)
        firsts = [next((n for n in ranked if self.tried[n].policy.kind == kind), None) for kind in (TOKENS, WHOLE)]
        return list(dict.fromkeys([*ranked[: self.how.finalists], *(n for n in firsts if n is not None)]))

    def _calibration(self, policy: Policy) -> float:
        key = f"steps/{policy.notation}"
        known = self.journal.get(key)
        if isinstance(known, float):
            return known
        outputs = self.workload.outputs(self.bench.policy(policy), "calibration", Silent())
        found = measure(outputs, self._reference("calibration"))["psnr"].mean
        self.journal.put(key, found)
        return found

    def _validated(self, tried: Tried) -> Tried:
        """Quality and share of the time on validation noise, the dense loop timed in turn."""
        reference = self._reference("validation")
        outputs, ours = self._timed(self.bench.policy(tried.policy))
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
