"""What was found out about an engine: quality on held-out noise, what a clock says, and whether both come out again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from intarsia import subject as subjects
from intarsia.backends.bundle import Bundle, Chosen
from intarsia.backends.null import NullEngine
from intarsia.backends.packing import Evidence
from intarsia.backends.runner import bench as time_engine
from intarsia.backends.verify import PASSED, Check
from intarsia.ir.errors import MissingEnvironment, QualityError, UsageError
from intarsia.ir.program import example_inputs, materialize
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal, Quality, measure
from intarsia.subject import Subject

SHEET_SAMPLES = 6
"""Held-out videos shown side by side in the picture of a bundle."""


def evidence(
    subject: Subject, chosen: Chosen | None, *, goal: Goal | None, effort: str, seed: int, progress: Progress
) -> Evidence:
    """Quality of the engine on held-out noise against the unchanged model, and what a clock says of both."""
    from intarsia.pictures import side_by_side

    if chosen is None:
        if goal is None:
            return Evidence()
        raise MissingEnvironment(
            f"{subject.name}: {goal} cannot be measured, since no engine runs here; "
            "export without --quality, and verify where it runs"
        )
    engine = chosen.engine
    work = subjects.workload(subject, seed=seed, effort=effort, progress=progress, record=False)
    dense = NullEngine(materialize(subject.program))
    started = time.perf_counter()
    references = work.outputs(dense, "held-out", progress)
    dense_seconds = time.perf_counter() - started
    started = time.perf_counter()
    ours = work.outputs(engine, "held-out", progress)
    engine_seconds = time.perf_counter() - started
    quality = measure(ours, references)
    if goal is not None and not goal.met(quality):
        raise QualityError(
            f"{subject.name}: on held-out noise the engine reaches {goal.reached(quality)}; nothing is written. "
            "Ask for less, or search with --effort full"
        )
    inputs = sample_inputs(subject) or example_inputs(subject.program.graph, seed=seed)
    progress.start("time engine", None)
    measurements = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": engine.device,
        "threads": torch.get_num_threads(),
        "eager": asdict(time_engine(dense, inputs)),
    }
    if not chosen.on_reference:
        measurements |= {
            "engine": asdict(time_engine(engine, inputs)),
            "held_out_seconds": {"engine": engine_seconds, "eager": dense_seconds},
        }
    facts = {
        "engine": {"name": chosen.name, "on_reference": chosen.on_reference},
        "goal": str(goal) if goal else None,
        "against": "the unchanged model run eagerly, same noise and prompts",
        "unchanged": {"graph": subject.program.graph.fingerprint, "weights": subject.program.fingerprint()},
        "workload": dict(work.describe),
        "metrics": quality.to_json(),
    }
    frames = side_by_side(references[:SHEET_SAMPLES], ours[:SHEET_SAMPLES]) if references.ndim == 5 else None
    return Evidence(quality=facts, measurements=measurements, frames=frames)


def verify_quality(bundle: Bundle, progress: Progress) -> Check:
    """Make the held-out outputs again through engine and unchanged model; the claimed means must come out."""
    claimed = bundle.manifest["quality"]
    if not claimed:
        return Check("quality", PASSED, "none is claimed: no engine ran where the bundle was made")
    workload = claimed["workload"]
    progress.start(f"trace {bundle.graph.name}", None)
    subject = subjects.resolve(bundle.graph.name)
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
    quality = measure(work.outputs(chosen.engine, "held-out", progress), references)
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
