"""What every search over heads needs: options and costs, whole answers of a choice, and the plan that tells it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.sparse_attention import DENSE, SparseAttention
from intarsia.search.head_errors import Heads, Price
from intarsia.search.head_mass import attention_mass, calibrated
from intarsia.search.head_settings import HeadSearch
from intarsia.search.head_table import Choice, Floats, HeadTable
from intarsia.search.journal import Journal
from intarsia.search.loop_phases import step_ranges
from intarsia.search.places import refused_places, run_passes
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal, Quality, measure
from intarsia.search.roofline import Prediction, predict
from intarsia.search.search import EFFORTS, SearchResult
from intarsia.search.trials import Deadline, Spent, Trial, digits
from intarsia.search.work import sizes_of
from intarsia.search.workload import Loop, Run, Workload

NOTED = 20_000
"""Heads times phases up to which a plan tells what every option would lose and cost."""

Decided = tuple[HeadTable, Choice]
"""What was known, and what each head does in each phase."""

Served = Sequence[tuple[int, int, Graph]]
"""First and last step of each phase, and the graph that serves it."""


@dataclass
class HeadStudy(ABC):
    """A search over the heads of a program; subclasses decide."""

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
    price: Price | None = None
    trials: list[Trial] = field(default_factory=list[Trial])
    facts: dict[str, object] = field(default_factory=dict[str, object])
    decided: Decided | None = None

    @abstractmethod
    def decide(self) -> Decided:
        """What is known of all options, and the choice; Spent when the time is over, ``decided`` set if it was."""

    def result(self, notations: Sequence[str]) -> SearchResult:
        """The plan, which calls the passes by these notations, and all that was learnt on the way."""
        complete, decided = True, None
        try:
            decided = self.decide()
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

    @cached_property
    def loop(self) -> Loop | None:
        """The loop around the network, if there is one."""
        return self.workload.loop if self.workload else None

    @property
    def steps(self) -> int:
        """Calls one after the other that make an answer."""
        return self.loop.steps if self.loop else (self.how.steps or 1) if self.how.table else 1

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last step of every phase."""
        return step_ranges(self.steps, self.how.phases or self.steps)

    @cached_property
    def heads(self) -> Heads:
        """All heads, stripes and tiles with the columns and distances that the calibration calls look at."""
        sparse = self.passes[0]
        assert isinstance(sparse, SparseAttention)
        sizes = self.sizes
        found = Heads.of(sparse, self.program.graph, self.target, sizes, price=self.price)
        if self.how.table or self.workload is None:
            return found
        key = self._key(f"patterns {self.ranges} {found.fingerprint}")
        known = self.journal.get(key)
        if isinstance(known, list):
            return replace(found, options=tuple(map(tuple, known)))
        self.progress.start("where heads look", None)
        made = calibrated(found, attention_mass(self._materialized, self._all_calls("calibration"), found))
        self.journal.put(key, [list(options) for options in made.options])
        return made

    @cached_property
    def costs(self) -> Floats:
        """What each option costs (N, O) in the unit of the budget."""
        return self.heads.costs("seconds" if self.how.seconds else "density")

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

    def _dense_meets(self, table: HeadTable) -> Choice:
        """All heads dense in all phases; QualityError if even that misses the goal."""
        assert self.goal is not None
        dense = np.zeros((len(table.phases), len(table.places)), dtype=np.int64)
        trial = self._measured(table, dense)
        if trial.margin < 0:
            reached = self.goal.reached(trial.quality)
            raise QualityError(f"quality {self.goal} cannot be reached: with every head dense, {reached}")
        return dense

    def _kept_by_budget(self, table: HeadTable, choice: Choice) -> Decided:
        """What a budget or a given epsilon leads to, measured; QualityError if a goal is given too and missed."""
        self.decided = table, choice
        if self.workload is not None:
            trial = self._measured(table, choice)
            if self.goal is not None and trial.margin < 0:
                reached = self.goal.reached(trial.quality)
                raise QualityError(f"quality {self.goal} is missed by {self.how}: {reached}; allow it more")
        return self.decided

    @property
    def _kept(self) -> HeadTable:
        """A table that knows nothing: every option as good as dense."""
        errors = np.zeros((1, len(self.heads.places), self.heads.width))
        return HeadTable(self.ranges[:1], self.heads.places, self.heads.options, errors, self.costs)

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
        """The graph's named sizes."""
        if not self.program.graph.sizes or self.workload is None:
            return {size.name: max(size.minimum, 2) for size in self.program.graph.sizes}
        call = self._calls("calibration")[0][0] if self.loop else self.workload.calibration[0]
        return sizes_of(self.program.graph, call)

    @cached_property
    def baseline(self) -> Prediction:
        """What the graph as it came is predicted to cost, with attention's seconds as measured where they are."""
        found = predict(self.program.graph, self.target, self.sizes)
        if self.price is None:
            return found
        predicted = replace(self.heads, price=None).costs("seconds")[:, 0].sum()
        measured = self.heads.costs("seconds")[:, 0].sum()
        return replace(found, seconds=found.seconds + float(measured - predicted))

    @cached_property
    def _materialized(self) -> Program:
        return materialize(self.program)

    def _predicted(self, table: HeadTable, choice: Choice) -> Prediction:
        """The baseline less what the patterns save of self-attention."""
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
        """What was decided, or the fastest that was measured and meets the goal."""
        if self.decided is not None:
            return self.decided
        met = [trial for trial in self.trials if trial.margin >= 0]
        best = min(met, key=lambda trial: trial.seconds, default=None)
        return self._by_selection[best.selection] if best else None

    def _quality(self, table: HeadTable, choice: Choice) -> Quality:
        graphs = self._graphs(table, choice)
        key = self._key(f"quality {served(graphs)}")
        known = self.journal.get(key)
        if isinstance(known, dict):
            return Quality.from_json(known)
        found = measure(self._outputs(graphs, "validation"), self._unchanged)
        self.journal.put(key, found.to_json())
        return found

    @cached_property
    def _unchanged(self) -> Tensor:
        """Whole answers of the program as it came, on validation noise."""
        return self._outputs([(0, self.steps - 1, self.program.graph)], "validation")

    def _graphs(self, table: HeadTable, choice: Choice) -> Served:
        """The graph of each phase, one object where phases decide alike."""
        made: dict[bytes, Graph] = {}
        for row in choice:
            if row.tobytes() not in made:
                chosen = {0: self._answers(table, row)}
                made[row.tobytes()] = run_passes(self.passes, self.program.graph, self.target, chosen)
        rows = zip(table.phases, choice, strict=True)
        return [(first, last, made[row.tobytes()]) for (first, last), row in rows]

    def _outputs(self, graphs: Served, split: Literal["calibration", "validation"]) -> Tensor:
        """Whole answers with each phase's graph."""
        assert self.workload is not None
        runs: dict[int, Run] = {}
        for _, _, graph in graphs:
            if id(graph) not in runs:
                runs[id(graph)] = self._run(Program(graph, self.program.weights))
        serving = [(first, last, runs[id(graph)]) for first, last, graph in graphs]
        run = self.loop.by_step(serving) if self.loop and len(runs) > 1 else serving[0][2]
        return self.workload.outputs(run, split, self.progress)

    def _run(self, program: Program) -> Run:
        module = materialize(program).module()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.deadline.check()
            with torch.no_grad():
                return tuple(module(*inputs))

        return run

    def _key(self, what: str) -> str:
        """The journal's key of a measurement; ``what`` tells all that it depends on, but for weights and workload."""
        return f"heads/{hashlib.sha256(f'{self.program.graph.fingerprint} {what}'.encode()).hexdigest()[:16]}"

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
            "tried": [{**one.to_json(), "density": digits(self._density(one, density.costs))} for one in self.trials],
            "places": self._place_notes(table) if choice.size <= NOTED else [],
            "refused": [{"step": step, "place": place, "why": why} for step, place, why in refused],
            **self.facts,
        }

    def _density(self, trial: Trial, costs: Floats) -> float:
        """The share of pairs that was computed, in the mean over heads and steps."""
        table, choice = self._by_selection[trial.selection]
        return replace(table, costs=costs).cost(choice)

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


def served(graphs: Served) -> str:
    """Which graph serves which steps."""
    return "; ".join(f"{first}-{last} {graph.fingerprint}" for first, last, graph in graphs)
