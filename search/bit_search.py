"""Choose the bits of every layer: the least perturbation within limits, or the least bits that keep a quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.passes.apply import apply
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.quantize_integer_layers import KEEP
from intarsia.search.bit_counts import FIRST_AND_LAST
from intarsia.search.bit_layers import MEASURES, bits
from intarsia.search.bit_seconds import Price
from intarsia.search.bit_settings import BitSearch
from intarsia.search.bit_study import LOWER, BitStudy, Part
from intarsia.search.bits import solve
from intarsia.search.estimate import Estimate
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal, Quality, measure
from intarsia.search.roofline import Prediction, predict
from intarsia.search.search import EFFORTS, SearchResult
from intarsia.search.trials import Deadline, Spent, Trial, digits
from intarsia.search.workload import Loop, Run, Workload

Chosen = Mapping[str, str]
"""Options by layer."""


def search_bits(
    program: Program,
    target: Target,
    parts: Sequence[Part],
    *,
    how: BitSearch,
    goal: Goal | None = None,
    workload: Workload | None = None,
    minimize: str = "both",
    effort: str = "default",
    seed: int = 0,
    journal: Journal | None = None,
    budget: float | None = None,
    facts: Mapping[str, object] | None = None,
    price: Price | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The plan whose layers have the bits of least perturbation within the limits of ``how``.

    Without a limit and a goal, the most bits everywhere. With a goal and no limit, the smallest share of bit operations
    (of bytes, to ``minimize`` these) whose whole answers meet it on validation noise; on grids, not yet in integers.

    Args:
        parts: Calls that ranges and sensitivities are measured on; several are phases of the workload's loop.
        goal: Needs a workload with a loop; a limit's choice is held to it too.
        workload: What whole answers are measured on; None for networks that are called once.
        budget: Seconds after which the best choice so far is returned, marked as not complete: eight bits everywhere
            until sensitivities are known.
        facts: Notes for the plan, such as where the data came from.

    Raises:
        UsageError: A limit that nothing keeps, data that does not fit, or a goal without a loop.
        QualityError: The goal is missed with all bits, or by what the limits lead to.
        Unsupported: No layer can be in integers.
    """
    if effort not in EFFORTS:
        raise UsageError(f"effort {effort!r} is unknown. Known: {', '.join(EFFORTS)}")
    loop = workload.loop if workload else None
    if goal is not None and loop is None:
        raise UsageError(
            f"strategy bits: --quality is measured on whole answers of a loop, and {program.graph.name} has none; "
            "give a limit, as bits(bops=0.5)"
        )
    deadline = Deadline.after(budget)
    study = BitStudy(
        program,
        target,
        parts,
        how,
        Journal() if journal is None else journal,
        _Watched(progress or Silent(), deadline),
        guide=loop.guide if loop else None,
        price=price,
    )
    search = _Search(study, workload, goal, minimize, effort, deadline)
    settings = {"strategy": str(how), "goal": str(goal) if goal else None, "effort": effort, "seed": seed}
    return search.result({**settings, **(facts or {})})


@dataclass
class _Watched:
    """Progress that ends the work once its time is over; ranges are measured in any case, as no plan can do without."""

    told: Progress
    deadline: Deadline
    phase: str = ""

    def start(self, phase: str, total: int | None) -> None:
        self.phase = phase
        self.told.start(phase, total)

    def advance(self, done: int = 1, *, note: str = "") -> None:
        self.told.advance(done, note=note)
        if self.phase not in ("calibration", "smoothing", "magnitudes"):
            self.deadline.check()

    def finish(self) -> None:
        self.told.finish()


