"""Write a bundle: build the engines, run what runs here, and put it down with every claim, whole or not at all."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.base import Engine
from intarsia.backends.bundle import CONFIG, PLAN, SAMPLER, Bundle, Chosen, fingerprints, load_bundle
from intarsia.backends.by_step import at_step
from intarsia.backends.making import Build, Made, Planned, make_engines, preferred, require_every_support
from intarsia.backends.manifest import (
    MANIFEST,
    MEASUREMENTS,
    PHASED_SCHEMA,
    PHASES,
    REPORT,
    SCHEMA,
    SEGMENTED_SCHEMA,
    SEGMENTS,
    canonical,
    entries_below,
    plain,
    read_sealed,
    sealed,
)
from intarsia.backends.parts import Parts, PhaseParts, SegmentParts
from intarsia.backends.phases import StepRange
from intarsia.backends.segmented import SegmentedEngine
from intarsia.backends.variant import GRAPH, SAMPLE, WEIGHTS, Sample
from intarsia.backends.writing import new_folder, replace_files
from intarsia.ir.errors import QualityError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, example_inputs, save_weights
from intarsia.ir.target import Target

_PACKAGES = (
    "apache-tvm",
    "intarsia",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "triton",
)


@dataclass(frozen=True)
class Evidence:
    """What was found out about an engine before it was shipped.

    Attributes:
        quality: Figures of held-out noise through the engine, with floor and interval; the same on every run.
        measurements: What a clock said: seconds, device, date; differs from run to run.
        pictures: Pictures by the names of their files, such as ``FRAMES``.
    """

    quality: Mapping[str, object] = field(default_factory=dict[str, object])
    measurements: Mapping[str, object] = field(default_factory=dict[str, object])
    pictures: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


def write_bundle(
    folder: Path,
    *,
    program: Program,
    plan: Plan | None,
    builds: Sequence[Build],
    target: Target,
    phases: Sequence[StepRange] = (),
    later: Mapping[int, Planned] | None = None,
    segments: Sequence[Planned] = (),
    inputs: Sequence[Tensor] | None = None,
    sampler: str | None = None,
    predicted: Mapping[str, object] | None = None,
    command: str,
    config: Mapping[str, object] | None = None,
    evidence: Callable[[Chosen | None], Evidence] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Build the engines of ``program``, and of those of later phases, and write the bundle, whole or not at all.

    An engine that this machine cannot run is checked without running it, and its answer to the sample is its
    reference's where it has one; the manifest says so.

    Args:
        folder: Where it goes; an earlier bundle there is replaced once this one is complete.
        program: Materialized: its weight-only nodes have run.
        builds: The engines, one of each backend.
        phases: The loop's phases, where not every step runs ``program``.
        later: The programs of later phases by the number of the first phase that runs them. What they call as
            ``program`` or each other calls it is the same: ``sharing.share_weights`` sees to that.
        segments: What ``program`` was cut into, where each has engines of its own; there are no ``builds`` then.
        inputs: The stored sample's inputs in the graph's order; random ones of the inputs' types otherwise. Of a
            bundle with phases each program's timestep is that of the first step that runs it.
        sampler: The denoising loop as JSON.
        predicted: What the cost model says, in seconds and bytes.
        evidence: Looks at the engine that ``Bundle.choose`` would take, or None if neither an engine nor a reference
            runs here; a QualityError that it raises leaves nothing behind.
        progress: Called with the name of each stage as it starts.

    Raises:
        Unsupported: Operators that the backends cannot take, all at once.
        QualityError: An engine's answer to the sample is not the reference's.
        UsageError: The folder may not be replaced or cannot be written, or the weights are on the meta device.
        MissingEnvironment: The disk is full, or a package that the backend needs is not there.
    """
    say = progress or (lambda _: None)
    phased, cut = PhaseParts(tuple(phases)), SegmentParts(len(segments))
    steps = {0: Planned(program, builds), **(later or {})}
    built, parts = (dict(enumerate(segments)), cut) if segments else (steps, phased)
    require_every_support(built, target)
    claimed = fingerprints(
        {phase: planned.program for phase, planned in steps.items()}, plan, [one.program.graph for one in segments]
    )
    with new_folder(folder, marker=MANIFEST) as partial:
        made = make_engines(built, parts, program.graph, target=target, folder=partial, progress=say)
        say("write weights")
        weights = _write_graphs(partial, steps, phased) | _write_graphs(partial, dict(enumerate(segments)), cut)
        save_weights(weights, partial / WEIGHTS)
        _write_sources(partial, plan, sampler, config or {})
        say("run sample")
        inputs = inputs or example_inputs(program.graph)
        engines = {one.backend.name: one.chosen.engine for one in made if one.chosen}
        for phase, planned in steps.items():
            graph = planned.program.graph
            at = at_step(inputs, graph, phases[phase]) if phases else inputs
            sample = _run_sample(planned.program, made, engines, at, f"{graph.name}{phased.suffix(phase)}")
            _write_sample(partial / phased.folder(phase), graph, sample)
        table = dict(zip(_names(program), inputs, strict=True))
        for number, planned in enumerate(segments):
            sample = _segment_sample(planned.program, number, made, table, cut.suffix(number))
            _write_sample(partial / cut.folder(number), planned.program.graph, sample)
            table |= dict(zip(planned.program.graph.outputs, sample.reference, strict=True))
        say("measure engine")
        found = evidence(preferred(made)) if evidence is not None else Evidence()
        for name, picture in found.pictures.items():
            (partial / name).write_bytes(picture)
        (partial / MEASUREMENTS).write_text(canonical(sealed({"measured": plain(found.measurements), REPORT: None})))
        for path in partial.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        manifest = {
            "schema": SEGMENTED_SCHEMA if segments else PHASED_SCHEMA if phases else SCHEMA,
            "command": command,
            "engines": {one.backend.name: one.claims() for one in made},
            "target": asdict(target),
            "fingerprints": claimed,
            "predicted": predicted or {},
            "quality": found.quality,
            "versions": _versions(),
            "files": entries_below(partial),
            **({PHASES: [one.to_json() for one in phases]} if phases else {}),
            **({SEGMENTS: len(segments)} if segments else {}),
        }
        (partial / MANIFEST).write_text(canonical(sealed(manifest)))
    return load_bundle(folder)


