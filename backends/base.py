"""What a backend is: it says what it cannot take, builds an engine, and loads it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from intarsia.ir import registry
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.target import Target

BACKENDS: dict[str, str] = {
    "null": "intarsia.backends.null:NullBackend",
    "onnx": "intarsia.backends.onnx:OnnxBackend",
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


class Backend(ABC):
    """Lowers a program, whose weight-only nodes have run already, to an engine."""

    name: ClassVar[str]

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


def find_backend(name: str) -> Backend:
    """The backend called ``name``; UsageError lists the known ones."""
    backend = registry.find(name, BACKENDS, group=GROUP, kind="backend")()
    assert isinstance(backend, Backend)
    return backend


def require_support(backend: Backend, graph: Graph, target: Target) -> None:
    """Raise Unsupported with every operator that ``backend`` cannot take: how often, where first, and why."""
    refused: dict[tuple[str, str], list[Node]] = {}
    for node in graph.nodes:
        if reason := backend.why_not(node, graph, target):
            refused.setdefault((node.op, reason), []).append(node)
    if refused:
        reasons = [_refusal(op, nodes, reason) for (op, reason), nodes in sorted(refused.items())]
        raise Unsupported(f"backend {backend.name} cannot take {graph.name}:", reasons)


def _refusal(op: str, nodes: Sequence[Node], reason: str) -> str:
    source = f" ({nodes[0].source})" if nodes[0].source else ""
    calls = "1 call" if len(nodes) == 1 else f"{len(nodes)} calls"
    return f"{op}: {calls}, first %{nodes[0].name}{source}: {reason}"
