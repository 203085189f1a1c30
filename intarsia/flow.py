"""The main job, one function a verb: trace, search, explain, export, verify, run, bench, optimize."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from intarsia import subject as subjects
from intarsia.backends.base import Engine, find_backend
from intarsia.backends.bundle import Bundle, Evidence, add_report, load_bundle, write_bundle
from intarsia.backends.null import NullEngine
from intarsia.backends.runner import bench as time_engine
from intarsia.backends.runner import denoiser
from intarsia.backends.verify import Check, VerifyReport, verify_bundle
from intarsia.ir.errors import NoGain, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.models.sampler import FlowMatchEuler
from intarsia.passes.apply import apply
from intarsia.passes.base import find_pass
from intarsia.search.explain import Explanation
from intarsia.search.explain import explain as explain_plan
from intarsia.search.journal import open_journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal, Quality, measure
from intarsia.search.roofline import Prediction, predict
from intarsia.search.search import SearchResult
from intarsia.search.search import search as find_plan
from intarsia.search.work import attention_sites, summary
from intarsia.subject import Subject

if TYPE_CHECKING:
    from intarsia.ir.exported import Dynamic
    from intarsia.models.sampler import Denoise

PASSES = ("quantize-linear",)
"""The passes that a search decides about when the user names none."""

SHEET_SAMPLES = 6
"""Held-out videos shown side by side in the picture of a bundle."""


def trace(
    model: str | Path | nn.Module,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    static: Mapping[str, object] | None = None,
    dynamic: Dynamic | None = None,
    meta: bool = False,
    raw: bool = False,
    weights: Path | None = None,
) -> Program:
    """The model as a graph with weights; see ``intarsia.subject.resolve`` for the arguments and errors."""
    return subjects.resolve(
        model, inputs=inputs, static=static, dynamic=dynamic, meta=meta, raw=raw, weights=weights
    ).program


def search(
    model: str | Path | Subject,
    *,
    target: str,
    quality: str,
    passes: Sequence[str] = PASSES,
    minimize: str = "both",
    effort: str = "default",
    seed: int = 0,
    weights: Path | None = None,
    fresh: bool = False,
    budget: float | None = None,
    fail_on_no_gain: bool = False,
    progress: Progress | None = None,
) -> SearchResult:
    """The plan that makes the model cheapest on ``target`` within ``quality``, by calibration and validation noise.

    Args:
        model: A name of the registry, a ``.graph`` file, or a subject that is resolved already.
        target: A shipped machine or the path of a TOML file.
        quality: Lower bounds against the unchanged model, such as ``"psnr>=35,motion_psnr>=30"``.
        passes: Whose questions are asked, in the order in which they run.
        minimize: ``seconds``, ``bytes``, or ``both`` (the sum of both, each relative to the unchanged model).
        budget: Seconds for the search; what is best by then is the answer.
        fresh: Ignore what earlier searches have measured.

    Raises:
        QualityError: No plan reaches the quality.
        NoGain: With ``fail_on_no_gain``, nothing is better than the unchanged model.
    """
    progress = progress or Silent()
    goal, machine, chosen = Goal.parse(quality), load_target(target), [find_pass(text) for text in passes]
    subject = model if isinstance(model, Subject) else _resolve(model, weights, progress)
    if subject.program.is_meta:
        raise UsageError(f"{subject.name}: a search measures quality and needs weights; give --weights")
    work = subjects.workload(subject, seed=seed, effort=effort, progress=progress)
    result = find_plan(
        subject.program,
        machine,
        chosen,
        work,
        goal,
        minimize=minimize,
        effort=effort,
        seed=seed,
        journal=open_journal(subject.program, work, fresh=fresh),
        budget=budget,
        notations=passes,
        progress=progress,
    )
    if fail_on_no_gain and result.gain <= 0:
        raise NoGain(f"{subject.name}: no plan on {target} is better than the unchanged model within {quality}")
    return result


def explain(model: str | Path, plan: Plan, *, target: str | None = None, weights: Path | None = None) -> Explanation:
    """For each place: what could be chosen, what was, what each option costs and loses, and why."""
    graph = _resolve(model, weights, Silent()).program.graph
    return explain_plan(plan, graph, load_target(target or plan.target), subjects.smallest_sizes(graph))


def export(
    model: str | Path | Subject,
    plan: Plan | None,
    *,
    backend: str,
    target: str,
    output: Path,
    weights: Path | None = None,
    quality: str | None = None,
    effort: str = "default",
    seed: int = 0,
    config: Mapping[str, object] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Bundle:
    """Build the engine of the model under ``plan`` (None: unchanged), measure it, and write the bundle with its report.

    Raises:
        Unsupported: Operators that the backend cannot take, all at once.
        QualityError: ``quality`` is asked for and the engine misses it on held-out noise; nothing is written.
        PlanError: The plan is not for this graph.
    """
    progress = progress or Silent()
    goal, machine, builder = Goal.parse(quality) if quality else None, load_target(target), find_backend(backend)
    subject = model if isinstance(model, Subject) else _resolve(model, weights, progress)
    graph = subject.program.graph
    if plan and len(plan.phases) > 1:
        raise Unsupported(f"{subject.name}: the plan has {len(plan.phases)} phases; an engine takes one, merge them")
    planned = apply(plan, graph, machine) if plan else graph
    progress.start("build weights", None)
    program = materialize(replace(subject.program, graph=planned))
    sampler = subject.model.sampler if subject.model else None
    bundle = write_bundle(
        output,
        program=program,
        plan=plan,
        backend=builder,
        target=machine,
        inputs=_sample_inputs(subject),
        sampler=sampler.to_json() if sampler else None,
        predicted=_predicted(subject, program.graph, machine),
        command=command,
        config=config or {},
        evidence=lambda engine: _evidence(subject, engine, goal=goal, effort=effort, seed=seed, progress=progress),
        progress=lambda stage: progress.start(stage, None),
    )
    progress.finish()
    return _with_report(bundle)


def optimize(
    model: str | Path,
    *,
    target: str,
    quality: str,
    backend: str = "onnx",
    output: Path,
    passes: Sequence[str] = PASSES,
    minimize: str = "both",
    effort: str = "default",
    seed: int = 0,
    weights: Path | None = None,
    fresh: bool = False,
    budget: float | None = None,
    fail_on_no_gain: bool = False,
    config: Mapping[str, object] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Bundle:
    """Search, export, verify and report in one go; the arguments are those of ``search`` and ``export``."""
    progress = progress or Silent()
    find_backend(backend)
    subject = _resolve(model, weights, progress)
    result = search(
        subject,
        target=target,
        quality=quality,
        passes=passes,
        minimize=minimize,
        effort=effort,
        seed=seed,
        fresh=fresh,
        budget=budget,
        fail_on_no_gain=fail_on_no_gain,
        progress=progress,
    )
    bundle = export(
        subject,
        result.plan,
        backend=backend,
        target=target,
        output=output,
        quality=quality,
        effort=effort,
        seed=seed,
        config=config,
        command=command,
        progress=progress,
    )
    verify(bundle.folder, progress=progress)
    return bundle


def verify(folder: Path, *, full: bool = False, progress: Progress | None = None) -> VerifyReport:
    """Check every file and claim of a bundle; ``full`` also makes the held-out videos again and compares the quality.

    Raises:
        UsageError: The folder is no bundle.
        QualityError: A claim does not hold; names the file or the claim.
    """
    progress = progress or Silent()
    report = verify_bundle(folder, progress=lambda stage: progress.start(stage, None))
    if full:
        report = replace(report, checks=(*report.checks, _verify_quality(load_bundle(folder), progress)))
    progress.finish()
    return report


def load(folder: Path) -> Bundle:
    """The bundle in ``folder``; ``load(folder).engine()`` runs it."""
    return load_bundle(folder)


def run(
    folder: Path,
    *,
    output: Path,
    prompts: Sequence[str] = (),
    seed: int = 0,
    count: int = 1,
    progress: Progress | None = None,
) -> list[Path]:
    """Make ``count`` videos of each prompt with the bundle's engine: a GIF each, and a contact sheet of all.

    Raises:
        UsageError: The bundle holds no sampler or its model knows no prompts.
    """
    from intarsia.pictures import write_videos

    progress = progress or Silent()
    bundle = load_bundle(folder)
    model = subjects.registered(bundle.graph.name)
    if bundle.sampler is None or model is None or model.condition is None:
        raise UsageError(f"{folder}: {bundle.graph.name} makes no videos from prompts; use load(folder).engine()")
    asked = [prompt for prompt in prompts or model.prompts[:4] for _ in range(count)]
    sampler = FlowMatchEuler.from_json(bundle.sampler)
    progress.start("videos", len(asked) * sampler.steps)
    denoise = cast("Denoise", denoiser(bundle.engine(), bundle.graph))
    videos = subjects.sampled(denoise, bundle.graph, model, sampler, asked, seed=seed, progress=progress)
    progress.finish()
    return write_videos(videos, asked, output)


def bench(
    subject: str | Path, *, repeats: int = 20, seed: int = 0, progress: Progress | None = None
) -> dict[str, object]:
    """Seconds of one call: of a bundle's engine, or of a model run eagerly through PyTorch. Median and quartiles."""
    progress = progress or Silent()
    if Path(subject).is_dir():
        bundle = load_bundle(Path(subject))
        engine: Engine = bundle.engine()
        inputs, title = bundle.sample.inputs, str(bundle.manifest["backend"]["name"])
    else:
        found = _resolve(subject, None, progress)
        engine, title = NullEngine(materialize(found.program)), "eager"
        inputs = _sample_inputs(found) or example_inputs(found.program.graph, seed=seed)
    progress.start("time engine", None)
    timing = time_engine(engine, inputs, repeats=repeats)
    progress.finish()
    return {"what": str(subject), "engine": title, **asdict(timing), "threads": torch.get_num_threads()}


