"""The main job, one function a verb: trace, search, explain, export, verify, run, bench, optimize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from intarsia import subject as subjects
from intarsia.backends.base import Backend, find_backend
from intarsia.backends.bundle import Bundle, Chosen, load_bundle
from intarsia.backends.making import Build, Planned
from intarsia.backends.null import NullEngine
from intarsia.backends.packing import add_report, write_bundle
from intarsia.backends.runner import denoiser
from intarsia.backends.verify import VerifyReport, verify_bundle
from intarsia.bit_flow import Samples, searched_bits
from intarsia.evidence import evidence, sample_inputs, verify_phases, verify_quality
from intarsia.head_flow import searched_heads
from intarsia.ir.errors import NoGain, UsageError
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.spec import Spec, construct
from intarsia.ir.target import Target, load_target
from intarsia.looped import timing_of
from intarsia.models.sampler import FlowMatchEuler
from intarsia.passes.apply import run_passes
from intarsia.passes.base import find_pass
from intarsia.programs import planned, predicted
from intarsia.search.bit_settings import BitSearch
from intarsia.search.explain import Explanation
from intarsia.search.explain import explain as explain_plan
from intarsia.search.head_settings import HeadSearch
from intarsia.search.journal import open_journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal
from intarsia.search.search import SearchResult
from intarsia.search.search import search as find_plan
from intarsia.search.step_search import StepSearch
from intarsia.step_flow import bundle_denoising, export_inputs, searched_steps, stepping
from intarsia.subject import Subject

if TYPE_CHECKING:
    from intarsia.ir.exported import Dynamic
    from intarsia.models.sampler import Denoise

PASSES = ("quantize-linear",)
"""The passes that a search decides about when the user names none."""

PLACES = "places"
"""The search that weighs every place of every pass alike."""


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
    quality: str | None = None,
    passes: Sequence[str] = PASSES,
    strategy: str = PLACES,
    minimize: str = "both",
    effort: str = "default",
    seed: int = 0,
    weights: Path | None = None,
    sampler: Path | None = None,
    fresh: bool = False,
    budget: float | None = None,
    fail_on_no_gain: bool = False,
    samples: Samples | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The plan that makes the model cheapest on ``target`` within ``quality``, by calibration and validation noise.

    Args:
        model: A name of the registry, a ``.graph`` file, or a subject that is resolved already.
        target: A shipped machine or the path of a TOML file.
        quality: Lower bounds against the unchanged model, such as ``"psnr>=35,motion_psnr>=30"``.
        passes: Whose questions are asked, in the order in which they run.
        strategy: ``places``, one answer for the whole loop from errors of every place alone;
            ``heads(key=value)``, patterns of attention heads by phases of the loop, see ``search.heads.HeadSearch``;
            ``bits(key=value)``, bits of every layer in integers, see ``search.bit_settings.BitSearch``; or
            ``steps(key=value)``, which tokens the loop computes when, see ``search.step_search.StepSearch``.
        minimize: ``seconds``, ``bytes``, or ``both`` (the sum of both, each relative to the unchanged model).
        budget: Seconds for the search; what is best by then is the answer.
        sampler: A file that describes another denoising loop than the model's own, see ``models.sampler_files``.
        fresh: Ignore what earlier searches have measured.
        samples: What a network without a loop is measured on, for ``bits`` alone.

    Raises:
        QualityError: No plan reaches the quality.
        NoGain: With ``fail_on_no_gain``, nothing is better than the unchanged model.
    """
    progress = progress or Silent()
    goal, machine, chosen = Goal.parse(quality) if quality else None, load_target(target), list(map(find_pass, passes))
    how = _strategy(strategy)
    if how is None and goal is None:
        raise UsageError(
            '--quality is missing, such as --quality "psnr>=35"; only --strategy heads, bits and steps can do without'
        )
    if isinstance(how, BitSearch | StepSearch) and tuple(passes) != PASSES:
        raise UsageError(f"strategy {Spec.parse(strategy).name}: it has passes of its own; leave --pass out")
    if samples is not None and not isinstance(how, BitSearch):
        raise UsageError(f"--data is what --strategy bits is measured on; --strategy {strategy} takes none")
    subject = model if isinstance(model, Subject) else _search_subject(model, how, weights, progress, sampler)
    if subject.program.is_meta and not (isinstance(how, HeadSearch) and how.table):
        raise UsageError(f"{subject.name}: a search measures quality and needs weights; give --weights")
    if how is None:
        assert goal is not None
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
    elif isinstance(how, BitSearch):
        result = searched_bits(
            subject,
            machine,
            goal,
            how=how,
            samples=samples,
            minimize=minimize,
            effort=effort,
            seed=seed,
            fresh=fresh,
            budget=budget,
            weights=weights,
            progress=progress,
        )
    elif isinstance(how, StepSearch):
        result = searched_steps(
            subject, machine, goal, how=how, effort=effort, seed=seed, fresh=fresh, budget=budget, progress=progress
        )
    else:
        result = searched_heads(
            subject,
            machine,
            chosen,
            goal,
            how=how,
            effort=effort,
            seed=seed,
            fresh=fresh,
            budget=budget,
            notations=passes,
            progress=progress,
        )
    if fail_on_no_gain and result.gain <= 0:
        within = quality or strategy
        raise NoGain(f"{subject.name}: no plan on {target} is better than the unchanged model within {within}")
    return result


