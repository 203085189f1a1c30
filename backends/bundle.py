"""The bundle: a folder that holds an engine, what it was made from, and the claims about it.

    manifest.json        what is claimed, and the SHA-256 of every file
    model.graph          the graph that the engine was built from, weight-only nodes already run
    weights.safetensors  its weights, so that the reference can be run again
    plan.json            the decisions, where there were any
    sampler.json         the denoising loop around the engine, where there is one
    sample.safetensors   inputs, what the engine answered, what the reference answered
    frames.png           the reference's and the engine's videos side by side, where there are videos
    steps.png steps.gif  which tokens each step computed, over a video, where steps differ in them
    config.json          the resolved configuration
    engine/<backend>/    what each backend wrote
    measurements.json    what a clock said
    report.html          for people; not there until ``packing.add_report``

Where phases of the loop run different programs, these are of phase 0. The program that phase 1 is the first to run has
a graph and a sample below ``phase-1/`` and engines in ``engine/<backend>/phase-1/``; the weights of all are together.
Where a step runs segments of the graph one after the other, graph and sample are of the whole, and each segment has its
own below ``segment-0/`` and its engines in ``engine/<backend>/segment-0/``.

The same inputs give the same bytes, but for ``measurements.json``, its line in the manifest, and ``report.html``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from intarsia.backends.base import Backend, Engine, find_backend
from intarsia.backends.manifest import MEASUREMENTS, SEGMENTS, fault, read_manifest, read_sealed
from intarsia.backends.parts import PhaseParts, SegmentParts
from intarsia.backends.phases import StepRange
from intarsia.backends.variant import Sample, Variant
from intarsia.ir.errors import MissingEnvironment, QualityError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program

PLAN = "plan.json"
SAMPLER = "sampler.json"
FRAMES = "frames.png"
STEPS, STEPS_MOVING = "steps.png", "steps.gif"
CONFIG = "config.json"

PREFERENCE = ("tensorrt", "triton", "onnx", "tvm", "null")
"""Which engine of several is taken: those of a GPU first, as docs/decisions/008 says; others come last, by name."""


@dataclass(frozen=True)
class Chosen:
    """An engine of a bundle, ready to run.

    Attributes:
        name: Its backend.
        engine: The engine, or what stands for it.
        why: For people: why this one, and what keeps the preferred ones from running.
        on_reference: Whether the engine's reference runs in its place.
    """

    name: str
    engine: Engine
    why: str
    on_reference: bool = False


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; its parts are read, and checked against the manifest, when asked for."""

    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def phases(self) -> tuple[StepRange, ...]:
        """The loop's phases; none where one program runs at every step."""
        return tuple(StepRange.from_json(one) for one in self.manifest.get("phases", ()))

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The distinct programs of steps, that of the first step first."""
        programs = sorted({one.program for one in self.phases} or {0})
        return tuple(Variant(self, phase, PhaseParts(self.phases)) for phase in programs)

    @cached_property
    def segments(self) -> tuple[Variant, ...]:
        """What a step runs one after the other, each with engines of its own; none where the graph is not cut.

        Their engines are the ``segments`` of the ``SegmentedEngine`` that ``engine`` gives.
        """
        count = int(self.manifest.get(SEGMENTS, 0))
        return tuple(Variant(self, number, SegmentParts(count)) for number in range(count))

    @property
    def built(self) -> tuple[Variant, ...]:
        """The programs that engines are of: the segments, or the programs of steps."""
        return self.segments or self.variants

    @property
    def graph(self) -> Graph:
        """The graph that the engine was built from; with phases, that of the first; with segments, the whole."""
        return self.variants[0].graph

    @property
    def program(self) -> Program:
        """The reference: the graph with its weights."""
        return self.variants[0].program

    @cached_property
    def plan(self) -> Plan | None:
        """The decisions; None for an engine of the unchanged model."""
        return Plan.load(self.checked(PLAN)) if PLAN in self.manifest["files"] else None

    @property
    def sample(self) -> Sample:
        """The stored inputs and answers; with phases, those of the first."""
        return self.variants[0].sample

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
    def engines(self) -> tuple[str, ...]:
        """Names of the backends whose engines are here, the preferred first."""
        return tuple(sorted(self.manifest["engines"], key=preference))

    @property
    def engine_bytes(self) -> int:
        """Size of all engines' files together."""
        files = self.manifest["files"].items()
        return sum(entry["bytes"] for name, entry in files if name.startswith("engine/"))

    def engine(self, name: str | None = None) -> Engine:
        """The engine called ``name``, or the preferred one of those that run here, ready to run.

        Raises:
            UsageError: There is no such engine.
            QualityError: One of its files is not what the manifest says.
            MissingEnvironment: This machine cannot run it.
        """
        return self.choose(name).engine

    def choose(self, name: str | None = None, *, reference: bool = False) -> Chosen:
        """The engine called ``name``, or the preferred one of those that run here; errors as of ``engine``.

        With ``reference``, the reference of the preferred engine that has one, where none runs itself.
        """
        names = (self.known(name),) if name else self.engines
        obstacles: list[str] = []
        if found := next(self._running(names, obstacles), None):
            return found
        if reference and (found := next(self._on_reference(names, obstacles), None)):
            return found
        raise MissingEnvironment(f"{self.folder}: {'; '.join(obstacles)}")

    def _running(self, names: Sequence[str], obstacles: list[str]) -> Iterator[Chosen]:
        for name in names:
            try:
                engine = self._loaded(name, self.backend(name).load)
            except MissingEnvironment as error:
                obstacles.append(f"{name} does not run here: {error}")
                continue
            yield Chosen(name, engine, "; ".join([*obstacles, f"{name} runs on {engine.device}"]))

    def _on_reference(self, names: Sequence[str], obstacles: list[str]) -> Iterator[Chosen]:
        for name in names:
            try:
                engine = self._loaded(name, self.backend(name).load_reference)
            except MissingEnvironment as error:
                obstacles.append(str(error))
                continue
            said = [*obstacles, f"the reference of {name} runs in its place on {engine.device}"]
            yield Chosen(name, engine, "; ".join(said), on_reference=True)

    def _loaded(self, name: str, load: Callable[[Path, Sequence[str]], Engine]) -> Engine:
        engines = {variant.number: load(*variant.engine_files(name)) for variant in self.built}
        graphs = {variant.number: variant.graph for variant in self.built}
        return self.built[0].parts.join(engines, self.graph, graphs)

    def known(self, name: str) -> str:
        """``name``; UsageError if the bundle holds no such engine."""
        if name not in self.engines:
            raise UsageError(f"{self.folder} holds no engine of {name}, but of {', '.join(self.engines)}")
        return name

    def backend(self, name: str) -> Backend:
        """The backend that made the engine called ``name``, with its options."""
        return find_backend(self.manifest["engines"][name]["backend"])

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


def preference(name: str) -> tuple[int, str]:
    """By what engines are sorted, the preferred first."""
    return (PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE), name)


def fingerprints(
    programs: Mapping[int, Program], plan: Plan | None, segments: Sequence[Graph] = ()
) -> Mapping[str, str | None]:
    """Twelve hexadecimal digits each for graph and weights of every program, by phase, for segments and the plan."""
    found: dict[str, str | None] = {}
    for phase, program in programs.items():
        later = f" of phase {phase}" if phase else ""
        found |= {f"graph{later}": program.graph.fingerprint, f"weights{later}": program.fingerprint()}
    found |= {f"graph of segment {number}": graph.fingerprint for number, graph in enumerate(segments)}
    return {**found, "plan": hashlib.sha256(plan.to_json().encode()).hexdigest()[:12] if plan else None}