def inspect(
    subject: str | Path, *, target: str | None = None, sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What a graph computes and moves, its attention sites, and how long ``target`` takes for it.

    ``subject`` is a model (traced without memory for weights), a ``.graph`` file, a bundle's folder or a plan's file.
    """
    path = Path(subject)
    if path.suffix == ".json" and not path.is_dir():
        return {"kind": "plan", **json.loads(Plan.load(path).to_json())}
    if path.is_dir():
        bundle = load_bundle(path)
        return {"kind": "bundle", "manifest": dict(bundle.manifest), **_counted(bundle.graph, target, sizes)}
    return {"kind": "graph", **_counted(subjects.resolve(subject, meta=True).program.graph, target, sizes)}


def _counted(graph: Graph, target: str | None, sizes: Mapping[str, int] | None) -> dict[str, Any]:
    work, sites = summary(graph, sizes), attention_sites(graph, sizes)
    facts: dict[str, Any] = {
        "name": graph.name,
        "fingerprint": graph.fingerprint,
        "nodes": len(graph.nodes),
        "inputs": {value.name: str(value.type) for value in graph.inputs},
        "outputs": {name: str(graph.values[name].type) for name in graph.outputs},
        "sizes": [str(size) for size in graph.sizes],
        "flops": work.flops,
        "flops_by_class": dict(work.flops_by_class),
        "bytes_moved": work.bytes,
        "parameters": work.parameters,
        "weight_bytes": work.weight_bytes,
        "operators_unknown": list(work.unknown),
        "attention_sites": [asdict(site) for site in sites],
    }
    if target is not None:
        predicted = predict(graph, load_target(target), sizes)
        facts |= {"target": target, "predicted_seconds": predicted.seconds, "seconds_by_bound": _by_bound(predicted)}
    return facts


def _by_bound(predicted: Prediction) -> dict[str, float]:
    table: dict[str, float] = {}
    for cost in predicted.nodes.values():
        table[cost.bound] = table.get(cost.bound, 0.0) + cost.seconds
    return table


def _resolve(model: str | Path, weights: Path | None, progress: Progress) -> Subject:
    progress.start(f"trace {model}", None)
    subject = subjects.resolve(model, weights=weights)
    progress.finish()
    return subject


def _sample_inputs(subject: Subject) -> tuple[Tensor, ...] | None:
    """The model's own example inputs in the graph's order, where it is a registered one."""
    if subject.model is None:
        return None
    examples = subject.model.inputs()
    graph = subject.program.graph
    if any(value.name not in examples for value in graph.inputs):
        return None
    return tuple(examples[value.name] for value in graph.inputs)


def _predicted(subject: Subject, graph: Graph, target: Target) -> dict[str, object]:
    """Seconds and weight bytes that the cost model gives the unchanged model and the planned one."""
    sizes = subjects.smallest_sizes(graph)
    before, after = predict(subject.program.graph, target, sizes), predict(graph, target, sizes)
    return {
        "seconds": after.seconds,
        "bytes": after.bytes,
        "baseline_seconds": before.seconds,
        "baseline_bytes": before.bytes,
        "source": f"roofline of {target.name}",
    }


def _evidence(
    subject: Subject, engine: Engine, *, goal: Goal | None, effort: str, seed: int, progress: Progress
) -> Evidence:
    """Quality of the engine on held-out noise against the unchanged model, and what a clock says of both."""
    from intarsia.pictures import side_by_side

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
    inputs = _sample_inputs(subject) or example_inputs(subject.program.graph, seed=seed)
    progress.start("time engine", None)
    timing = time_engine(engine, inputs)
    eager = time_engine(dense, inputs)
    measurements = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": engine.device,
        "threads": torch.get_num_threads(),
        "engine": asdict(timing),
        "eager": asdict(eager),
        "held_out_seconds": {"engine": engine_seconds, "eager": dense_seconds},
    }
    facts = {
        "goal": str(goal) if goal else None,
        "against": "the unchanged model run eagerly, same noise and prompts",
        "unchanged": {"graph": subject.program.graph.fingerprint, "weights": subject.program.fingerprint()},
        "workload": dict(work.describe),
        "metrics": quality.to_json(),
    }
    frames = side_by_side(references[:SHEET_SAMPLES], ours[:SHEET_SAMPLES]) if references.ndim == 5 else None
    return Evidence(quality=facts, measurements=measurements, frames=frames)


def _verify_quality(bundle: Bundle, progress: Progress) -> Check:
    """Make the held-out outputs again through engine and unchanged model; the claimed means must come out."""
    claimed = bundle.manifest["quality"]
    workload = claimed["workload"]
    subject = _resolve(bundle.graph.name, None, progress)
    found = {"graph": subject.program.graph.fingerprint, "weights": subject.program.fingerprint()}
    if found != claimed["unchanged"]:
        raise UsageError(
            f"{bundle.folder}: its quality was measured against {_pair(claimed['unchanged'])}; {subject.name} here is "
            f"{_pair(found)}, so --full cannot repeat it; verify without --full checks everything else"
        )
    work = subjects.workload(subject, seed=workload["seed"], effort=workload["effort"], progress=progress, record=False)
    references = work.outputs(NullEngine(materialize(subject.program)), "held-out", progress)
    quality = measure(work.outputs(bundle.engine(), "held-out", progress), references)
    for name, metric in Quality.from_json(claimed["metrics"]).metrics.items():
        if abs(quality[name].mean - metric.mean) > max(0.05, 0.002 * abs(metric.mean)):
            raise QualityError(
                f"{bundle.folder}: {name} on held-out noise is {quality[name].mean:.2f}, claimed is {metric.mean:.2f}"
            )
    return Check("quality", True, f"held-out noise gives {quality}, as claimed")


def _pair(fingerprints: Mapping[str, str]) -> str:
    return f"graph {fingerprints['graph']} with weights {fingerprints['weights']}"


def _with_report(bundle: Bundle) -> Bundle:
    from intarsia.report import render

    return add_report(bundle, render(bundle.folder))
