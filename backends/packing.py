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
from intarsia.backends.bundle import CONFIG, FRAMES, PLAN, SAMPLER, Bundle, Chosen, fingerprints, load_bundle
from intarsia.backends.by_step import at_step
from intarsia.backends.making import Build, Made, Planned, make_engines, preferred, require_every_support
from intarsia.backends.manifest import (
    MANIFEST,
    MEASUREMENTS,
    PHASED_SCHEMA,
    REPORT,
    SCHEMA,
    canonical,
    entries_below,
    plain,
    read_sealed,
    sealed,
)
from intarsia.backends.phases import StepRange, of_phase, subfolder
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
        frames: A PNG picture of the reference's and the engine's videos.
    """

    quality: Mapping[str, object] = field(default_factory=dict[str, object])
    measurements: Mapping[str, object] = field(default_factory=dict[str, object])
    frames: bytes | None = None


def write_bundle(
    folder: Path,
    *,
    program: Program,
    plan: Plan | None,
    builds: Sequence[Build],
    target: Target,
    phases: Sequence[StepRange] = (),
    later: Mapping[int, Planned] | None = None,
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
    programs = {0: Planned(program, builds), **(later or {})}
    require_every_support(programs, target)
    claimed = fingerprints({phase: planned.program for phase, planned in programs.items()}, plan)
    with new_folder(folder, marker=MANIFEST) as partial:
        made = make_engines(programs, phases, target=target, folder=partial, progress=say)
        say("write weights")
        _write_sources(partial, programs, plan, sampler, config or {})
        say("run sample")
        inputs = inputs or example_inputs(program.graph)
        for phase, planned in programs.items():
            graph = planned.program.graph
            at = at_step(inputs, graph, phases[phase]) if phases else inputs
            sample = _run_sample(planned.program, made, at, f"{graph.name}{of_phase(phases, phase)}")
            _write_sample(partial / subfolder(phase), graph, sample)
        say("measure engine")
        found = evidence(preferred(made)) if evidence is not None else Evidence()
        if found.frames is not None:
            (partial / FRAMES).write_bytes(found.frames)
        (partial / MEASUREMENTS).write_text(canonical(sealed({"measured": plain(found.measurements), REPORT: None})))
        for path in partial.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        manifest = {
            "schema": PHASED_SCHEMA if phases else SCHEMA,
            "command": command,
            "engines": {one.backend.name: one.claims() for one in made},
            "target": asdict(target),
            "fingerprints": claimed,
            "predicted": predicted or {},
            "quality": found.quality,
            "versions": _versions(),
            "files": entries_below(partial),
            **({"phases": [one.to_json() for one in phases]} if phases else {}),
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


def _write_sources(
    folder: Path,
    programs: Mapping[int, Planned],
    plan: Plan | None,
    sampler: str | None,
    config: Mapping[str, object],
) -> None:
    weights: dict[str, Tensor] = {}
    for phase, planned in programs.items():
        (folder / subfolder(phase)).mkdir(exist_ok=True)
        (folder / subfolder(phase) / GRAPH).write_text(str(planned.program.graph))
        weights |= planned.program.weights
    save_weights(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(canonical(config))
    if plan is not None:
        (folder / PLAN).write_text(plan.to_json())
    if sampler is not None:
        (folder / SAMPLER).write_text(sampler)


def _run_sample(program: Program, made: Sequence[Made], inputs: Sequence[Tensor], title: str) -> Sample:
    with torch.no_grad():
        reference = tuple(program.module()(*inputs))
    answers = {one.chosen.name: one.chosen.engine(*inputs) for one in made if one.chosen}
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
