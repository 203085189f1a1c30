"""A call met on the way of the heads, and what a rule says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from intarsia.ir.graph import Graph, Node
from intarsia.ir.sizes import Dim
from intarsia.ir.types import TensorType
from intarsia.passes.head_blocks import HeadAxis


@dataclass(frozen=True)
class Carried:
    """What a call does with the heads of one of its values.

    Attributes:
        axes: Where the heads lie in the call's other values; a value that is absent is alike for all heads.
        whole: Whether what the call gives for a head depends on all heads, as a norm over all of them does, so that
            none may be left out.
    """

    axes: Mapping[str, HeadAxis]
    whole: bool = False


@dataclass(frozen=True)
class Place:
    """A call, one of its values by name, and where that value's heads lie."""

    node: Node
    graph: Graph
    name: str
    axis: HeadAxis
    heads: int

    def shape(self, name: str) -> tuple[Dim, ...]:
        """The extents of a value."""
        return self.graph.type(name).shape

    def dim(self, of: str, default: int = 0) -> int:
        """The call's argument ``dim``, counted from the first axis of the value ``of``."""
        return cast("int", self.node.args.get("dim", default)) % len(self.shape(of))

    def other(self, arg: str) -> str:
        """The result of a call with one tensor ``arg``, or that tensor, whichever this value is not."""
        return self.node.ref(arg) if self.name == self.node.name else self.node.name


def tensors(node: Node, graph: Graph) -> Iterator[str]:
    """Names of all tensors that the call reads or defines, each once."""
    names = dict.fromkeys((*node.inputs, *(value.name for value in node.outputs)))
    return (name for name in names if isinstance(graph.values[name].type, TensorType))
