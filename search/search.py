"""Choose: sensitivities, an exact solver for an error budget, and the largest budget that whole answers allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.search.journal import Journal
from intarsia.search.places import (
    Place,
    Price,
    Priced,
    answer,
    cost,
    open_places,
    price_places,
    refused_places,
    run_passes,
)
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal, Quality
from intarsia.search.roofline import Prediction, predict
from intarsia.search.sensitivity import Batch, sensitivities
from intarsia.search.solve import Option, Selection, solve
from intarsia.search.trials import Deadline, Judge, Spent, Trial, digits
from intarsia.search.work import sizes_of
from intarsia.search.workload import Workload


@dataclass(frozen=True)
class Effort:
    """How much a search may measure.

    Attributes:
        batches: Calibration calls that sensitivities are measured on, evenly spread over those of the workload.
        trials: Plans that are measured on whole answers, at most, the unchanged one included.
        tolerance: Ratio of two errors, one that meets the goal and one that misses it, which is near enough.
    """

    batches: int
    trials: int
    tolerance: float


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(batches=2, trials=5, tolerance=1.5),
    "default": Effort(batches=3, trials=8, tolerance=1.1),
    "full": Effort(batches=16, trials=16, tolerance=1.03),
}


@dataclass(frozen=True)
class SearchResult:
    """The plan that was chosen, and all that was learnt on the way.

    Attributes:
        plan: What to do; its notes hold what ``explain`` tells.
        predicted: What the planned graph is predicted to cost.
        baseline: What the graph as it came is predicted to cost.
        quality: The plan's quality on validation noise; None if the time was spent before it was measured.
        tried: All plans that were measured, in order.
        gain: Share of the cost that the plan saves; 0 for nothing.
        complete: Whether the search ended by itself rather than because its time was spent.
    """

    plan: Plan
    predicted: Prediction
    baseline: Prediction
    quality: Quality | None
    tried: tuple[Trial, ...]
    gain: float
    complete: bool


def search(
    program: Program,
    target: Target,
    passes: Sequence[Pass],
    workload: Workload,
    goal: Goal,
    *,
    minimize: str = "both",
    effort: str = "default",
    seed: int = 0,
    journal: Journal | None = None,
    budget: float | None = None,
    notations: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The cheapest plan found whose whole answers meet the goal on validation noise.

    Args:
        program: The graph with its weights.
        target: The machine that costs are predicted for.
        passes: In the order in which they run; those without choices simply run.
        workload: What sensitivities and quality are measured on; held-out noise is never asked for.
        goal: The quality to keep, met when the mean less one standard error reaches it.
        minimize: ``seconds``, ``bytes``, or ``both`` as shares of the baseline.
        effort: ``quick``, ``default`` or ``full``.
        seed: The workload's; kept in the plan's notes, the search itself draws nothing.
        journal: Measurements of an earlier run; they change the time that a search takes and not its answer.
        budget: Seconds after which the best plan so far is returned, marked as not complete.
        notations: What the plan calls the passes; ``str`` of each unless given.
        progress: Told what goes on.

    Raises:
        QualityError: The goal is missed even with every place left as it is.
        UsageError: Unknown effort or measure, a goal for a metric that does not apply, weights on the meta device.
    """
    if effort not in EFFORTS:
        raise UsageError(f"effort {effort!r} is unknown. Known: {', '.join(EFFORTS)}")
    if program.is_meta:
        raise UsageError(f"graph {program.graph.name}: a search measures, and the weights are on the meta device")
    told = Silent() if progress is None else progress
    deadline = Deadline.after(budget)
    judge = Judge(program, workload, Journal() if journal is None else journal, told, deadline)
    study = _Study(program, target, tuple(passes), workload, goal, minimize, EFFORTS[effort], judge, told, deadline)
    settings = {"goal": str(goal), "minimize": minimize, "effort": effort, "seed": seed}
    return study.result(settings, tuple(notations or map(str, passes)))


_Guess = Callable[[Trial, Trial], float]


