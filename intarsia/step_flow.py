"""Step allocation from end to end: the search for a plan, what its engine is fed, and how a sampler calls it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from intarsia import subject as subjects
from intarsia.allocated import step_inputs
from intarsia.backends.base import Engine
from intarsia.backends.bundle import Bundle, Chosen
from intarsia.evidence import sample_inputs
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.looped import around, looped
from intarsia.models.sampler import FlowMatchEuler
from intarsia.passes.active_inputs import StepInputs
from intarsia.search.journal import open_journal
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal
from intarsia.search.search import SearchResult
from intarsia.search.step_search import StepSearch, search_steps
from intarsia.step_bench import StepBench


def searched_steps(
    subject: subjects.Subject,
    target: Target,
    goal: Goal | None,
    *,
    how: StepSearch,
    effort: str,
    seed: int,
    fresh: bool,
    budget: float | None,
    progress: Progress,
) -> SearchResult:
    """The plan of ``search.step_search`` for a model with a loop, its policies run by this machine.

    Raises:
        UsageError: The model has no sampler, or no policy is as quick as asked.
        Unsupported: Something in the model mixes tokens between its blocks.
        QualityError: The best policy misses the goal.
    """
    bench = StepBench(subject, target)
    work = subjects.workload(subject, seed=seed, effort=effort, progress=progress, record=False)
    return search_steps(
        subject.program,
        target,
        work,
        bench,
        goal,
        how=how,
        settings={"goal": str(goal) if goal else None, "effort": effort, "seed": seed},
        journal=open_journal(subject.program, work, fresh=fresh),
        budget=budget,
        progress=progress,
    )


def export_inputs(subject: subjects.Subject, program: Program) -> tuple[Tensor, ...] | None:
    """The model's own example inputs; a graph of active tokens gets half of them, and caches that hold something."""
    own, found = sample_inputs(subject), StepInputs.of(program.graph)
    if found is None or program.is_meta:
        return own
    own = own or example_inputs(subject.program.graph)
    return step_inputs(program.graph, own, found.tokens // 2, run=program.module())


def stepping(chosen: Chosen, graph: Graph, plan: Plan | None, subject: subjects.Subject) -> Chosen:
    """The engine, built from ``graph``, as the model's sampler calls it; errors as of ``looped.looped``."""
    sampler = subject.model.sampler if subject.model else None
    return replace(chosen, engine=looped(chosen.engine, graph, plan, sampler, subject.program.graph))


def bundle_denoising(bundle: Bundle, engine: Engine) -> tuple[Engine, Graph]:
    """A bundle's engine as its sampler calls it, and the graph whose inputs it takes.

    Raises:
        UsageError: A pass puts something around the engine, and the model that has the loop is not registered.
    """
    pass_ = around(bundle.plan)
    if pass_ is None:
        return engine, bundle.graph
    if bundle.sampler is None or subjects.registered(bundle.graph.name) is None:
        raise UsageError(f"{bundle.folder}: {pass_} of {bundle.graph.name} needs its registered model and sampler")
    graph = subjects.resolve(bundle.graph.name, meta=True).program.graph
    return looped(engine, bundle.graph, bundle.plan, FlowMatchEuler.from_json(bundle.sampler), graph), graph
