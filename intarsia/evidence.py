"""What was found out about an engine: quality on held-out noise, what a clock says, and whether both come out again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from intarsia import subject as subjects
from intarsia.backends.base import Engine
from intarsia.backends.bundle import FRAMES, PLAN, SAMPLER, Bundle, Chosen
from intarsia.backends.null import NullEngine
from intarsia.backends.packing import Evidence
from intarsia.backends.phases import StepRange, same_ranges, step_ranges, title
from intarsia.backends.runner import bench_loop
from intarsia.backends.verify import PASSED, Check
from intarsia.ir.errors import MissingEnvironment, PlanError, QualityError, UsageError
from intarsia.ir.program import example_inputs, materialize
from intarsia.looped import looped, timing_of
from intarsia.models.sampler import FlowMatchEuler
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal, Quality, measure
from intarsia.search.workload import Workload
from intarsia.step_pictures import step_pictures
from intarsia.subject import Subject

SHEET_SAMPLES = 6
"""Held-out videos shown side by side in the picture of a bundle."""


def evidence(
    subject: Subject,
    chosen: Chosen | None,
    *,
    changed: bool,
    phases: Sequence[StepRange] = (),
    goal: Goal | None,
    effort: str,
    seed: int,
    progress: Progress,
) -> Evidence:
    """Quality of the engine on held-out noise against the unchanged model, and what a clock says of both.

    Quality is measured where a goal is asked for, and where a plan has changed the model and an engine runs here. An
    engine of the unchanged model agrees with it within the element type's tolerance, which is checked in any case; a
    reference that runs in an engine's place is slow, and its seconds say nothing.

    Raises:
        QualityError: The engine misses the goal.
        MissingEnvironment: There is a goal, and nothing runs here.
    """
    if chosen is None:
        if goal is None:
            return Evidence()
        raise MissingEnvironment(
            f"{subject.name}: {goal} cannot be measured, since no engine runs here; "
            "export without --quality, and verify where it runs"
        )
    dense = NullEngine(materialize(subject.program))
    facts: dict[str, object] = {}
    pictures: dict[str, bytes] = {}
    if goal is not None or (changed and not chosen.on_reference):
        work = subjects.workload(subject, seed=seed, effort=effort, progress=progress, record=False)
        references = work.outputs(dense, "held-out", progress)
        ours = work.outputs(chosen.engine, "held-out", progress)
        facts = _quality(subject, chosen, measure(ours, references), goal, work)
        pictures = _pictures(references, ours, chosen.engine, subject)
    timings = (
        {}
        if chosen.on_reference
        else _timings(subject, chosen.engine, dense, phases=phases, seed=seed, progress=progress)
    )
    return Evidence(facts, timings, pictures)


def _quality(
    subject: Subject, chosen: Chosen, quality: Quality, goal: Goal | None, work: Workload
) -> dict[str, object]:
    """The claim about quality; QualityError if it misses the goal."""
    if goal is not None and not goal.met(quality):
        raise QualityError(
            f"{subject.name}: on held-out noise the engine reaches {goal.reached(quality)}; nothing is written. "
            "Ask for less, or search with --effort full"
        )
    return {
        "engine": {"name": chosen.name, "on_reference": chosen.on_reference},
        "goal": str(goal) if goal else None,
        "against": "the unchanged model run eagerly, same noise and prompts",
        "unchanged": {"graph": subject.program.graph.fingerprint, "weights": subject.program.fingerprint()},
        "workload": dict(work.describe),
        "metrics": quality.to_json(),
    }


def _pictures(references: Tensor, ours: Tensor, engine: Engine, subject: Subject) -> dict[str, bytes]:
    """Where outputs (N, C, F, H, W) are videos, the first side by side, and of the last which tokens steps computed."""
    from intarsia.pictures import side_by_side

    if references.ndim != 5:
        return {}
    found = {FRAMES: side_by_side(references[:SHEET_SAMPLES], ours[:SHEET_SAMPLES])}
    sampler = subject.model.sampler if subject.model else None
    return found | (step_pictures(engine, ours[-1], sampler) if sampler else {})


def _timings(
    subject: Subject,
    engine: Engine,
    dense: NullEngine,
    *,
    phases: Sequence[StepRange],
    seed: int,
    progress: Progress,
) -> dict[str, object]:
    graph = subject.program.graph
    inputs = sample_inputs(subject) or example_inputs(graph, seed=seed)
    progress.start("time engine", None)
    sampler = subject.model.sampler if subject.model else None
    timing = timing_of(engine, inputs, graph=graph, phases=phases, sampler=sampler)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": engine.device,
        "threads": torch.get_num_threads(),
        "engine": timing.to_json(),
        "eager": bench_loop(dense, inputs, graph=graph).to_json(),
    }


def verify_phases(bundle: Bundle) -> Check:
    """The steps of each phase are those that plan and sampler give; QualityError otherwise."""
    if bundle.plan is None or bundle.sampler is None:
        raise QualityError(f"{bundle.folder}: it claims phases, and holds no plan or no sampler that has any")
    programs = [one.program for one in bundle.phases]
    try:
        timesteps = FlowMatchEuler.from_json(bundle.sampler).timesteps()
        expected = step_ranges(bundle.plan.phases, timesteps, programs=programs)
    except (PlanError, UsageError) as error:
        raise QualityError(f"{bundle.folder}: {error}") from error
    if not same_ranges(expected, bundle.phases):
        raise QualityError(f"{bundle.folder}: the manifest's phases are not those of {PLAN} and {SAMPLER}")
    told = ", ".join(title(bundle.phases, variant.phase) for variant in bundle.variants)
    return Check("phases", PASSED, f"{told}, as plan and sampler say")


def verify_quality(bundle: Bundle, progress: Progress) -> Check:
    """Make the held-out outputs again through engine and unchanged model; the claimed means must come out."""
    claimed = bundle.manifest["quality"]
    if not claimed:
        return Check("quality", PASSED, "none is claimed beyond agreement with the reference")
    workload = claimed["workload"]
    progress.start(f"trace {bundle.graph.name}", None)
    subject = subjects.resolve(bundle.graph.name)
    if subject.model is not None and bundle.sampler is not None:
        loop = FlowMatchEuler.from_json(bundle.sampler)
        subject = replace(subject, model=replace(subject.model, sampler=loop))
    progress.finish()
    found = {"graph": subject.program.graph.fingerprint, "weights": subject.program.fingerprint()}
    if found != claimed["unchanged"]:
        raise UsageError(
            f"{bundle.folder}: its quality was measured against {_pair(claimed['unchanged'])}; {subject.name} here is "
            f"{_pair(found)}, so --full cannot repeat it; verify without --full checks everything else"
        )
    work = subjects.workload(subject, seed=workload["seed"], effort=workload["effort"], progress=progress, record=False)
    references = work.outputs(NullEngine(materialize(subject.program)), "held-out", progress)
    chosen = bundle.choose(claimed["engine"]["name"], reference=claimed["engine"]["on_reference"])
    sampler = subject.model.sampler if subject.model else None
    engine = looped(chosen.engine, bundle.graph, bundle.plan, sampler, subject.program.graph)
    quality = measure(work.outputs(engine, "held-out", progress), references)
    for name, metric in Quality.from_json(claimed["metrics"]).metrics.items():
        if abs(quality[name].mean - metric.mean) > max(0.05, 0.002 * abs(metric.mean)):
            raise QualityError(
                f"{bundle.folder}: {name} on held-out noise is {quality[name].mean:.2f}, claimed is {metric.mean:.2f}"
            )
    return Check("quality", PASSED, f"held-out noise gives {quality}, as claimed")


def _pair(fingerprints: Mapping[str, str]) -> str:
    return f"graph {fingerprints['graph']} with weights {fingerprints['weights']}"


def sample_inputs(subject: Subject) -> tuple[Tensor, ...] | None:
    """The model's own example inputs in the graph's order, where it is a registered one."""
    if subject.model is None:
        return None
    examples = subject.model.inputs()
    graph = subject.program.graph
    if any(value.name not in examples for value in graph.inputs):
        return None
    return tuple(examples[value.name] for value in graph.inputs)
