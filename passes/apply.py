"""Replay a plan: its passes with their answers, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import Pass, check_chosen, find_pass


def apply(plan: Plan, graph: Graph, target: Target, *, phase: int = 0) -> Graph:
    """The graph that ``plan`` makes of ``graph`` for one phase of the denoising loop.

    Raises:
        PlanError: The plan was made for another graph, has no such phase, or asks for what a pass does not offer.
        UsageError, SpecError: A pass of the plan is unknown.
        InvalidGraph: A pass broke the graph; the message names the node.
    """
    check_graph(plan, graph)
    if not 0 <= phase < len(plan.phases):
        raise PlanError(f"phase {phase}: the plan has phases 0 to {len(plan.phases) - 1}")
    for step in plan.phases[phase].steps:
        made = find_pass(step.run)
        check_chosen(made, graph, target, step.chosen)
        graph = made.run(graph, target, step.chosen)
        verify(graph)
    return graph


def cutting(plan: Plan) -> Pass | None:
    """The pass of ``plan`` that cuts a step into segments; None where none does.

    Raises:
        PlanError: Several do, or the plan has several phases.
        UsageError, SpecError: A pass of the plan is unknown.
    """
    passes = [find_pass(step.run) for phase in plan.phases for step in phase.steps]
    found = [one for one in passes if type(one).split is not Pass.split]
    if found and len(plan.phases) > 1:
        raise PlanError(f"plan: {found[0].name} cuts a step into segments; give it one phase, not {len(plan.phases)}")
    if len(found) > 1:
        names = " and ".join(one.name for one in found)
        raise PlanError(f"plan: {names} cut a step into segments each; leave all but one of them out")
    return found[0] if found else None


def segments(plan: Plan, graph: Graph) -> tuple[Graph, ...]:
    """What the plan's cutting pass makes of ``graph``, which all its passes left; ``graph`` alone where none cuts.

    Raises:
        PlanError: As of ``cutting``.
        Unsupported: There is nothing to cut.
        InvalidGraph: The pass made a broken segment.
    """
    pass_ = cutting(plan)
    made = pass_.split(graph) if pass_ else (graph,)
    for segment in made:
        verify(segment)
    return made


def check_graph(plan: Plan, graph: Graph) -> None:
    """Raise PlanError if the plan was made for another graph."""
    if plan.graph != graph.fingerprint:
        raise PlanError(
            f"graph {graph.name}: its fingerprint is {graph.fingerprint}, the plan was made for {plan.graph}; "
            "search again, or give the graph that the plan was made for"
        )


def run_passes(texts: Sequence[str], graph: Graph, target: Target) -> Graph:
    """The graph that passes make of ``graph`` with nothing chosen, as a backend asks for it; errors as of ``apply``."""
    for text in texts:
        graph = find_pass(text).run(graph, target, {})
        verify(graph)
    return graph
