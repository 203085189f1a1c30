"""Choose what every attention head computes, phase by phase, under a budget or a quality goal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intarsia.ir.errors import QualityError, Unsupported, UsageError
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.passes.attention_sites import why_none
from intarsia.passes.base import Pass
from intarsia.passes.sparse_attention import DENSE, SparseAttention
from intarsia.search.head_errors import Heads, column_mass, output_errors
from intarsia.search.head_policy import SCORES, Policy
from intarsia.search.head_table import Choice, Floats, HeadTable, load_errors
from intarsia.search.journal import Journal
from intarsia.search.places import refused_places, run_passes
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal, Quality, measure
from intarsia.search.roofline import Prediction, predict
from intarsia.search.search import EFFORTS, SearchResult
from intarsia.search.trials import Deadline, Spent, Trial, digits
from intarsia.search.work import sizes_of
from intarsia.search.workload import Loop, Run, Workload

CHOOSE = ("exact", "greedy")
PROBE_DENSITY = 0.25
"""Share of the pairs at which a phase alone is tried, to see what its errors do to the whole answer."""

NOTED = 20_000
"""Heads times phases up to which a plan tells what every option would lose and cost."""


@dataclass(frozen=True)
class HeadSearch:
    """How patterns of heads are searched; ``heads(choose='greedy', score='mse')``.

    Attributes:
        choose: ``exact``: errors of the whole answer for every head, option and phase, and an integer program.
            ``greedy``: Sparse-vDiT's algorithm 1, closed loop, head by head.
        phases: Into how many equal ranges the steps are cut, each with patterns of its own; 0 for every step.
        density: Share of all pairs of queries and keys that may be computed, in the mean over heads and steps; 0 if
            time or quality decides.
        seconds: Predicted time of one call, in the mean over steps, that may be taken; 0 if density or quality decides.
        probes: Random vectors for each calibration call, for ``exact``.
        score: ``relative`` or, as in the paper, ``mse``, for ``greedy``.
        epsilon: A head stays dense where every loss exceeds this, for ``greedy``; 0 finds the one that fits.
        weight: Of the cost in the loss, lambda in the paper.
        rows: Queries of a head that ``greedy`` looks at; 0 for all.
        transfer: Whether the choice is compared with the one that other prompts and noise would have led to.
        table: Errors of all options in place of measured ones: a safetensors file, key ``errors`` (steps, heads,
            options); nothing is run then, and the model needs no weights.
        steps: Steps of the loop, where a model on the meta device with a ``table`` has no sampler that says it.
    """

    choose: str = "exact"
    phases: int = 8
    density: float = 0.0
    seconds: float = 0.0
    probes: int = 4
    score: str = "relative"
    epsilon: float = 0.0
    weight: float = 0.5
    rows: int = 64
    transfer: bool = True
    table: str = ""
    steps: int = 0

    def __post_init__(self) -> None:
        if self.choose not in CHOOSE:
            raise ValueError(f"choose is {self.choose!r}; it is one of {', '.join(CHOOSE)}")
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}; it is one of {', '.join(SCORES)}")
        if not 0 <= self.density <= 1:
            raise ValueError(f"density is {self.density}; it is a share of all pairs, above 0 and at most 1")
        if self.density and self.seconds:
            raise ValueError("density and seconds are both given; one budget decides")
        if min(self.phases, self.rows, self.steps) < 0 or self.probes < 1:
            raise ValueError("phases, rows and steps are at least 0, probes at least 1")
        if min(self.seconds, self.epsilon, self.weight) < 0:
            raise ValueError("seconds, epsilon and weight are at least 0")
        if self.table and self.choose == "greedy":
            raise ValueError("table is given; greedy measures in closed loop and takes none")


def search_heads(
    program: Program,
    target: Target,
    passes: Sequence[Pass],
    workload: Workload | None,
    goal: Goal | None,
    *,
    how: HeadSearch,
    effort: str = "default",
    seed: int = 0,
    journal: Journal | None = None,
    budget: float | None = None,
    notations: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The patterns of all heads that lose least within a budget, or that are cheapest within a goal.

    Args:
        program: The graph with its weights; on the meta device only with ``how.table``.
        passes: ``sparse-attention`` first; those behind it, such as ``fuse-heads``, run without a choice.
        workload: What errors and quality are measured on; None only with ``how.table``.
        goal: Kept on validation noise; None where ``how`` gives a budget.
        budget: Seconds after which the best plan so far is returned, marked as not complete.

    Raises:
        UsageError: Passes or goals that do not go together, or a budget below the cheapest patterns.
        Unsupported: No self-attention over video tokens.
        QualityError: The goal is missed with every head dense.
    """
    if not passes or not isinstance(passes[0], SparseAttention):
        raise UsageError("strategy heads: the first --pass is sparse-attention; others may follow it")
    if goal is None and not (how.density or how.seconds or how.epsilon):
        raise UsageError("strategy heads: give --quality, or a budget as heads(density=0.25) or heads(seconds=0.5)")
    if effort not in EFFORTS:
        raise UsageError(f"effort {effort!r} is unknown. Known: {', '.join(EFFORTS)}")
    if program.is_meta and not how.table:
        raise UsageError(f"graph {program.graph.name}: a search measures, and the weights are on the meta device")
    reason = why_none(program.graph) if not passes[0].tokens else None
    if reason:
        raise Unsupported(f"strategy heads: {reason}")
    told = Silent() if progress is None else progress
    study = _Study(program, target, tuple(passes), workload, goal, how, effort, seed, journal or Journal(), told)
    study.deadline = Deadline.after(budget)
    return study.result(tuple(notations or map(str, passes)))


