"""The bundle: a folder that holds an engine, what it was made from, and the claims about it.

    manifest.json        what is claimed, and the SHA-256 of every file
    model.graph          the graph that the engine was built from, weight-only nodes already run
    weights.safetensors  its weights, so that the reference can be run again
    plan.json            the decisions, where there were any
    sampler.json         the denoising loop around the engine, where there is one
    sample.safetensors   inputs, what the engine answered, what the reference answered
    frames.png           the reference's and the engine's videos side by side, where there are videos
    config.json          the resolved configuration
    engine/<backend>/    what the backend wrote
    measurements.json    what a clock said
    report.html          for people; not there until ``add_report``

The same inputs give the same bytes, but for ``measurements.json``, its line in the manifest, and ``report.html``.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.base import Backend, Engine, find_backend, require_support
from intarsia.backends.manifest import (
    MANIFEST,
    MEASUREMENTS,
    REPORT,
    SCHEMA,
    canonical,
    entries_below,
    fault,
    plain,
    read_manifest,
    read_sealed,
    sealed,
)
from intarsia.backends.writing import new_folder, replace_files
from intarsia.ir.errors import QualityError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, example_inputs, load_weights, save_weights
from intarsia.ir.target import Target

GRAPH = "model.graph"
WEIGHTS = "weights.safetensors"
PLAN = "plan.json"
SAMPLER = "sampler.json"
SAMPLE = "sample.safetensors"
FRAMES = "frames.png"
CONFIG = "config.json"
_PACKAGES = ("intarsia", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors", "torch")


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


@dataclass(frozen=True)
class Sample:
    """Inputs in the graph's order, and what the engine and the eager reference answered when it was built."""

    inputs: tuple[Tensor, ...]
    engine: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; its parts are read, and checked against the manifest, when asked for."""

    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def graph(self) -> Graph:
        """The graph that the engine was built from."""
        return Graph.parse(self.checked(GRAPH).read_text())

    @cached_property
    def program(self) -> Program:
        """The reference: the graph with its weights."""
        return Program(self.graph, load_weights(self.checked(WEIGHTS), self.graph.params))

    @cached_property
    def plan(self) -> Plan | None:
        """The decisions; None for an engine of the unchanged model."""
        return Plan.load(self.checked(PLAN)) if PLAN in self.manifest["files"] else None

    @cached_property
    def sample(self) -> Sample:
        """The stored inputs and answers."""
        from safetensors.torch import load_file

        tensors = load_file(self.checked(SAMPLE))
        count = len(self.graph.outputs)
        return Sample(
            tuple(tensors[f"input.{value.name}"] for value in self.graph.inputs),
            tuple(tensors[f"engine.{index}"] for index in range(count)),
            tuple(tensors[f"reference.{index}"] for index in range(count)),
        )

    @property
    def sampler(self) -> str | None:
        """The denoising loop as JSON; None for a network without one."""
        return self.checked(SAMPLER).read_text() if SAMPLER in self.manifest["files"] else None

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration of the command that made the bundle."""
        config: dict[str, Any] = json.loads(self.checked(CONFIG).read_text())
        return config

    @property
    def measurements(self) -> Mapping[str, Any]:
        """What a clock said."""
        measured: dict[str, Any] = read_sealed(self.checked(MEASUREMENTS))["measured"]
        return measured

    @property
    def engine_folder(self) -> Path:
        """Where the backend's files are."""
        return self.folder / "engine" / str(self.manifest["backend"]["name"])

    @property
    def engine_bytes(self) -> int:
        """Size of the backend's files together."""
        prefix = f"engine/{self.manifest['backend']['name']}/"
        return sum(entry["bytes"] for name, entry in self.manifest["files"].items() if name.startswith(prefix))

    def engine(self) -> Engine:
        """The engine, ready to run.

        Raises:
            QualityError: One of its files is not what the manifest says.
            MissingEnvironment: This machine cannot run it.
        """
        backend = self.manifest["backend"]
        for name in backend["files"]:
            self.checked(f"engine/{backend['name']}/{name}")
        return find_backend(backend["name"]).load(self.engine_folder, backend["files"])

    def checked(self, name: str) -> Path:
        """The path of a file of the bundle; QualityError if it is missing or not what the manifest says."""
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise QualityError(f"{self.folder}: the manifest lists no {name}; make the bundle again")
        if found := fault(self.folder, name, entry):
            raise QualityError(f"{self.folder}: {found}")
        return self.folder / name


