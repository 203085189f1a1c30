"""An engine as its denoising loop calls it: what a plan's passes put around it, and what a clock says of the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from intarsia.allocated import AllocatedEngine, loop_timing, step_inputs
from intarsia.backends.base import Engine
from intarsia.backends.phases import StepRange
from intarsia.backends.runner import LoopTiming, SegmentTiming, bench, bench_loop
from intarsia.backends.segmented import SegmentedEngine
from intarsia.cached import CachedEngine, cached_loop_timing
from intarsia.ir import registry
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.models.sampler import FlowMatchEuler

Around = Callable[[Engine, Graph, Plan | None, FlowMatchEuler | None, Graph], Engine]
"""What makes a sampler's network of an engine: the engine, its graph, the plan, the sampler, the model's graph."""

AROUND: Mapping[str, str] = {
    "active-tokens": "intarsia.allocated:denoising",
    "first-block-cache": "intarsia.cached:caching",
    "teacache": "intarsia.cached:caching",
}
"""What a pass puts around the engine of a plan that it is in, by the pass's name; other passes put nothing.

Of a graph that is cut into segments the engine is a ``SegmentedEngine``, whose ``segments`` can be run apart.
"""


def around(plan: Plan | None) -> str | None:
    """The pass of the plan that puts something around the engine; None where none does."""
    steps = (step for phase in plan.phases for step in phase.steps) if plan else ()
    return next((name for step in steps if (name := step.run.partition("(")[0]) in AROUND), None)


def looped(engine: Engine, graph: Graph, plan: Plan | None, sampler: FlowMatchEuler | None, model: Graph) -> Engine:
    """The engine as a sampler calls it; itself where no pass of the plan puts anything around it.

    Args:
        graph: What the engine was built from.
        sampler: Of the loop; None where the model has none.
        model: The graph that the plan was made for.

    Raises:
        PlanError: A pass needs the sampler's steps, and the model has no loop.
    """
    name = around(plan)
    if name is None:
        return engine
    put: Around = registry.import_path(AROUND[name])
    return put(engine, graph, plan, sampler, model)


def timing_of(
    engine: Engine,
    inputs: Sequence[Tensor],
    *,
    graph: Graph,
    phases: Sequence[StepRange] = (),
    sampler: FlowMatchEuler | None = None,
    repeats: int = 20,
) -> LoopTiming:
    """How long the calls of a loop take; what runs once for each prompt is part of the first step.

    Args:
        engine: As ``looped`` gives it.
        inputs: The model's own, in the order of ``graph``, the model's.
        phases: Of the loop, where steps run programs of their own.
        sampler: Of the loop; None where steps are not known, and segments are timed alone.
    """
    if isinstance(engine, CachedEngine):
        return cached_loop_timing(engine, inputs, repeats=repeats)
    if isinstance(engine, AllocatedEngine):
        found, inner = loop_timing(engine, inputs, repeats=repeats), engine.engine
        inputs = step_inputs(engine.graph, inputs, engine.grid.count)
    else:
        found, inner = bench_loop(engine, inputs, graph=graph, phases=phases, repeats=repeats), engine
    if not isinstance(inner, SegmentedEngine):
        return found
    timed = [
        bench(segment.engine, inner.inputs_of(number, *inputs), repeats=repeats)
        for number, segment in enumerate(inner.segments)
    ]
    segments = tuple(SegmentTiming(one, number in inner.once) for number, one in enumerate(timed))
    return replace(_with_first(found, segments, sampler), segments=segments)


def _with_first(loop: LoopTiming, segments: Sequence[SegmentTiming], sampler: FlowMatchEuler | None) -> LoopTiming:
    """The loop, its first step longer by the segments that run once; steps that know no phases are all alike."""
    once = [segment.timing for segment in segments if segment.once]
    if not once or sampler is None:
        return loop
    timesteps = sampler.timesteps()
    ranges = loop.phases or (StepRange(0, sampler.steps - 1, 0, (timesteps[0], timesteps[-1])),)
    first, *others = ranges
    head = replace(first, last=0, timesteps=(timesteps[0], timesteps[0]))
    if first.last:
        others = [replace(first, first=1, timesteps=(timesteps[1], first.timesteps[1])), *others]
    call = loop.calls[0]
    longer = replace(
        call,
        seconds=call.seconds + sum(one.seconds for one in once),
        low=call.low + sum(one.low for one in once),
        high=call.high + sum(one.high for one in once),
    )
    calls = loop.calls if first.last else loop.calls[1:]
    numbered = (head, *(replace(one, program=number) for number, one in enumerate(others, 1)))
    return LoopTiming(numbered, (longer, *calls))
