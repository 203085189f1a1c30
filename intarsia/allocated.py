"""An engine that computes active tokens only, as the denoiser that a sampler calls step after step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from intarsia.backends.base import Carried, Engine, Stateful
from intarsia.backends.by_step import TIMESTEP
from intarsia.backends.phases import StepRange
from intarsia.backends.runner import LoopTiming, Timing, bench
from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.plan import Plan
from intarsia.ir.types import TensorType
from intarsia.models.sampler import FlowMatchEuler
from intarsia.models.step_loop import Loop, TokenGrid
from intarsia.passes.active_inputs import StepInputs
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.base import find_pass
from intarsia.passes.token_places import TokenPlaces


def empty_caches(found: StepInputs) -> tuple[Tensor, ...]:
    """Caches of zeros: what the first step, which computes all tokens, is given."""
    return tuple(_zeros(value) for value in found.caches)


def _zeros(value: Value) -> Tensor:
    assert isinstance(value.type, TensorType)
    return torch.zeros([int(dim) for dim in value.type.shape], dtype=DTYPES[value.type.dtype])


def with_caches(engine: Callable[..., tuple[Tensor, ...]], graph: Graph) -> Stateful:
    """The engine of a graph of active tokens, caches kept by itself: called with all inputs before them."""
    found = StepInputs.of(graph)
    keep = engine.stateful if isinstance(engine, Engine) else partial(Carried, engine)
    caches = empty_caches(found) if found else ()
    ends = (len(values) - len(caches) for values in (graph.inputs, graph.outputs))
    inputs, outputs = (range(first, first + len(caches)) for first in ends)
    return keep(caches, inputs=inputs, outputs=outputs)


def step_inputs(
    graph: Graph, own: Sequence[Tensor], count: int, *, run: Callable[..., tuple[Tensor, ...]] | None = None
) -> tuple[Tensor, ...]:
    """Inputs of a step that computes ``count`` tokens, evenly spread; the model's own where the graph computes all.

    Args:
        graph: Of active tokens.
        own: The model's own inputs.
        run: Runs the graph, so that caches hold what a step of all tokens left there; they are zeros without it.
    """
    found = StepInputs.of(graph)
    if found is None:
        return tuple(own)
    caches = empty_caches(found)
    if run is not None:
        with torch.no_grad():
            answer = run(*call_inputs(graph, own, found.tokens), *caches)
        caches = tuple(answer[len(answer) - len(caches) :])
    return (*call_inputs(graph, own, count), *caches)


def call_inputs(graph: Graph, own: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """What ``with_caches`` is called with at a step that computes ``count`` tokens, evenly spread."""
    found = StepInputs.of(graph)
    if found is None:
        return tuple(own)
    clock = (torch.zeros(found.tokens), torch.zeros(found.tokens)) if found.clocked else ()
    return (*own, torch.arange(count) * found.tokens // count, *clock)


def allocation_of(plan: Plan | None) -> Allocation | None:
    """The budget of tokens that a plan's ``active-tokens`` names; None where no pass of it is one."""
    found = _pass_of(plan)
    if found is None:
        return None
    return Allocation.parse(found.allocation) if found.allocation else Allocation()


def _pass_of(plan: Plan | None) -> ActiveTokens | None:
    for step in (step for phase in plan.phases for step in phase.steps) if plan else ():
        if step.run.partition("(")[0] == ActiveTokens.name:
            made = find_pass(step.run)
            assert isinstance(made, ActiveTokens)
            return made
    return None


def grid_of(graph: Graph) -> TokenGrid:
    """How the tokens lie in a sample of a traced video transformer; Unsupported if it has none."""
    places = TokenPlaces(graph)
    frames, height, width = (factor.axis for factor in places.video)
    layout = places.layout
    return TokenGrid((frames, height, width), (layout.frames, layout.height, layout.width))


def denoising(engine: Engine, graph: Graph, plan: Plan | None, sampler: FlowMatchEuler | None, model: Graph) -> Engine:
    """The engine as a sampler calls it; itself where its graph computes all tokens.

    Args:
        graph: What the engine was built from.
        plan: Names the budget of tokens.
        sampler: Of the loop.
        model: The graph that the plan was made for.

    Raises:
        PlanError: The graph computes active tokens, and the model has no loop.
    """
    allocation = allocation_of(plan)
    if allocation is None and StepInputs.of(graph) is None:
        return engine
    if allocation is None or sampler is None:
        raise PlanError(f"{graph.name}: active tokens need the sampler's steps, and the model has no sampler")
    found = _pass_of(plan)
    return AllocatedEngine(engine, graph, allocation, sampler, grid_of(model), found.buckets if found else 0)