@dataclass
class _Study:
    program: Program
    target: Target
    passes: tuple[Pass, ...]
    workload: Workload | None
    goal: Goal | None
    how: HeadSearch
    effort: str
    seed: int
    journal: Journal
    progress: Progress
    deadline: Deadline = field(default_factory=Deadline)
    trials: list[Trial] = field(default_factory=list[Trial])
    facts: dict[str, object] = field(default_factory=dict[str, object])

    def result(self, notations: Sequence[str]) -> SearchResult:
        complete, decided = True, None
        try:
            decided = self._greedy() if self.how.choose == "greedy" else self._exact()
        except Spent:
            complete, decided = False, self._best
        finally:
            self.progress.finish()
        table, choice = decided if decided else (self._kept, np.zeros((1, len(self.heads.places)), dtype=np.int64))
        trial = next((t for t in self.trials if t.selection == tuple(choice.reshape(-1).tolist())), None)
        predicted = self._predicted(table, choice)
        notes = {
            "strategy": str(self.how),
            "goal": str(self.goal) if self.goal else None,
            "effort": self.effort,
            "seed": self.seed,
            "complete": complete,
            **self._notes(table, choice, predicted, trial),
        }
        plan = Plan(self.program.graph.fingerprint, self.target.name, self._phases(table, choice, notations), notes)
        return SearchResult(
            plan=plan,
            predicted=predicted,
            baseline=self.baseline,
            quality=trial.quality if trial else None,
            tried=tuple(self.trials),
            gain=1 - predicted.seconds / self.baseline.seconds,
            complete=complete,
        )

    # Exact: a table of errors of the whole answer, and an integer program.

    def _exact(self) -> tuple[HeadTable, Choice]:
        table = self.table
        if self.how.density or self.how.seconds:
            choice, self.facts["gap"] = table.exact(self._budget(table))
            if self.workload is not None:
                self._measured(table, choice)
        else:
            choice = self._within_goal(table)
        if self.how.transfer and self.effort != "quick" and self.workload is not None and self.trials:
            self.facts["transfer"] = self._transfer(table, choice)
        return table, choice

    def _budget(self, table: HeadTable) -> float:
        if self.how.density:
            return self.how.density
        left = self.how.seconds - (self.baseline.seconds - table.dense)
        if left <= 0:
            raise UsageError(
                f"strategy heads: all but self-attention is predicted to take "
                f"{self.baseline.seconds - table.dense:.3g} s of the {self.how.seconds:g} s that are asked for"
            )
        return left

    def _within_goal(self, table: HeadTable) -> Choice:
        """The cheapest choice found that meets the goal: a bisection over the logarithm of the budget."""
        assert self.goal is not None
        good = np.zeros((len(table.phases), len(table.places)), dtype=np.int64)
        self._measured(table, good)
        if not self._meets():
            reached = self.goal.reached(self.trials[-1].quality)
            raise QualityError(f"quality {self.goal} cannot be reached: with every head dense, {reached}")
        low, high = max(table.cheapest, table.dense * 0.01), table.dense
        for number in range(EFFORTS[self.effort].trials - 1):
            middle = math.sqrt(low * high)
            if number == 0:
                middle = max(table.dense * PROBE_DENSITY, low)
            choice, gap = table.exact(middle)
            self._measured(table, choice)
            if self._meets():
                good, high, self.facts["gap"] = choice, table.cost(choice), gap
            else:
                low = middle
            if high / low < EFFORTS[self.effort].tolerance ** 0.5:
                break
        return good

    def _transfer(self, table: HeadTable, choice: Choice) -> dict[str, object]:
        """How far the choice serves prompts and noise that it was not made on: what those would have chosen."""
        other = self._table("validation", table.options).weighted(self._weights)
        theirs, _ = other.exact(table.cost(choice) * (1 + 1e-9))
        mine = next(t for t in self.trials if t.selection == tuple(choice.reshape(-1).tolist()))
        their = self._measured(table, theirs)
        name = next(iter(mine.quality.metrics))
        return {
            "agreement": digits(float((choice == theirs).mean())),
            "loss_db": digits(their.quality[name].mean - mine.quality[name].mean),
            "metric": name,
        }

    # Greedy: the closed loop of the paper.

    def _greedy(self) -> tuple[HeadTable, Choice]:
        if self.how.epsilon:
            table, choice = self._policy(self.how.epsilon)
            self._measured(table, choice)
            return table, choice
        if self.goal is not None and not (self.how.density or self.how.seconds):
            dense = replace(self._kept, phases=self.ranges)
            self._measured(dense, np.zeros((len(self.ranges), len(self.heads.places)), dtype=np.int64))
            if not self._meets():
                reached = self.goal.reached(self.trials[-1].quality)
                raise QualityError(f"quality {self.goal} cannot be reached: with every head dense, {reached}")
        return self._bisected()

    def _bisected(self) -> tuple[HeadTable, Choice]:
        """The policy of the largest epsilon that keeps the goal, or of the smallest that keeps the budget."""
        low, high = 1e-4, 1e4
        best: tuple[HeadTable, Choice] | None = None
        for _ in range(EFFORTS[self.effort].trials):
            epsilon = math.sqrt(low * high)
            table, choice = self._policy(epsilon)
            if self.how.density or self.how.seconds:
                enough = table.cost(choice) <= self._budget(table)
                low, high = (low, epsilon) if enough else (epsilon, high)
                best = (table, choice) if enough else best
            else:
                self._measured(table, choice)
                low, high = (epsilon, high) if self._meets() else (low, epsilon)
                best = (table, choice) if self._meets() else best
            self.facts["epsilon"] = digits(high if self.how.density or self.how.seconds else low)
        if best is None and (self.how.density or self.how.seconds):
            raise UsageError(f"strategy heads: no epsilon up to 1e4 keeps the budget; {self.how} asks for too little")
        if best is None:
            return replace(self._kept, phases=self.ranges), np.zeros((len(self.ranges), len(self.heads.places)), int)
        if self.how.density or self.how.seconds:
            self._measured(*best)
        return best

    def _policy(self, epsilon: float) -> tuple[HeadTable, Choice]:
        """What the closed loop decides with this epsilon, and the errors that it saw."""
        relative = self.costs / np.maximum(self.costs[:, :1], 1e-300)
        policy = Policy(
            program=self._materialized,
            heads=self.heads,
            costs=relative,
            score=self.how.score,
            epsilon=epsilon,
            weight=self.how.weight,
            rows=self.how.rows,
            journal=self.journal,
            key=self._key(f"policy {self.how.score} {epsilon:.6g} {self.how.weight:g} {self.how.rows}"),
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

    # What both need.

    @cached_property
    def loop(self) -> Loop | None:
        return self.workload.loop if self.workload else None

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last step of every phase."""
        steps = self.loop.steps if self.loop else self.how.steps or 1
        count = min(self.how.phases or steps, steps)
        borders = [steps * number // count for number in range(count + 1)]
        return tuple((first, end - 1) for first, end in pairwise(borders))

    @cached_property
    def heads(self) -> Heads:
        """All heads, stripes with the columns that the calibration calls look at."""
        sparse = self.passes[0]
        assert isinstance(sparse, SparseAttention)
        sizes = self.sizes
        found = Heads.of(sparse, self.program.graph, self.target, sizes)
        if self.how.table or self.workload is None:
            return found
        key = self._key("columns")
        known = self.journal.get(key)
        if isinstance(known, list):
            return replace(found, options=tuple(map(tuple, known)))
        self.progress.start("columns of stripes", None)
        made = found.calibrated(column_mass(self._materialized, self._all_calls("calibration"), found))
        self.journal.put(key, [list(options) for options in made.options])
        return made

    @cached_property
    def costs(self) -> Floats:
        return self.heads.costs("seconds" if self.how.seconds else "density")

    @property
    def _kept(self) -> HeadTable:
        """A table that knows nothing: every option as good as dense."""
        errors = np.zeros((1, len(self.heads.places), self.heads.width))
        return HeadTable(self.ranges[:1], self.heads.places, self.heads.options, errors, self.costs)

    @cached_property
    def table(self) -> HeadTable:
        """Errors on calibration noise, each phase weighted by what its errors do to the whole answer."""
        if not self.how.table:
            return self._table("calibration", self.heads.options).weighted(self._weights)
        steps = self.loop.steps if self.loop else self.how.steps or 1
        errors = load_errors(Path(self.how.table), steps=steps, heads=len(self.heads.places), options=self.heads.width)
        phases = np.stack([errors[first : last + 1].sum(axis=0) for first, last in self.ranges])
        return HeadTable(self.ranges, self.heads.places, self.heads.options, phases, self.costs)

    def _table(self, split: str, options: tuple[tuple[str, ...], ...]) -> HeadTable:
        """First-order errors of the answer, phase by phase."""
        calls = self._calls(split)
        self.progress.start(f"errors of heads, {split}", len(calls))
        errors = []
        for number, batches in enumerate(calls):
            key = self._key(f"errors {split} {number} {self.how.phases} {self.how.probes}")
            known = self.journal.get(key)
            if not isinstance(known, list):
                found = output_errors(
                    self._materialized,
                    batches,
                    self.heads,
                    guide=self.loop.guide if self.loop else lambda rows: rows,
                    probes=self.how.probes,
                    seed=self.seed,
                )
                known = [[None if np.isinf(e) else float(f"{e:.6g}") for e in row] for row in found]
                self.journal.put(key, known)
            errors.append(np.array([[np.inf if e is None else e for e in row] for row in known], dtype=np.float64))
            self.progress.advance()
            self.deadline.check()
        return HeadTable(self.ranges, self.heads.places, options, np.stack(errors), self.costs)

    @cached_property
    def _weights(self) -> Floats:
        """By how much a phase's errors move the whole answer: measured with that phase alone made sparse."""
        if len(self.ranges) == 1 or self.workload is None:
            return np.ones(len(self.ranges))
        table = self._table("calibration", self.heads.options)
        weights = []
        self.progress.start("weights of phases", len(self.ranges))
        for number in range(len(self.ranges)):
            alone = replace(table, phases=table.phases[number : number + 1], errors=table.errors[number : number + 1])
            budget = max(alone.dense * PROBE_DENSITY, alone.cheapest)
            choice = np.zeros((len(self.ranges), len(self.heads.places)), dtype=np.int64)
            choice[number], _ = (part[0] if isinstance(part, np.ndarray) else part for part in alone.exact(budget))
            key = self._key(f"weight {number} {self.how.phases} {self.how.probes}")
            moved = self.journal.get(key)
            if not isinstance(moved, float):
                outputs = self._outputs(table, choice, "calibration")
                moved = float((outputs - self._reference("calibration")).double().square().mean())
                self.journal.put(key, moved)
            weights.append(moved / max(table.error(choice), 1e-300))
            self.progress.advance()
            self.deadline.check()
        return np.array(weights)

    def _calls(self, split: str) -> Sequence[Sequence[tuple[Tensor, ...]]]:
        """The unchanged network's calls in the middle of each phase."""
        if split not in self._recorded:
            assert self.workload is not None
            if self.loop is None:
                self._recorded[split] = [self.workload.calibration]
            else:
                middles = [(first + last) // 2 for first, last in self.ranges]
                self._recorded[split] = self.loop.record(
                    "calibration" if split == "calibration" else "validation", middles, self.progress
                )
        return self._recorded[split]

    @cached_property
    def _recorded(self) -> dict[str, Sequence[Sequence[tuple[Tensor, ...]]]]:
        return {}

    def _all_calls(self, split: str) -> list[tuple[Tensor, ...]]:
        return [batch for batches in self._calls(split) for batch in batches]

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        if not self.program.graph.sizes or self.workload is None:
            return {size.name: max(size.minimum, 2) for size in self.program.graph.sizes}
        return sizes_of(self.program.graph, self.workload.calibration[0])

    @cached_property
    def baseline(self) -> Prediction:
        return predict(self.program.graph, self.target, self.sizes)

    @cached_property
    def _materialized(self) -> Program:
        return materialize(self.program)

    def _predicted(self, table: HeadTable, choice: Choice) -> Prediction:
        """The baseline with what the roofline says that the patterns save of self-attention."""
        seconds = replace(table, costs=self.heads.costs("seconds"))
        saved = seconds.dense - seconds.cost(choice)
        return replace(self.baseline, seconds=self.baseline.seconds - saved)

    def _answers(self, table: HeadTable, row: Choice) -> dict[str, str]:
        picked = zip(table.places, table.options, row.tolist(), strict=True)
        return {place: options[number] for place, options, number in picked if options[number] != DENSE}

    def _phases(self, table: HeadTable, choice: Choice, notations: Sequence[str]) -> tuple[Phase, ...]:
        """The plan's phases; neighbours that decide alike are one."""
        found: list[Phase] = []
        for (first, last), row in zip(table.phases, choice, strict=True):
            answers: list[Mapping[str, str]] = [self._answers(table, row), *({} for _ in notations[1:])]
            steps = tuple(Step(text, dict(chosen)) for text, chosen in zip(notations, answers, strict=True))
            if found and found[-1].steps == steps:
                found[-1] = replace(found[-1], last=last)
            else:
                found.append(Phase(steps, first, last))
        return (replace(found[0], last=None),) if len(found) == 1 else tuple(found)

    def _measured(self, table: HeadTable, choice: Choice) -> Trial:
        """The choice's whole answers on validation noise."""
        selection = tuple(choice.reshape(-1).tolist())
        known = next((trial for trial in self.trials if trial.selection == selection), None)
        if known is not None:
            return known
        quality = self._quality(table, choice)
        margin = self.goal.confidence_margin(quality) if self.goal else 0.0
        seconds = self._predicted(table, choice).seconds
        trial = Trial(selection, table.error(choice), quality, margin, seconds, self.baseline.bytes)
        self.trials.append(trial)
        self._by_selection[selection] = (table, choice)
        self.progress.start("plans", EFFORTS[self.effort].trials)
        self.progress.advance(len(self.trials), note=f"attention at {table.cost(choice) / table.dense:.0%}: {quality}")
        self.deadline.check()
        return trial

    @cached_property
    def _by_selection(self) -> dict[tuple[int, ...], tuple[HeadTable, Choice]]:
        return {}

    @property
    def _best(self) -> tuple[HeadTable, Choice] | None:
        """The fastest that was measured and meets the goal."""
        met = [trial for trial in self.trials if trial.margin >= 0]
        best = min(met, key=lambda trial: trial.seconds, default=None)
        return self._by_selection[best.selection] if best else None

    def _meets(self) -> bool:
        return self.trials[-1].margin >= 0

    def _quality(self, table: HeadTable, choice: Choice) -> Quality:
        digest = hashlib.sha256(repr([self._answers(table, row) for row in choice]).encode()).hexdigest()[:16]
        key = self._key(f"quality {table.phases} {digest}")
        known = self.journal.get(key)
        if isinstance(known, dict):
            return Quality.from_json(known)
        found = measure(self._outputs(table, choice, "validation"), self._reference("validation"))
        self.journal.put(key, found.to_json())
        return found

    def _reference(self, split: str) -> Tensor:
        if split not in self._references:
            dense = np.zeros((1, len(self.heads.places)), dtype=np.int64)
            self._references[split] = self._outputs(self._kept, dense, split)
        return self._references[split]

    @cached_property
    def _references(self) -> dict[str, Tensor]:
        return {}

    def _outputs(self, table: HeadTable, choice: Choice, split: str) -> Tensor:
        """Whole answers with each phase's patterns."""
        assert self.workload is not None
        runs: dict[str, Run] = {}
        served: list[tuple[int, int, Run]] = []
        for (first, last), row in zip(table.phases, choice, strict=True):
            answers = self._answers(table, row)
            if repr(answers) not in runs:
                graph = run_passes(self.passes, self.program.graph, self.target, {0: answers})
                runs[repr(answers)] = self._run(Program(graph, self.program.weights))
            served.append((first, last, runs[repr(answers)]))
        run = self.loop.by_step(served) if self.loop and len(served) > 1 else served[0][2]
        return self.workload.outputs(run, "calibration" if split == "calibration" else "validation", self.progress)

    def _run(self, program: Program) -> Run:
        module = materialize(program).module()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.deadline.check()
            with torch.no_grad():
                return tuple(module(*inputs))

        return run

    def _key(self, what: str) -> str:
        sparse = self.passes[0]
        return f"heads/{hashlib.sha256(f'{sparse} {self.program.graph.fingerprint} {what}'.encode()).hexdigest()[:16]}"

    def _notes(self, table: HeadTable, choice: Choice, predicted: Prediction, trial: Trial | None) -> dict[str, object]:
        """What the search knew, as plain JSON values."""
        refused = refused_places(self.passes, self.program.graph, self.target)
        density = replace(table, costs=self.heads.costs("density"))
        return {
            "baseline": {"seconds": digits(self.baseline.seconds), "bytes": self.baseline.bytes},
            "predicted": {"seconds": digits(predicted.seconds), "bytes": predicted.bytes},
            "density": digits(density.cost(choice)),
            "error": digits(table.error(choice)),
            "quality": trial.to_json()["quality"] if trial else None,
            "tried": [one.to_json() for one in self.trials],
            "places": self._place_notes(table) if choice.size <= NOTED else [],
            "refused": [{"step": step, "place": place, "why": why} for step, place, why in refused],
            **self.facts,
        }

    def _place_notes(self, table: HeadTable) -> list[dict[str, object]]:
        seconds = self.heads.costs("seconds")
        return [
            {
                "steps": list(table.phases[phase]),
                "step": 0,
                "place": place,
                "options": [
                    {
                        "option": option,
                        "error": digits(float(table.errors[phase, head, number])),
                        "seconds": digits(float(seconds[head, number] - seconds[head, 0])),
                        "bytes": 0,
                    }
                    for number, option in enumerate(table.options[head])
                ],
            }
            for phase in range(len(table.phases))
            for head, place in enumerate(table.places)
        ]
