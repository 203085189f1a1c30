"""What an operator of ours is, and how much work a call of it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target


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
    """The module ``kernels/<operator>/op.py``: contract of one operator."""

    OP: str

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """Why the operator cannot stand where ``node`` is, or None if it can."""

    def work(self, node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
        """What the call does for these sizes."""
