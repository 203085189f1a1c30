"""An engine whose blocks some steps skip, as the denoiser that a sampler calls step after step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.by_step import TIMESTEP
from intarsia.backends.phases import StepRange
from intarsia.backends.runner import LoopTiming, Timing, bench
from intarsia.backends.segmented import Segment, SegmentedEngine
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.models.sampler import FlowMatchEuler
from intarsia.passes.base import find_pass
from intarsia.passes.step_caching import FirstBlockCache, StepCaching, TeaCache

RULES = (TeaCache.name, FirstBlockCache.name)


def rule_of(plan: Plan | None) -> StepCaching | None:
    """The rule of caching that a plan names; None where no pass of it is one."""
    for step in (step for phase in plan.phases for step in phase.steps) if plan else ():
        if step.run.partition("(")[0] in RULES:
            made = find_pass(step.run)
            assert isinstance(made, StepCaching)
            return made
    return None


def caching(
    engine: Engine, graph: Graph, plan: Plan | None, sampler: FlowMatchEuler | None, model: Graph
) -> CachedEngine:
    """The engine of a plan that names a rule, as a sampler calls it.

    Args:
        engine: Of the segments that the rule cut.
        graph: What they are parts of.
        model: The graph that the plan was made for.

    Raises:
        PlanError: The model has no loop.
    """
    rule = rule_of(plan)
    assert rule is not None
    assert isinstance(engine, SegmentedEngine)
    if sampler is None:
        raise PlanError(f"{graph.name}: {rule.name} needs the sampler's steps, and the model has no sampler")
    return CachedEngine(engine, rule, sampler)


def segment_timings(engine: SegmentedEngine, inputs: Sequence[Tensor], *, repeats: int = 20) -> tuple[Timing, ...]:
    """What a call of each segment takes, one after the other; ``inputs`` are those of the whole."""
    return tuple(
        bench(segment.engine, engine.inputs_of(number, *inputs), repeats=repeats, warmup=1)
        for number, segment in enumerate(engine.segments)
    )


def cached_loop_timing(engine: CachedEngine, inputs: Sequence[Tensor], *, repeats: int = 20) -> LoopTiming:
    """How long the steps of a loop take that starts with ``inputs``; which of them are computed hangs on the data."""
    before, blocks, head = segment_timings(engine.engine, inputs, repeats=repeats)
    calls = {True: _together(before, blocks, head), False: _together(before, head)}
    timesteps = engine.sampler.timesteps()
    ranges: list[StepRange] = []
    for step, computed in enumerate(_computed(engine, inputs)):
        if ranges and computed == (ranges[-1].program == 0):
            ranges[-1] = replace(ranges[-1], last=step, timesteps=(ranges[-1].timesteps[0], timesteps[step]))
        else:
            ranges.append(StepRange(step, step, 0 if computed else 1, (timesteps[step], timesteps[step])))
    each = tuple(calls[one.program == 0] for one in ranges)
    return LoopTiming(tuple(ranges), each)


def _computed(engine: CachedEngine, inputs: Sequence[Tensor]) -> Sequence[bool]:
    """Which steps are computed of a loop whose rows start with ``inputs`` and follow each its own velocity."""
    names = [value.name for value in engine.engine.graph.inputs]
    state, *others = inputs
    for (now, after), timestep in zip(
        pairwise(engine.sampler.sigmas().tolist()), engine.sampler.timesteps(), strict=True
    ):
        rest = [
            torch.full(tensor.shape, timestep).to(tensor.dtype) if name == TIMESTEP else tensor
            for name, tensor in zip(names[1:], others, strict=True)
        ]
        state = state + (after - now) * engine(state, *rest)[0]
    return engine.watch.computed


def _together(*timings: Timing) -> Timing:
    """Of calls one after the other: the sum of their medians, and of their quartiles."""
    sums = {name: sum(getattr(one, name) for one in timings) for name in ("seconds", "low", "high")}
    return Timing(sums["seconds"], sums["low"], sums["high"], timings[0].repeats, timings[0].device)


def relative_change(now: Tensor, before: Tensor) -> float:
    """The mean absolute change over the mean absolute value before, over all rows; not a number where both are 0.

    Source: TeaCache, Liu et al., 2024, section 3, and first block cache, whose measure is the same.
    """
    now, before = now.float(), before.float()
    return float((now - before).abs().mean() / before.abs().mean())


@dataclass
class Watch:
    """Which steps of a loop a rule computes.

    Attributes:
        rule: Decides.
        steps: Of the loop.
        computed: Whether each step so far was computed.
        changes: By how much the signal had changed at each step so far; infinite at the first.

    Raises:
        UsageError: The rule's first and last steps are more than the loop has.
    """

    rule: StepCaching
    steps: int
    computed: list[bool] = field(default_factory=list[bool], init=False)
    changes: list[float] = field(default_factory=list[float], init=False)

    def __post_init__(self) -> None:
        if self.rule.warm_up + self.rule.tail > self.steps:
            raise UsageError(
                f"{self.rule.name}: warm_up {self.rule.warm_up} and tail {self.rule.tail} exceed {self.steps} steps"
            )
        self._signal: Tensor | None = None
        self._sum = 0.0

    def computes(self, signal: Tensor) -> bool:
        """Whether the next step, whose signal this is, is computed; all rows of a call are decided together.

        Published are a decision for each branch of guidance by itself, and one for both; rows of one call are both.
        """
        step = len(self.computed)
        change = math.inf if self._signal is None else relative_change(signal, self._signal)
        self._sum = self.rule.reach(self._sum, change)
        always = step < self.rule.warm_up or step >= self.steps - self.rule.tail
        computed = always or not self._sum < self.rule.threshold
        if computed:
            self._sum = 0.0
        if computed or self.rule.follows:
            self._signal = signal
        self.computed.append(computed)
        self.changes.append(change)
        return computed


@dataclass
class CachedEngine(Engine):
    """A loop's network: tensors in the model's own input order in, its outputs out.

    It remembers: the first step of a loop starts it anew, and every other one has to follow the one before. A step that
    is not computed gives the head the stream as it is, and what the blocks added to it at the last computed step.

    Attributes:
        engine: Of the three segments that the rule cut.
        rule: Decides which steps are computed.
        sampler: Of the loop.
        watch: What the last loop computed.
        loops: Whether each step was computed, of each loop so far.

    Raises:
        UsageError: The sampler's steps are fewer than the rule always computes.
    """

    engine: SegmentedEngine
    rule: StepCaching
    sampler: FlowMatchEuler
    watch: Watch = field(init=False)
    loops: list[list[bool]] = field(default_factory=list[list[bool]], init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.rule, self.sampler.steps)
        self._timesteps = torch.tensor(self.sampler.timesteps())
        self._at = [value.name for value in self.engine.graph.inputs].index(TIMESTEP)
        self._added = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The velocity at the step that the timestep tells; UsageError for a step that does not follow the last."""
        step = int((self._timesteps - float(inputs[self._at].flatten()[0])).abs().argmin())
        if step == 0:
            self.watch = Watch(self.rule, self.sampler.steps)
            self.loops.append(self.watch.computed)
        if step != len(self.watch.computed):
            raise UsageError(
                f"{self.rule.name}: step {step} follows step {len(self.watch.computed) - 1}; what is reused needs "
                "every step in its turn, one sample after the other"
            )
        before, blocks, head = self.engine.segments
        table = dict(zip((value.name for value in self.engine.graph.inputs), inputs, strict=True))
        _run(before, table)
        signal, stream = (table[name] for name in before.graph.outputs[:2])
        (behind,) = blocks.graph.outputs
        if self.watch.computes(signal):
            _run(blocks, table)
            self._added = table[behind] - stream
        else:
            table[behind] = stream + self._added
        _run(head, table)
        return tuple(table[name] for name in self.engine.graph.outputs)

    @property
    def device(self) -> str:
        """What it ran on."""
        return self.engine.device


def _run(segment: Segment, table: dict[str, Tensor]) -> None:
    """Add what a segment gives to the values so far."""
    answer = segment.engine(*(table[value.name] for value in segment.graph.inputs))
    table.update(zip(segment.graph.outputs, answer, strict=True))