@dataclass
class _Search:
    study: BitStudy
    workload: Workload | None
    goal: Goal | None
    minimize: str
    effort: str
    deadline: Deadline
    trials: list[Trial] = field(default_factory=list[Trial])
    best: Chosen | None = None

    def result(self, settings: Mapping[str, object]) -> SearchResult:
        study, complete, trial = self.study, True, None
        baseline, eight = predict(study.program.graph, study.target, self._sizes), self._eight
        try:
            chosen, trial = self._decided()
        except Spent:
            chosen, complete = self.best or eight, False
            trial = next((one for one in self.trials if one.selection == self._selection(chosen)), None)
        finally:
            study.progress.finish()
        predicted = self._predicted(chosen)
        notes = {
            **settings,
            "complete": complete,
            "baseline": {"seconds": digits(baseline.seconds), "bytes": baseline.bytes},
            "predicted": {"seconds": digits(predicted.seconds), "bytes": predicted.bytes},
            "quality": trial.to_json()["quality"] if trial else None,
            "tried": [one.to_json() for one in self.trials],
            "refused": self._refused(),
            **(self._weighed(chosen) if self.best else {"places": []}),
        }
        return SearchResult(
            plan=study.plan(chosen, notes=notes),
            predicted=predicted,
            baseline=baseline,
            quality=trial.quality if trial else None,
            tried=tuple(self.trials),
            gain=1 - predicted.bytes / baseline.bytes,
            complete=complete,
        )

    def _decided(self) -> tuple[Chosen, Trial | None]:
        """The choice, and what was measured of its whole answers."""
        study = self.study
        if limits := study.limits:
            solve(study.unmeasured, limits)  # refused before anything is measured where nothing keeps them
        _ = study.errors  # measured here, where time may run out
        if self.goal is None or limits:
            self.best = study.solve(limits) if limits else self._most
            trial = self._measured(self.best) if self._loop else None
            if self.goal and trial and trial.margin < 0:
                raise QualityError(
                    f"quality {self.goal} is missed by {study.how}: {self.goal.reached(trial.quality)}; allow it more"
                )
            return self.best, trial
        return self._smallest()

    def _smallest(self) -> tuple[Chosen, Trial]:
        """The smallest share whose whole answers meet the goal, halving between one that does and one that does not."""
        assert self.goal is not None
        measure = "size" if self.minimize == "bytes" else "bops"
        self.best = self._most
        trial = self._measured(self.best)
        if trial.margin < 0:
            reached = self.goal.reached(trial.quality)
            raise QualityError(f"quality {self.goal} cannot be reached: with the most bits everywhere, {reached}")
        low, high, share = 0.0, 1.0, 0.0
        while len(self.trials) < EFFORTS[self.effort].trials:
            chosen = self.study.solve({measure: self.study.limit(measure, share)})
            known = len(self.trials)
            found = self._measured(chosen)
            if found.margin >= 0:
                self.best, trial, high = chosen, found, share
            else:
                low = share
            if high == 0 or high - low < 0.01 or (len(self.trials) == known and share):
                break
            share = (low + high) / 2
        return self.best, trial

    def _measured(self, chosen: Chosen) -> Trial:
        """Whole answers of a choice on validation noise, on grids."""
        selection = self._selection(chosen)
        known = next((trial for trial in self.trials if trial.selection == selection), None)
        if known is not None:
            return known
        study = self.study
        quality = self._quality(study.plan(chosen))
        margin = self.goal.confidence_margin(quality) if self.goal else 0.0
        error, seconds, size = (study.used(chosen, measure) for measure in ("perturbation", "latency", "size"))
        trial = Trial(selection, error, quality, margin, seconds, round(size))
        self.trials.append(trial)
        limits = {one: study.used(chosen, one) for one in MEASURES}
        study.progress.start("plans", EFFORTS[self.effort].trials)
        study.progress.advance(len(self.trials), note=f"{limits['bops'] / 1e9:.3g} G bit operations: {quality}")
        return trial

    def _quality(self, plan: Plan) -> Quality:
        assert self.workload is not None
        assert self._loop is not None
        program, target = self.study.program, self.study.target
        rounded = replace(
            plan, phases=tuple(replace(p, steps=tuple(s for s in p.steps if s.run != LOWER)) for p in plan.phases)
        )
        graphs = [apply(rounded, program.graph, target, phase=number) for number in range(len(plan.phases))]
        key = f"bits/quality/{'/'.join(graph.fingerprint for graph in graphs)}"
        known = self.study.journal.get(key)
        if isinstance(known, dict):
            return Quality.from_json(known)
        runs = [self._run(Program(graph, program.weights)) for graph in graphs]
        steps = [(p.first, self._loop.steps - 1 if p.last is None else p.last) for p in plan.phases]
        served = [(*at, run) for at, run in zip(steps, runs, strict=True)]
        found = measure(self._outputs(self._loop.by_step(served) if len(runs) > 1 else runs[0]), self._unchanged)
        self.study.journal.put(key, found.to_json())
        return found

    @cached_property
    def _unchanged(self) -> Tensor:
        return self._outputs(self._run(self.study.program))

    def _outputs(self, run: Run) -> Tensor:
        assert self.workload is not None
        return self.workload.outputs(run, "validation", self.study.progress)

    def _run(self, program: Program) -> Run:
        module = materialize(program).module()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.deadline.check()
            with torch.no_grad():
                return tuple(module(*inputs))

        return run

    @property
    def _loop(self) -> Loop | None:
        return self.workload.loop if self.workload else None

    @cached_property
    def _offered(self) -> dict[str, tuple[str, ...]]:
        """What each layer of each part may have."""
        study = self.study
        return {
            study.name(n, layer): options for n, part in enumerate(study.offered) for layer, options in part.items()
        }

    @property
    def _most(self) -> dict[str, str]:
        """Every layer with the most bits that it may have, in integers."""
        found = {layer: [o for o in offered if o != KEEP] or [KEEP] for layer, offered in self._offered.items()}
        return {layer: max(offered, key=lambda o: (0, 0) if o == KEEP else bits(o)) for layer, offered in found.items()}

    @property
    def _eight(self) -> dict[str, str]:
        return dict.fromkeys(self._offered, FIRST_AND_LAST)

    def _selection(self, chosen: Chosen) -> tuple[int, ...]:
        return tuple(
            (KEEP, *(o for o in offered if o != KEEP)).index(chosen[layer]) for layer, offered in self._offered.items()
        )

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {size.name: max(size.minimum, 1) for size in self.study.program.graph.sizes}

    def _predicted(self, chosen: Chosen) -> Prediction:
        """What a call of the integer network costs, in the mean over the parts; weights of four bits take half a byte.

        Bytes are those of all parts, each of which has weights of its own.
        """
        study, plan = self.study, self.study.plan(chosen)
        seconds, size = 0.0, 0
        for number, part in enumerate(study.parts):
            graph = apply(plan, study.program.graph, study.target, phase=number)
            found = predict(graph, study.target, self._sizes)
            seconds += part.share * found.seconds
            saved = sum(
                count.parameters * (8 - bits(option)[0]) // 8
                for count in study.counts
                if (option := chosen.get(study.name(number, count.name), KEEP)) != KEEP
            )
            size += found.bytes - saved
        return Prediction(seconds, size, MappingProxyType({}))

    def _refused(self) -> list[dict[str, object]]:
        """Layers that stay in float, with the reason."""
        rounding, study = QuantizeInteger(), self.study
        return [
            {"step": len(study.before) + 1, "place": layer, "why": why}
            for layer, why in rounding.refusals(study.calibrated[0], study.target).items()
        ]

    def _weighed(self, chosen: Chosen) -> dict[str, object]:
        """What each option of each layer brings, and what the choice takes in all."""
        study = self.study
        used = {measure: digits(study.used(chosen, measure)) for measure in MEASURES}
        return {
            "error": digits(study.used(chosen, "perturbation")),
            "error_is": study.error_is,
            "limits": {measure: digits(limit) for measure, limit in study.limits.items()},
            "used": used,
            "extent": {measure: list(map(digits, study.within.extent(measure))) for measure in MEASURES},
            "places": [self._place(number, layer) for number, part in enumerate(study.offered) for layer in part],
        }

    def _place(self, number: int, layer: str) -> dict[str, object]:
        """What a plan notes of a layer: bytes and seconds of a call against keeping it in float."""
        study, part, name = self.study, self.study.parts[number], self.study.name(number, layer)
        count = next(count for count in study.counts if count.name == layer)
        seconds = study.seconds[number][layer]
        tied = next((group for group in study.ties[number] if layer in group), ())
        steps = [] if part.last is None and len(study.parts) == 1 else [part.first, part.last]
        offered = (KEEP, *(option for option in study.offered[number][layer] if option != KEEP))

        def told(option: str) -> dict[str, object]:
            weights, activations = (32, 32) if option == KEEP else bits(option)
            estimate = Estimate((0.0,)) if option == KEEP else study.errors[name][option]
            return {
                "option": option,
                "error": digits(estimate.mean),
                "interval": list(map(digits, estimate.interval)) if len(estimate.samples) > 1 else None,
                "seconds": digits(seconds[option] - seconds[KEEP]),
                "bytes": -count.parameters * (32 - weights) // 8,
                "bops": digits(float(count.macs * weights * activations)),
            }

        reasons = QuantizeInteger().unlisted(
            study.calibrated[number], study.target, dict.fromkeys([layer], "w4a4") if len(offered) == 2 else {}
        )
        return {
            **({"steps": steps} if steps else {}),
            "step": len(study.before) + 1,
            "place": layer,
            "options": [told(option) for option in offered],
            "tied": [other for other in tied if other != layer],
            **({"fixed": reasons[layer]} if layer in reasons else {}),
        }