def add_report(bundle: Bundle, html: str) -> Bundle:
    """Write ``report.html`` into the bundle and its hash into ``measurements.json``."""
    entry = {"bytes": len(html.encode()), "sha256": hashlib.sha256(html.encode()).hexdigest()}
    return _rewrite_measurements(bundle, {**read_sealed(bundle.checked(MEASUREMENTS)), REPORT: entry}, {REPORT: html})


def add_measurements(bundle: Bundle, measured: Mapping[str, object]) -> Bundle:
    """Put more of what a clock said beside what is in ``measurements.json``; equal keys are replaced."""
    data = read_sealed(bundle.checked(MEASUREMENTS))
    return _rewrite_measurements(bundle, {**data, "measured": {**data["measured"], **plain(measured)}}, {})


def _rewrite_measurements(bundle: Bundle, data: Mapping[str, object], texts: Mapping[str, str]) -> Bundle:
    text = canonical(sealed(data))
    entry = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest = {**bundle.manifest, "files": {**bundle.manifest["files"], MEASUREMENTS: entry}}
    replace_files(bundle.folder, {**texts, MEASUREMENTS: text, MANIFEST: canonical(manifest)})
    return load_bundle(bundle.folder)


def _write_graphs(folder: Path, programs: Mapping[int, Planned], parts: Parts) -> dict[str, Tensor]:
    """Write the graphs of programs; their weights."""
    weights: dict[str, Tensor] = {}
    for number, planned in programs.items():
        place = folder / parts.folder(number)
        place.mkdir(exist_ok=True)
        (place / GRAPH).write_text(str(planned.program.graph))
        weights |= planned.program.weights
    return weights


def _write_sources(folder: Path, plan: Plan | None, sampler: str | None, config: Mapping[str, object]) -> None:
    (folder / CONFIG).write_text(canonical(config))
    if plan is not None:
        (folder / PLAN).write_text(plan.to_json())
    if sampler is not None:
        (folder / SAMPLER).write_text(sampler)


def _segment_sample(
    program: Program, number: int, made: Sequence[Made], table: Mapping[str, Tensor], suffix: str
) -> Sample:
    """The sample of a segment, whose inputs ``table`` has by name: the model's, and what references made of them."""
    engines: dict[str, Engine] = {}
    for one in made:
        if one.chosen:
            assert isinstance(one.chosen.engine, SegmentedEngine)
            engines[one.backend.name] = one.chosen.engine.segments[number].engine
    inputs = tuple(table[name] for name in _names(program))
    return _run_sample(program, made, engines, inputs, f"{program.graph.name}{suffix}")


def _names(program: Program) -> list[str]:
    return [value.name for value in program.graph.inputs]


def _run_sample(
    program: Program, made: Sequence[Made], engines: Mapping[str, Engine], inputs: Sequence[Tensor], title: str
) -> Sample:
    with torch.no_grad():
        reference = tuple(program.module()(*inputs))
    answers = {name: engine(*inputs) for name, engine in engines.items()}
    for one in made:
        name, allowed = one.backend.name, one.backend.tolerance(program.graph)
        answer = answers.get(name)
        if answer is None:
            continue
        found = agreement.error(answer, reference)
        if not found <= allowed:
            raise QualityError(
                f"{title}: the answer of {name}'s engine differs from the reference's by {found:.1e}, "
                f"{allowed:.0e} is allowed; nothing is written"
            )
    return Sample(tuple(inputs), answers, reference)


def _write_sample(folder: Path, graph: Graph, sample: Sample) -> None:
    tensors = {f"input.{value.name}": tensor for value, tensor in zip(graph.inputs, sample.inputs, strict=True)}
    for name, answers in sample.engines.items():
        tensors |= {f"engine.{name}.{index}": tensor for index, tensor in enumerate(answers)}
    tensors |= {f"reference.{index}": tensor for index, tensor in enumerate(sample.reference)}
    save_weights({name: tensor.clone() for name, tensor in tensors.items()}, folder / SAMPLE)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
