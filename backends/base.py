"""What a backend is: it says what it cannot take, builds an engine, and loads it again."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.ir import registry
from intarsia.ir.errors import MissingEnvironment, Unsupported
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.spec import Spec, construct, spec_of
from intarsia.ir.target import Target

BACKENDS: dict[str, str] = {
    "null": "intarsia.backends.null:NullBackend",
    "onnx": "intarsia.backends.onnx:OnnxBackend",
    "tensorrt": "intarsia.backends.tensorrt:TensorrtBackend",
    "triton": "intarsia.backends.triton:TritonBackend",
    "tvm": "intarsia.backends.tvm:TvmBackend",
}
"""Backends that come with Intarsia, by name; others join by entry points of the group ``intarsia.backends``."""

GROUP = "intarsia.backends"


@dataclass(frozen=True)
class Built:
    """What a backend wrote.

    Attributes:
        files: Names of the files in the engine's folder, all that a runner needs.
        info: Facts for the manifest (opset, what was stored in how many bits); plain JSON values.
    """

    files: tuple[str, ...]
    info: Mapping[str, object] = field(default_factory=dict[str, object])


class Engine(ABC):
    """Something that runs: tensors in the graph's input order in, tensors in output order out."""

    @abstractmethod
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run once; inputs and outputs are on the CPU."""

    @property
    @abstractmethod
    def device(self) -> str:
        """What it ran on, for people: ``CPU, 2 threads, ONNX Runtime 1.31.1``."""

    def stateful(self, values: Sequence[Tensor], *, inputs: Sequence[int], outputs: Sequence[int]) -> Stateful:
        """The engine with some of its inputs kept from call to call, on the device where it can.

        Args:
            values: Zeros in the shapes and types of these inputs; the engine may write into them.
            inputs: Which inputs they are.
            outputs: Which output each of them becomes with a call.
        """
        return Carried(self, values, inputs=inputs, outputs=outputs)


class Stateful(Engine):
    """An engine that keeps some of its inputs: each is what an output was at the call before, and zeros at the first.

    It is called with the other inputs, in their order, and gives the other outputs, in theirs.
    """

    @abstractmethod
    def clear(self) -> None:
        """Keep zeros, as before the first call."""

    @property
    @abstractmethod
    def kept(self) -> tuple[Tensor, ...]:
        """What is kept, to be read before the next call."""


class Carried(Stateful):
    """Anything that is called like an engine, given as inputs what it gave as outputs; arguments as ``stateful``'s.

    What is kept stays where the call leaves it, such as on a GPU; other outputs come to the CPU.
    """

    def __init__(
        self,
        engine: Callable[..., tuple[Tensor, ...]],
        values: Sequence[Tensor],
        *,
        inputs: Sequence[int],
        outputs: Sequence[int],
        device: str = "CPU",
    ) -> None:
        self._engine, self._inputs, self._outputs, self._device = engine, inputs, outputs, device
        self._kept = tuple(values)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs that are not kept."""
        kept, others = dict(zip(self._inputs, self._kept, strict=True)), iter(inputs)
        places = range(len(inputs) + len(kept))
        answer = self._engine(*(kept[place] if place in kept else next(others) for place in places))
        self._kept = tuple(answer[place] for place in self._outputs)
        return tuple(value.cpu() for place, value in enumerate(answer) if place not in self._outputs)

    def clear(self) -> None:
        """Keep zeros."""
        self._kept = tuple(map(torch.zeros_like, self._kept))

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What the last call gave."""
        return self._kept

    @property
    def device(self) -> str:
        """The engine's."""
        return self._engine.device if isinstance(self._engine, Engine) else self._device


@dataclass(frozen=True)
class Backend(ABC):
    """Lowers a program, whose weight-only nodes have run already, to an engine.

    Subclasses are frozen dataclasses; their fields are options, written ``name(key=value)``.

    Attributes:
        name: What ``--backend`` calls it.
        passes: Passes that make a graph ready for this backend, run after the plan's; the bundle's graph stays as the
            plan made it.
    """

    name: ClassVar[str]
    passes: ClassVar[tuple[str, ...]] = ()

    def why_not_target(self, target: Target) -> str | None:
        """Why this backend builds nothing for ``target``, and what does; None if it builds for it."""
        return None

    @abstractmethod
    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """Why this backend cannot take ``node`` for ``target``, and what to do about it; None if it can."""

    @abstractmethod
    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Write the engine into ``folder``; the same program and target give the same bytes.

        Raises:
            Unsupported: Operators that it cannot take, all at once.
            MissingEnvironment: A package or compiler that the build needs is not there.
        """

    @abstractmethod
    def load(self, folder: Path, files: Sequence[str]) -> Engine:
        """The engine in ``folder``, ready to run; MissingEnvironment if this machine cannot run it."""

    def check(self, folder: Path, files: Sequence[str]) -> str:
        """What can be proven of the engine without running it, in one line; QualityError if a file is corrupt."""
        return f"{len(files)} files, {sum((folder / name).stat().st_size for name in files):,} bytes"

    def tolerance(self, graph: Graph) -> float:
        """How far the engine's answer may be from the eager reference's, as ``agreement.error`` measures it."""
        return agreement.tolerance(graph)

    def load_reference(self, folder: Path, files: Sequence[str]) -> Engine:
        """What the engine's files say, run by something slower that every machine has.

        Raises:
            MissingEnvironment: There is no such thing for this backend.
        """
        raise MissingEnvironment(f"backend {self.name} has no reference beside its engine; run it where it can run")

    def __str__(self) -> str:
        return str(spec_of(self.name, self))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_backend(text: str) -> Backend:
    """The backend that ``name(key=value)`` stands for.

    Raises:
        UsageError: No such backend; the message lists the known ones.
        SpecError: The notation or a key is wrong.
    """
    spec = Spec.parse(text)
    backend = construct(registry.find(spec.name, BACKENDS, group=GROUP, kind="backend"), spec)
    assert isinstance(backend, Backend)
    return backend


@dataclass(frozen=True)
class Refusal:
    """Calls that a backend cannot take for one reason.

    Attributes:
        op: The operator.
        calls: How many there are.
        place: Name of the first in the graph, which is its path in the model.
        source: File and line of the model that made it; empty if unknown.
        reason: Why, and what to do about it.
    """

    op: str
    calls: int
    place: str
    source: str
    reason: str

    def __str__(self) -> str:
        calls = "1 call" if self.calls == 1 else f"{self.calls} calls"
        source = f" ({self.source})" if self.source else ""
        return f"{self.op}: {calls}, first %{self.place}{source}: {self.reason}"


def refusals(backend: Backend, graph: Graph, target: Target) -> tuple[Refusal, ...]:
    """Every call of ``graph`` that ``backend`` cannot take for ``target``, alike ones together, sorted."""
    refused: dict[tuple[str, str], list[Node]] = {}
    for node in graph.nodes:
        if reason := backend.why_not(node, graph, target):
            refused.setdefault((node.op, reason), []).append(node)
    return tuple(
        Refusal(op, len(nodes), nodes[0].name, nodes[0].source, reason)
        for (op, reason), nodes in sorted(refused.items())
    )


def require_support(backend: Backend, graph: Graph, target: Target) -> None:
    """Raise Unsupported if ``backend`` builds nothing for ``target``, or with every call that it cannot take."""
    if reason := backend.why_not_target(target):
        raise Unsupported(f"backend {backend.name} cannot build for {target.name}: {reason}")
    if refused := refusals(backend, graph, target):
        raise Unsupported(f"backend {backend.name} cannot take {graph.name}:", [str(one) for one in refused])