Strategy = HeadSearch | BitSearch | StepSearch
"""How heads, bits or steps are searched."""

STRATEGIES: Mapping[str, type[Strategy]] = {"heads": HeadSearch, "bits": BitSearch, "steps": StepSearch}


def _strategy(text: str) -> Strategy | None:
    """What ``name(key=value)`` stands for; None for the search over all places."""
    spec = Spec.parse(text)
    if spec.name in STRATEGIES:
        return construct(STRATEGIES[spec.name], spec)
    if str(spec) != PLACES:
        known = ", ".join([PLACES, *(f"{name}(key=value)" for name in STRATEGIES)])
        raise UsageError(f"--strategy {text!r} is unknown. Known: {known}")
    return None


def _search_subject(
    model: str | Path, how: Strategy | None, weights: Path | None, progress: Progress, sampler: Path | None
) -> Subject:
    """The model with its weights; on the meta device where a table stands for all that would be measured."""
    if not isinstance(how, HeadSearch) or not how.table:
        return _resolve(model, weights, progress, sampler)
    progress.start(f"trace {model}", None)
    subject = subjects.with_sampler(subjects.resolve(model, meta=True), sampler)
    progress.finish()
    return subject


def explain(
    model: str | Path,
    plan: Plan | None = None,
    *,
    passes: Sequence[str] = (),
    target: str | None = None,
    weights: Path | None = None,
) -> Explanation:
    """For each place: what could be chosen, what was, what each option costs and loses, and why.

    Without a plan, what ``passes`` offer on ``target`` and what they refuse; the model is then traced without memory
    for weights.

    Raises:
        UsageError: Neither a plan nor passes with a target, or both.
    """
    if (plan is None) == (not passes) or (plan is None and target is None):
        raise UsageError("explain takes a plan (--plan), or passes and a machine (--pass and --target)")
    if plan is None:
        graph = subjects.resolve(model, meta=True, weights=weights).program.graph
        plan = Plan(graph.fingerprint, str(target), (Phase(tuple(Step(text) for text in passes)),))
    else:
        graph = _resolve(model, weights, Silent()).program.graph
    return explain_plan(plan, graph, load_target(target or plan.target), subjects.smallest_sizes(graph))


