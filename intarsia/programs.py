"""The programs that a plan makes of a model: one, or one for each phase of the denoising loop that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from intarsia.allocated import allocation_of
from intarsia.backends.by_step import require_phases
from intarsia.backends.phases import StepRange, step_ranges
from intarsia.backends.segmented import once
from intarsia.backends.sharing import share_weights
from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.models.sampler import FlowMatchEuler
from intarsia.passes.active_inputs import StepInputs
from intarsia.passes.apply import apply, cutting, segments
from intarsia.search.bit_counts import packing_saves
from intarsia.search.roofline import Prediction, predict
from intarsia.search.step_memory import require_room
from intarsia.subject import Subject, smallest_sizes


@dataclass(frozen=True)
class Programs:
    """Materialized programs, by the number of the first phase that runs them.

    Attributes:
        phases: The loop's phases; none where the plan does not tell its steps apart.
        segments: What every step runs one after the other, parts of the only program; none where it is not cut.
    """

    programs: Mapping[int, Program]
    phases: tuple[StepRange, ...] = ()
    segments: tuple[Program, ...] = ()

    @property
    def first(self) -> Program:
        """The program of the first step."""
        return self.programs[0]


def planned(subject: Subject, plan: Plan | None, target: Target) -> Programs:
    """What ``plan`` (None: nothing) makes of the model; phases that come out alike are one program.

    Weights of the same bits are the same tensor under the same name in all programs, and no name stands for two.

    Raises:
        PlanError: The plan is not for this graph, its phases are not those of the model's sampler, or passes that cut
            a step into segments do not agree with it.
        UsageError: There are several programs, and the weights are on the meta device.
        Unsupported: A pass finds nothing to cut.
    """
    graph = subject.program.graph
    if plan is None:
        return Programs({0: materialize(subject.program)})
    cutting(plan)
    graphs = [apply(plan, graph, target, phase=number) for number in range(len(plan.phases))]
    for one in filter(StepInputs.of, graphs):
        require_room(one, target)
    if len(graphs) > 1 and allocation_of(plan) is not None:
        raise PlanError("plan: active-tokens goes from step to step through the whole loop; give it one phase")
    alike = [graphs.index(one) for one in graphs]
    phases = plan_ranges(subject, plan, programs=alike)
    made = {number: materialize(replace(subject.program, graph=graphs[number])) for number in sorted(set(alike))}
    if len(plan.phases) > 1:
        return Programs(share_weights(made) if len(made) > 1 else made, phases)
    return Programs(made, segments=_cut(plan, made[0]))


def _cut(plan: Plan, program: Program) -> tuple[Program, ...]:
    """The program's segments; none where it is not cut."""
    graphs = segments(plan, program.graph)
    return tuple(_part(program, graph) for graph in graphs) if len(graphs) > 1 else ()


def _part(program: Program, graph: Graph) -> Program:
    return Program(graph, {param.name: program.weights[param.name] for param in graph.params})


def plan_ranges(subject: Subject, plan: Plan, *, programs: list[int] | None = None) -> tuple[StepRange, ...]:
    """The plan's phases as steps of the model's sampler; none for one phase that is open.

    Raises:
        PlanError: The model has no sampler, or the phases are not those of its steps.
    """
    count = len(plan.phases)
    if count == 1 and plan.phases[0].last is None:
        return ()
    sampler = subject.model.sampler if subject.model else None
    if sampler is None:
        asked = f"{count} phases" if count > 1 else f"one phase that ends at step {plan.phases[0].last}"
        raise PlanError(f"{subject.name} has no sampler and so no steps; the plan has {asked}: give one with last=null")
    ranges = step_ranges(plan.phases, sampler.timesteps(), programs=programs)
    require_phases(ranges, subject.program.graph)
    return ranges


PACKING = frozenset({"onnx"})
"""Backends whose files hold weights of four bits two a byte; the others' hold one a byte."""


def predicted(
    subject: Subject, made: Programs, plan: Plan | None, target: Target, *, backends: Sequence[str]
) -> dict[str, object]:
    """Seconds a call and weight bytes that the cost model gives the unchanged model and the planned one.

    With phases, and where steps compute some of the tokens or a segment runs once for each prompt, the seconds are the
    mean over the loop's steps; a weight of several programs counts once. Weights of four bits count as the files of
    ``backends`` hold them, ``four_bits`` says how: two a byte where all of these pack them.
    """
    facts = _predicted(subject, made, plan, target)
    saved = packing_saves(made.programs.values())
    if not saved:
        return facts
    plain = [name for name in backends if name not in PACKING]
    if plain:
        return facts | {"four_bits": f"a weight of four bits takes a byte in the files of {', '.join(plain)}"}
    held = cast("int", facts["bytes"]) - saved
    return facts | {"bytes": held, "four_bits": "weights of four bits are two a byte in the file"}