def loop_timing(engine: AllocatedEngine, own: Sequence[Tensor], *, repeats: int = 20) -> LoopTiming:
    """How long the calls of a loop take: steps that compute as many tokens are timed once, others take nothing."""
    shares = engine.allocation.shares_by_step(engine.sampler.steps)
    counts = [engine.called(round(share * engine.grid.count)) for share in shares]
    first: dict[int, int] = {}
    ranges: list[StepRange] = []
    timesteps = engine.sampler.timesteps()
    for step, count in enumerate(counts):
        if ranges and counts[ranges[-1].first] == count:
            ranges[-1] = replace(ranges[-1], last=step, timesteps=(ranges[-1].timesteps[0], timesteps[step]))
        else:
            program = first.setdefault(count, len(ranges))
            ranges.append(StepRange(step, step, program, (timesteps[step], timesteps[step])))
    nothing = Timing(0.0, 0.0, 0.0, 0, engine.device)
    timed = {
        count: bench(engine.step, call_inputs(engine.graph, own, count), repeats=repeats) if count else nothing
        for count in first
    }
    return LoopTiming(tuple(ranges), tuple(timed[counts[one.first]] for one in ranges))


@dataclass
class AllocatedEngine(Engine):
    """A loop's network: tensors in the model's own input order in, the velocity of all tokens out.

    It remembers: the first step of a loop starts it anew, and every other one has to follow the one before.

    Attributes:
        engine: Of the graph of active tokens, or of the model's where steps compute all tokens or none.
        graph: That graph.
        allocation: Which tokens are computed when.
        sampler: Of the loop.
        grid: How the tokens lie in a sample.
        buckets: How many counts of tokens the engine is called with, evenly spread over all of them; 0 for any count.
        loop: What the last loop computed; of a finished one, ``loop.active`` has every step.
        step: The engine with its caches.

    Raises:
        UsageError: The sampler's steps leave no room for the allocation's window.
    """

    engine: Callable[..., tuple[Tensor, ...]]
    graph: Graph
    allocation: Allocation
    sampler: FlowMatchEuler
    grid: TokenGrid
    buckets: int = 0
    loop: Loop = field(init=False)
    step: Stateful = field(init=False)

    def __post_init__(self) -> None:
        self._inputs = StepInputs.of(self.graph)
        self._sigmas = self.sampler.sigmas().tolist()
        self._timesteps = torch.tensor(self.sampler.timesteps())
        self._at = [value.name for value in self.graph.inputs].index(TIMESTEP)
        self.step = with_caches(self.engine, self.graph)
        self._start()

    def _start(self) -> None:
        self.loop = Loop(self.allocation, self.sampler.steps, self.grid, self.sampler.guide)
        self.step.clear()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The velocity at the step that the timestep tells; UsageError for a step that does not follow the last."""
        number = int((self._timesteps - float(inputs[self._at].flatten()[0])).abs().argmin())
        if number == 0:
            self._start()
        if number != len(self.loop.active):
            raise UsageError(
                f"step allocation: step {number} follows step {len(self.loop.active) - 1}; caches need every step in "
                "its turn, one sample after the other"
            )
        active, now = self.loop.begin(number), self._sigmas[number]
        if len(active):
            clock = self.loop.clock(now)
            told = (clock.elapsed, clock.rate) if self._inputs and self._inputs.clocked else ()
            called = self._padded(active)
            answer = self.step(*inputs, *((called,) if self._inputs else ()), *told)
            self.loop.learn(number, active, now, answer[0].float())
        return (self.loop.velocity(now),)

    def called(self, count: int) -> int:
        """How many tokens the engine is given for a step that computes ``count``: the next of the buckets."""
        tokens = self.grid.count
        filled = -(-count * self.buckets // tokens)
        return -(-filled * tokens // self.buckets) if self.buckets else count

    def _padded(self, active: Tensor) -> Tensor:
        """The active tokens, the last of them repeated up to a bucket: what is computed twice is written twice."""
        return torch.cat([active, active[-1:].expand(self.called(len(active)) - len(active))])

    @property
    def device(self) -> str:
        """What it ran on."""
        return self.step.device
