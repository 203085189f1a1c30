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
from intarsia.backends.base import Backend, Built, require_support
from intarsia.backends.bundle import (
    CONFIG,
    FRAMES,
    GRAPH,
    PLAN,
    SAMPLE,
    SAMPLER,
    WEIGHTS,
    Bundle,
    Chosen,
    Sample,
    fingerprints,
    load_bundle,
    preference,
)
from intarsia.backends.manifest import (
    MANIFEST,
    MEASUREMENTS,
    OWN,
    REPORT,
    SCHEMA,
    canonical,
    entries_below,
    plain,
    read_sealed,
    sealed,
)
from intarsia.backends.writing import new_folder, replace_files
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported
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
class Build:
    """What an engine is made with: a backend, and the program as that backend's passes left it, materialized."""

    backend: Backend
    program: Program


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
    inputs: Sequence[Tensor] | None = None,
    sampler: str | None = None,
    predicted: Mapping[str, object] | None = None,
    command: str,
    config: Mapping[str, object] | None = None,
    evidence: Callable[[Chosen | None], Evidence] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Build the engines of ``program`` and write the bundle, whole or not at all.

    An engine that this machine cannot run is checked without running it, and its answer to the sample is its
    reference's where it has one; the manifest says so.

    Args:
        folder: Where it goes; an earlier bundle there is replaced once this one is complete.
        program: Materialized: its weight-only nodes have run.
        builds: The engines, one of each backend.
        inputs: The stored sample's inputs in the graph's order; random ones of the inputs' types otherwise.
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
    builds = sorted(builds, key=lambda build: preference(build.backend.name))
    _require_support(builds, target)
    claimed = fingerprints(program, plan)
    with new_folder(folder, marker=MANIFEST) as partial:
        made = [_built(build, target, partial, say) for build in builds]
        say("write weights")
        _write_sources(partial, program, plan, sampler, config or {})
        say("run sample")
        sample = _run_sample(program, made, inputs or example_inputs(program.graph))
        _write_sample(partial, program.graph, sample)
        say("measure engine")
        found = evidence(_preferred(made)) if evidence is not None else Evidence()
        if found.frames is not None:
            (partial / FRAMES).write_bytes(found.frames)
        (partial / MEASUREMENTS).write_text(canonical(sealed({"measured": plain(found.measurements), REPORT: None})))
        for path in partial.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        manifest = {
            "schema": SCHEMA,
            "command": command,
            "engines": {one.build.backend.name: one.claims() for one in made},
            "target": asdict(target),
            "fingerprints": claimed,
            "predicted": predicted or {},
            "quality": found.quality,
            "versions": _versions(),
            "files": entries_below(partial),
        }
        (partial / MANIFEST).write_text(canonical(sealed(manifest)))
    return load_bundle(folder)


def _require_support(builds: Sequence[Build], target: Target) -> None:
    """Raise Unsupported with what any backend refuses; one backend's own error if only one refuses."""
    refused: list[Unsupported] = []
    for build in builds:
        try:
            require_support(build.backend, build.program.graph, target)
        except Unsupported as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise Unsupported("backends cannot build:", [line for error in refused for line in str(error).splitlines()])


@dataclass(frozen=True)
class _Made:
    """An engine on disk, what was proven of it, and what of it runs here."""

    build: Build
    built: Built
    check: str
    chosen: Chosen | None
    obstacle: str

    def claims(self) -> dict[str, object]:
        """Its entry in the manifest."""
        sample = OWN if not self.obstacle else f"not run: {self.obstacle}"
        if self.chosen and self.chosen.on_reference:
            sample = f"its reference's: {self.obstacle}"
        return {
            "backend": str(self.build.backend),
            "check": self.check,
            "files": list(self.built.files),
            "info": dict(self.built.info),
            "sample": sample,
        }


def _built(build: Build, target: Target, partial: Path, say: Callable[[str], None]) -> _Made:
    backend = build.backend
    say(f"build engine, {backend.name}")
    folder = partial / "engine" / backend.name
    folder.mkdir(parents=True)
    built = backend.build(build.program, target, folder)
    say(f"check engine, {backend.name}")
    check = backend.check(folder, built.files)
    try:
        engine = backend.load(folder, built.files)
        return _Made(build, built, check, Chosen(backend.name, engine, ""), "")
    except MissingEnvironment as error:
        obstacle = str(error).replace(f"{partial}/", "")
    try:
        engine = backend.load_reference(folder, built.files)
    except MissingEnvironment:
        return _Made(build, built, check, None, obstacle)
    return _Made(build, built, check, Chosen(backend.name, engine, obstacle, on_reference=True), obstacle)


def _preferred(made: Sequence[_Made]) -> Chosen | None:
    """The first that runs itself, else the first whose reference does."""
    chosen = [one.chosen for one in made if one.chosen]
    return next((one for one in chosen if not one.on_reference), next(iter(chosen), None))


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
    folder: Path, program: Program, plan: Plan | None, sampler: str | None, config: Mapping[str, object]
) -> None:
    (folder / GRAPH).write_text(str(program.graph))
    save_weights(program.weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(canonical(config))
    if plan is not None:
        (folder / PLAN).write_text(plan.to_json())
    if sampler is not None:
        (folder / SAMPLER).write_text(sampler)


def _run_sample(program: Program, made: Sequence[_Made], inputs: Sequence[Tensor]) -> Sample:
    with torch.no_grad():
        reference = tuple(program.module()(*inputs))
    answers = {one.chosen.name: one.chosen.engine(*inputs) for one in made if one.chosen}
    for one in made:
        name, allowed = one.build.backend.name, one.build.backend.tolerance(program.graph)
        answer = answers.get(name)
        if answer is None:
            continue
        found = agreement.error(answer, reference)
        if not found <= allowed:
            raise QualityError(
                f"{program.graph.name}: the answer of {name}'s engine differs from the reference's by {found:.1e}, "
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