def _predicted(subject: Subject, made: Programs, plan: Plan | None, target: Target) -> dict[str, object]:
    """The same with every weight in the bytes of its element type."""
    sizes = smallest_sizes(subject.program.graph)
    before = predict(subject.program.graph, target, sizes)
    if StepInputs.of(made.first.graph) or allocation_of(plan) is not None:
        each = {0: _mean_step(subject, made.first, plan, target)}
    else:
        each = {number: predict(program.graph, target, sizes) for number, program in made.programs.items()}
    facts: dict[str, object] = {
        "seconds": each[0].seconds,
        "bytes": each[0].bytes,
        "baseline_seconds": before.seconds,
        "baseline_bytes": before.bytes,
        "source": f"roofline of {target.name}",
    }
    if made.segments:
        return facts | _with_segments(subject, made, plan, target, each[0].seconds)
    if not made.phases:
        return facts
    loop = sum(one.steps * each[one.program].seconds for one in made.phases)
    weights = {value.name: value.type for program in made.programs.values() for value in program.graph.params}
    return facts | {
        "seconds": loop / sum(one.steps for one in made.phases),
        "bytes": sum(type_.bytes(sizes) for type_ in weights.values() if isinstance(type_, TensorType)),
        "loop_seconds": loop,
        "phases": [{"first": one.first, "last": one.last, "seconds": each[one.program].seconds} for one in made.phases],
    }


def _with_segments(
    subject: Subject, made: Programs, plan: Plan | None, target: Target, seconds: float
) -> dict[str, object]:
    """What segments change of a step that takes ``seconds`` with all of them: some run at a loop's first step only.

    A model without a sampler has no first step: its seconds are those of any later one. Which steps a rule of caching
    skips depends on values, so none is predicted to be skipped.
    """
    sampler, sizes = subject.model.sampler if subject.model else None, smallest_sizes(made.first.graph)
    if (found := StepInputs.of(made.first.graph)) is not None:
        sizes |= {found.size: found.tokens}
    steady = once(made.first.graph, [program.graph for program in made.segments])
    each = [predict(program.graph, target, sizes).seconds for program in made.segments]
    segments = [{"seconds": one, "once": number in steady} for number, one in enumerate(each)]
    if not steady:
        return {"segments": segments}
    saved = sum(each[number] for number in steady)
    if sampler is None:
        return {"segments": segments, "seconds": seconds - saved}
    computed = sum(count > 0 for count in _counts(made.first, plan, sampler))
    mean = seconds - saved * (computed - 1) / sampler.steps
    return {"segments": segments, "seconds": mean, "loop_seconds": mean * sampler.steps}


def _counts(program: Program, plan: Plan | None, sampler: FlowMatchEuler) -> list[int]:
    """How many tokens each step computes; 1 at every step that computes all of a graph that can compute no fewer."""
    allocation, found = allocation_of(plan), StepInputs.of(program.graph)
    if allocation is None:
        return [1] * sampler.steps
    tokens = found.tokens if found else 1
    return [round(share * tokens) for share in allocation.shares_by_step(sampler.steps)]


def _mean_step(subject: Subject, program: Program, plan: Plan | None, target: Target) -> Prediction:
    """What a step costs in the mean over a loop whose steps compute some of the tokens."""
    sampler = subject.model.sampler if subject.model else None
    if allocation_of(plan) is None or sampler is None:
        raise PlanError(f"{subject.name} has no sampler, whose steps active-tokens allocates")
    found, sizes = StepInputs.of(program.graph), smallest_sizes(program.graph)
    tokens, counts = found.tokens if found else 1, _counts(program, plan, sampler)

    def step(count: int) -> Prediction:
        return predict(program.graph, target, {**sizes, found.size: count} if found else sizes)

    each = {count: step(count) for count in {*counts, tokens} if count}
    seconds = sum(each[count].seconds for count in counts if count) / sampler.steps
    return replace(each[tokens], seconds=seconds)