def load_bundle(folder: Path) -> Bundle:
    """The bundle in ``folder``, its manifest checked and nothing else.

    Raises:
        UsageError: The folder is no bundle.
        QualityError: The manifest has been altered.
    """
    return Bundle(folder, read_manifest(folder))


def write_bundle(
    folder: Path,
    *,
    program: Program,
    plan: Plan | None,
    backend: Backend,
    target: Target,
    inputs: Sequence[Tensor] | None = None,
    sampler: str | None = None,
    predicted: Mapping[str, object] | None = None,
    command: str,
    config: Mapping[str, object] | None = None,
    evidence: Callable[[Engine], Evidence] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Build the engine of ``program`` and write the bundle, whole or not at all.

    Args:
        folder: Where it goes; an earlier bundle there is replaced once this one is complete.
        program: Materialized: its weight-only nodes have run.
        inputs: The stored sample's inputs in the graph's order; random ones of the inputs' types otherwise.
        sampler: The denoising loop as JSON.
        predicted: What the cost model says, in seconds and bytes.
        evidence: Looks at the engine before it is shipped; a QualityError that it raises leaves nothing behind.
        progress: Called with the name of each stage as it starts.

    Raises:
        Unsupported: Operators that the backend cannot take, all at once.
        QualityError: The engine's answer to the sample is not the reference's.
        UsageError: The folder may not be replaced or cannot be written, or the weights are on the meta device.
        MissingEnvironment: The disk is full, or a package that the backend needs is not there.
    """
    say = progress or (lambda _: None)
    require_support(backend, program.graph, target)
    claimed = fingerprints(program, plan)
    with new_folder(folder, marker=MANIFEST) as partial:
        say("build engine")
        engine_folder = partial / "engine" / backend.name
        engine_folder.mkdir(parents=True)
        built = backend.build(program, target, engine_folder)
        say("write weights")
        _write_sources(partial, program, plan, sampler, config or {})
        say("run sample")
        engine = backend.load(engine_folder, built.files)
        sample = _run_sample(program, engine, inputs or example_inputs(program.graph))
        _write_sample(partial, program.graph, sample)
        say("measure engine")
        found = evidence(engine) if evidence is not None else Evidence()
        if found.frames is not None:
            (partial / FRAMES).write_bytes(found.frames)
        (partial / MEASUREMENTS).write_text(canonical(sealed({"measured": plain(found.measurements), REPORT: None})))
        for path in partial.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        manifest = {
            "schema": SCHEMA,
            "command": command,
            "backend": {"name": backend.name, "files": list(built.files), "info": dict(built.info)},
            "target": asdict(target),
            "fingerprints": claimed,
            "predicted": predicted or {},
            "quality": found.quality,
            "versions": _versions(),
            "files": entries_below(partial),
        }
        (partial / MANIFEST).write_text(canonical(sealed(manifest)))
    return load_bundle(folder)


def fingerprints(program: Program, plan: Plan | None) -> Mapping[str, str | None]:
    """Twelve hexadecimal digits each for graph, weights and plan."""
    return {
        "graph": program.graph.fingerprint,
        "weights": program.fingerprint(),
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest()[:12] if plan else None,
    }


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


def _run_sample(program: Program, engine: Engine, inputs: Sequence[Tensor]) -> Sample:
    with torch.no_grad():
        reference = tuple(program.module()(*inputs))
    sample = Sample(tuple(inputs), engine(*inputs), reference)
    allowed, found = agreement.tolerance(program.graph), agreement.error(sample.engine, reference)
    if not found <= allowed:
        raise QualityError(
            f"{program.graph.name}: the engine's answer differs from the reference's by {found:.1e}, "
            f"{allowed:.0e} is allowed; nothing is written"
        )
    return sample


def _write_sample(folder: Path, graph: Graph, sample: Sample) -> None:
    tensors = {f"input.{value.name}": tensor for value, tensor in zip(graph.inputs, sample.inputs, strict=True)}
    tensors |= {f"engine.{index}": tensor for index, tensor in enumerate(sample.engine)}
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