def export(
    model: str | Path | Subject,
    plan: Plan | None,
    *,
    backends: Sequence[str],
    target: str,
    output: Path,
    passes: Sequence[str] = (),
    weights: Path | None = None,
    sampler: Path | None = None,
    quality: str | None = None,
    effort: str = "default",
    seed: int = 0,
    config: Mapping[str, object] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Bundle:
    """Build engines of the model under ``plan`` (None: unchanged), measure one, and write the bundle with its report.

    Args:
        sampler: A file that describes another denoising loop than the model's own, see ``models.sampler_files``.
        backends: What engines are built with, ``name(key=value)``; one bundle holds one engine of each.
        passes: Passes that run as they are, without a choice, where there is no plan.
        quality: Goal that the engine that would be chosen here must meet.

    Raises:
        Unsupported: Operators that a backend cannot take, all at once.
        QualityError: ``quality`` is asked for and the engine misses it on held-out noise; nothing is written.
        PlanError: The plan is not for this graph, or its phases are not those of the model's sampler.
        MissingEnvironment: A package or a compiler that a backend needs is not there, or ``quality`` is asked for and
            nothing runs here.
    """
    progress = progress or Silent()
    goal, machine, builders = Goal.parse(quality) if quality else None, load_target(target), _backends(backends)
    subject = model if isinstance(model, Subject) else _resolve(model, weights, progress, sampler)
    graph = subject.program.graph
    if plan and passes:
        raise UsageError("--plan and --pass exclude each other: a plan says itself which passes run")
    if passes:
        plan = Plan(graph.fingerprint, machine.name, (Phase(tuple(Step(text, {}) for text in passes)),))
    progress.start("build weights", None)
    made = planned(subject, plan, machine)
    parts = [_built_with(builders, program, machine) for program in made.segments]
    steps = {
        phase: Planned(program, ()) if parts else _built_with(builders, program, machine)
        for phase, program in made.programs.items()
    }
    loop = subject.model.sampler if subject.model else None
    bundle = write_bundle(
        output,
        program=made.first,
        plan=plan,
        builds=steps.pop(0).builds,
        target=machine,
        phases=made.phases,
        later=steps,
        segments=parts,
        inputs=export_inputs(subject, made.first),
        sampler=loop.to_json() if loop else None,
        predicted=predicted(subject, made, plan, machine, backends=[builder.name for builder in builders]),
        command=command,
        config=config or {},
        evidence=lambda chosen: evidence(
            subject,
            chosen and stepping(chosen, made.first.graph, plan, subject),
            changed=plan is not None,
            phases=made.phases,
            goal=goal,
            effort=effort,
            seed=seed,
            progress=progress,
        ),
        progress=lambda stage: progress.start(stage, None),
    )
    progress.finish()
    return _with_report(bundle)


def optimize(
    model: str | Path,
    *,
    target: str,
    quality: str | None = None,
    backends: Sequence[str] = ("onnx",),
    output: Path,
    passes: Sequence[str] = PASSES,
    strategy: str = PLACES,
    minimize: str = "both",
    effort: str = "default",
    seed: int = 0,
    weights: Path | None = None,
    sampler: Path | None = None,
    fresh: bool = False,
    budget: float | None = None,
    fail_on_no_gain: bool = False,
    samples: Samples | None = None,
    config: Mapping[str, object] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Bundle:
    """Search, export, verify and report in one go; the arguments are those of ``search`` and ``export``."""
    progress = progress or Silent()
    _backends(backends)
    subject = _resolve(model, weights, progress, sampler)
    result = search(
        subject,
        target=target,
        quality=quality,
        passes=passes,
        strategy=strategy,
        minimize=minimize,
        effort=effort,
        seed=seed,
        weights=weights,
        fresh=fresh,
        budget=budget,
        fail_on_no_gain=fail_on_no_gain,
        samples=samples,
        progress=progress,
    )
    bundle = export(
        subject,
        result.plan,
        backends=backends,
        target=target,
        output=output,
        quality=quality,
        effort=effort,
        seed=seed,
        config=config,
        command=command,
        progress=progress,
    )
    verify(bundle.folder, reference=True, progress=progress)
    return bundle


def verify(
    folder: Path,
    *,
    full: bool = False,
    engine: str | None = None,
    reference: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every file and claim of a bundle; ``full`` also makes the held-out videos again and compares the quality.

    ``engine`` and ``reference`` are those of ``backends.verify.verify_bundle``.

    Raises:
        UsageError: The folder is no bundle.
        QualityError: A claim does not hold; names the file or the claim.
    """
    progress = progress or Silent()
    report = verify_bundle(
        folder, engine=engine, reference=reference, progress=lambda stage: progress.start(stage, None)
    )
    bundle = load_bundle(folder)
    if bundle.phases:
        report = replace(report, checks=(*report.checks, verify_phases(bundle)))
    if full:
        report = replace(report, checks=(*report.checks, verify_quality(bundle, progress)))
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
    engine: str | None = None,
    reference: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Path], Chosen]:
    """Make ``count`` videos of each prompt: a GIF each, and a contact sheet of all; the files, and the engine taken.

    Where steps compute some of the tokens there is a map and an animation of the last video's too.

    Args:
        engine: The backend whose engine runs; the preferred one of those that run here otherwise.
        reference: Where none runs here, run an engine's reference: the same files by other, slower means.

    Raises:
        UsageError: The bundle holds no sampler or its model knows no prompts.
        MissingEnvironment: No engine runs here.
    """
    from intarsia.backends.writing import new_file
    from intarsia.pictures import write_videos
    from intarsia.step_pictures import step_pictures

    progress = progress or Silent()
    bundle = load_bundle(folder)
    model = subjects.registered(bundle.graph.name)
    if bundle.sampler is None or model is None or model.condition is None:
        raise UsageError(f"{folder}: {bundle.graph.name} makes no videos from prompts; use load(folder).engine()")
    asked = [prompt for prompt in prompts or model.prompts[:4] for _ in range(count)]
    sampler = FlowMatchEuler.from_json(bundle.sampler)
    progress.start("videos", len(asked) * sampler.steps)
    chosen = bundle.choose(engine, reference=reference)
    looped, graph = bundle_denoising(bundle, chosen.engine)
    denoise = cast("Denoise", denoiser(looped, graph))
    videos = subjects.sampled(denoise, bundle.graph, model, sampler, asked, seed=seed, progress=progress)
    progress.finish()
    files = write_videos(videos, asked, output)
    for name, picture in step_pictures(looped, videos[-1], sampler).items():
        with new_file(output / name) as draft:
            draft.write_bytes(picture)
        files.append(output / name)
    return files, chosen


def bench(
    subject: str | Path,
    *,
    engine: str | None = None,
    repeats: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Seconds of one call: of a bundle's engine, or of a model run eagerly through PyTorch. Median and quartiles.

    Of a bundle with phases, or whose steps compute some of the tokens or run something once for each prompt, they are
    means over the loop's calls, and ``phases``, ``segments`` and ``loop_seconds`` say more.
    ``engine`` names the backend whose engine is timed; the preferred one of those that run here otherwise.
    """
    progress = progress or Silent()
    if Path(subject).is_dir():
        bundle = load_bundle(Path(subject))
        chosen = bundle.choose(engine)
        (timed, graph), title, why = bundle_denoising(bundle, chosen.engine), chosen.name, chosen.why
        inputs, phases = bundle.sample.inputs[: len(graph.inputs)], bundle.phases
        sampler = FlowMatchEuler.from_json(bundle.sampler) if bundle.sampler else None
    elif engine:
        raise UsageError(f"{subject} is no bundle, whose engine {engine} could be timed; a model runs eagerly")
    else:
        found = _resolve(subject, None, progress)
        timed, title, why = NullEngine(materialize(found.program)), "eager", "a model, which PyTorch runs"
        graph, phases, sampler = found.program.graph, (), None
        inputs = sample_inputs(found) or example_inputs(graph, seed=seed)
    progress.start("time engine", None)
    timing = timing_of(timed, inputs, graph=graph, phases=phases, sampler=sampler, repeats=repeats)
    progress.finish()
    facts = {"what": str(subject), "engine": title, "why": why, **timing.to_json()}
    return {**facts, "threads": torch.get_num_threads()}


def _built_with(backends: Sequence[Backend], program: Program, target: Target) -> Planned:
    return Planned(program, [Build(backend, _prepared(program, backend, target)) for backend in backends])


def _prepared(program: Program, backend: Backend, target: Target) -> Program:
    """The program as the backend's passes leave it; what they add to weights has run."""
    graph = run_passes(backend.passes, program.graph, target)
    return program if graph is program.graph else materialize(replace(program, graph=graph))


def _backends(texts: Sequence[str]) -> list[Backend]:
    found = [find_backend(text) for text in texts]
    for name, count in Counter(backend.name for backend in found).items():
        if count > 1:
            raise UsageError(f"--backend {name} is given {count} times; a bundle holds one engine of each backend")
    return found


def _resolve(model: str | Path, weights: Path | None, progress: Progress, sampler: Path | None = None) -> Subject:
    progress.start(f"trace {model}", None)
    subject = subjects.with_sampler(subjects.resolve(model, weights=weights), sampler)
    progress.finish()
    return subject


def _with_report(bundle: Bundle) -> Bundle:
    from intarsia.report import render

    return add_report(bundle, render(bundle.folder))
