"""What an operator of ours is, and how much work a call of it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from intarsia.ir.graph import Graph, Node, Value
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        flops: Floating-point (or integer) operations of matrix products; a multiply-add counts two.
        dtype: Element type that the machine multiplies in, a key of ``Target.flops``.
        bytes: Bytes moved to and from memory when nothing stays in a cache: inputs read once, outputs written once.
    """

    flops: float
    dtype: str
    bytes: int


class Operator(Protocol):
    """The module ``kernels/<operator>/op.py``: contract of an operator and of the one that makes its weights."""

    OPS: tuple[str, ...]
    """Names of the operators that the module registers when it is imported."""

    REFERENCES: Mapping[str, Callable[..., Any]]
    """Each operator in plain PyTorch, by name: what backends that have no spelling of it lower."""

    LAUNCHES: Mapping[str, str]
    """By operator, import path of the function ``(node, graph, architecture) -> Launch``; without a kernel, absent."""

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """Why the call ``node``, whose inputs ``graph`` defines, cannot run on ``target``; None if it can."""

    def work(self, node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
        """What the call does for these sizes."""


def moved_bytes(node: Node, graph: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of the tensors that the call reads and writes, each counted once."""
    read = [graph.values[name] for name in dict.fromkeys(node.inputs)]
    return sum(_bytes(value, sizes) for value in (*read, *node.outputs))


def _bytes(value: Value, sizes: Mapping[str, int]) -> int:
    return value.type.bytes(sizes) if isinstance(value.type, TensorType) else 0