@dataclass
class _Study:
    program: Program
    target: Target
    passes: tuple[Pass, ...]
    workload: Workload
    goal: Goal
    minimize: str
    effort: Effort
    judge: Judge
    progress: Progress
    deadline: Deadline
    trials: list[Trial] = field(default_factory=list[Trial])

    def result(self, settings: Mapping[str, object], notations: Sequence[str]) -> SearchResult:
        self._share(self.baseline)
        best: Trial | None
        try:
            best, complete = self._best(), True
        except Spent:
            best, complete = self._best_so_far, False
        finally:
            self.progress.finish()
        selection = best.selection if best else self._keep
        predicted = predict(self._graph(selection), self.target, self.sizes)
        answers = answer(self.places, selection)
        steps = tuple(Step(text, dict(answers.get(number, {}))) for number, text in enumerate(notations))
        notes = {**settings, "complete": complete, **self._notes(predicted, best)}
        return SearchResult(
            plan=Plan(self.program.graph.fingerprint, self.target.name, (Phase(steps),), notes),
            predicted=predicted,
            baseline=self.baseline,
            quality=best.quality if best else None,
            tried=tuple(self.trials),
            gain=1 - self._share(predicted) / self._share(self.baseline),
            complete=complete,
        )

    def _best(self) -> Trial:
        """The measured selection of largest error that meets the goal, between one that does and one that does not."""
        good = self._measured(self._keep)
        if not self.goal.met(good.quality):
            raise QualityError(
                f"quality {self.goal} cannot be reached: with every place left as it is, "
                f"{self.goal.reached(good.quality)}"
            )
        ends = (self._solve(self._gentlest), self._solve(math.inf))
        bad: Trial | None = None
        for end in dict.fromkeys(ends):
            if end == self._keep or bad is not None:
                continue
            found = self._measured(end)
            good, bad = (found, None) if _meets(found) else (good, found)
        if bad is None:
            return good
        same_side = 0
        while len(self.trials) < self.effort.trials and bad.error > good.error * self.effort.tolerance:
            selection = self._between(good, bad, _halve if same_side > 1 else _interpolate)
            if selection is None:
                break
            found = self._measured(selection)
            same_side = same_side + 1 if _meets(found) == _meets(self.trials[-2]) else 0
            good, bad = (found, bad) if _meets(found) else (good, found)
        return good

    @property
    def _gentlest(self) -> float:
        """The error of the option of least error at every place: often near what the goal allows, so a good start."""
        return math.fsum(min(errors[1:], default=0.0) for errors in self.errors) * (1 + 1e-9) if self.places else 0.0

    def _between(self, good: Trial, bad: Trial, guess: _Guess) -> Selection | None:
        """A selection of more error than ``good`` and less than ``bad``; None if the options allow none."""
        budget = guess(good, bad)
        while budget < bad.error * (1 - 1e-6):
            selection = self._solve(budget)
            if self._error(selection) > good.error:
                return selection
            budget = math.sqrt(budget * bad.error)
        return None

    def _measured(self, selection: Selection) -> Trial:
        graph = self._graph(selection)
        quality = self.judge.quality(graph)
        predicted = predict(graph, self.target, self.sizes)
        margin = self.goal.confidence_margin(quality)
        trial = Trial(selection, self._error(selection), quality, margin, predicted.seconds, predicted.bytes)
        self.trials.append(trial)
        self.progress.start("plans", self.effort.trials)
        self.progress.advance(len(self.trials), note=self._standing())
        self.deadline.check()
        return trial

    @property
    def _best_so_far(self) -> Trial | None:
        return max(filter(_meets, self.trials), key=lambda trial: trial.error, default=None)

    def _standing(self) -> str:
        best = self._best_so_far
        if best is None:
            return "none meets the goal yet"
        return f"best so far {best.bytes / max(self.baseline.bytes, 1):.0%} of the bytes, {best.quality}"

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return sizes_of(self.program.graph, self.workload.calibration[0]) if self.program.graph.sizes else {}

    @cached_property
    def places(self) -> tuple[Place, ...]:
        return open_places(self.passes, self.program.graph, self.target)

    @cached_property
    def baseline(self) -> Prediction:
        return predict(self.program.graph, self.target, self.sizes)

    @cached_property
    def prices(self) -> tuple[tuple[Price, ...], ...]:
        """What the graph is predicted to cost with each option at each place alone."""
        return price_places(self.passes, self.program.graph, self.target, self.places, self.sizes)

    @cached_property
    def errors(self) -> tuple[tuple[float, ...], ...]:
        """Relative squared error of the outputs with each option at each place alone."""
        base = run_passes(self.passes, self.program.graph, self.target, {})
        options = [(place, option) for place in self.places for option in place.options[1:]]
        batches = _spread(self.workload.calibration, self.effort.batches)
        self.progress.start("sensitivity", len(options) * len(batches))
        found = iter(
            sensitivities(
                Program(base, self.program.weights),
                [partial(self._changed, place, option) for place, option in options],
                batches,
                journal=self.judge.journal,
                measured=self._advance,
            )
        )
        return tuple((0.0, *(next(found) for _ in place.options[1:])) for place in self.places)

    @cached_property
    def table(self) -> tuple[tuple[Option, ...], ...]:
        """Cost beyond the first option's, and error, of each option at each place."""
        rows: list[tuple[Option, ...]] = []
        for prices, errors in zip(self.prices, self.errors, strict=True):
            shares = [self._share(price) for price in prices]
            rows.append(tuple(Option(s - shares[0], e) for s, e in zip(shares, errors, strict=True)))
        return tuple(rows)

    @property
    def _keep(self) -> Selection:
        return (0,) * len(self.places)

    def _solve(self, budget: float) -> Selection:
        return solve(self.table, budget)

    def _error(self, selection: Selection) -> float:
        if not any(selection):
            return 0.0
        return math.fsum(errors[number] for errors, number in zip(self.errors, selection, strict=True))

    def _graph(self, selection: Selection) -> Graph:
        return run_passes(self.passes, self.program.graph, self.target, answer(self.places, selection))

    def _changed(self, place: Place, option: str) -> Graph:
        return run_passes(self.passes, self.program.graph, self.target, {place.step: {place.name: option}})

    def _share(self, predicted: Priced) -> float:
        return cost(predicted, self.baseline, minimize=self.minimize)

    def _advance(self) -> None:
        self.progress.advance()
        self.deadline.check()

    def _notes(self, predicted: Prediction, best: Trial | None) -> dict[str, object]:
        """What the search knew, as plain JSON values."""
        measured = "errors" in self.__dict__
        return {
            "baseline": {"seconds": digits(self.baseline.seconds), "bytes": self.baseline.bytes},
            "predicted": {"seconds": digits(predicted.seconds), "bytes": predicted.bytes},
            "error": digits(best.error) if best else None,
            "quality": best.to_json()["quality"] if best else None,
            "tried": [trial.to_json() for trial in self.trials],
            "places": [self._place_note(number) for number in range(len(self.places))] if measured else [],
            "refused": [
                {"step": step, "place": place, "why": why}
                for step, place, why in refused_places(self.passes, self.program.graph, self.target)
            ],
        }

    def _place_note(self, number: int) -> dict[str, object]:
        place, prices, errors = self.places[number], self.prices[number], self.errors[number]
        options = [
            {
                "option": option,
                "error": digits(error),
                "seconds": digits(price.seconds - prices[0].seconds),
                "bytes": price.bytes - prices[0].bytes,
            }
            for option, error, price in zip(place.options, errors, prices, strict=True)
        ]
        return {"step": place.step, "place": place.name, "options": options}


def _meets(trial: Trial) -> bool:
    return trial.margin >= 0


def _interpolate(good: Trial, bad: Trial) -> float:
    """The error at which the margin is expected to be 0.1 dB: margins are nearly straight over the error's logarithm.

    Where nothing but the unchanged graph is known to be good, a tenth of the squared error gains 10 dB.
    """
    if good.error == 0:
        return float(bad.error * 10 ** ((bad.margin - 0.1) / 10))
    share = (good.margin - 0.1) / (good.margin - bad.margin)
    return float(good.error * (bad.error / good.error) ** min(max(share, 0.1), 0.9))


def _halve(good: Trial, bad: Trial) -> float:
    return math.sqrt(good.error * bad.error) if good.error else _interpolate(good, bad)


def _spread(batches: Sequence[Batch], count: int) -> Sequence[Batch]:
    """At most ``count`` of the batches, evenly spread over all, in order."""
    if len(batches) <= count:
        return batches
    return [batches[(2 * number + 1) * len(batches) // (2 * count)] for number in range(count)]
