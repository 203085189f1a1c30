"""What looks like the pattern of a kernel, and how to look at the calls that spell it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.types import BITS

CASTS = frozenset({"aten._to_copy", "aten.to.dtype", "aten.to.other", "aten.type_as"})
"""Operators that change the element type and nothing else."""

FLOATS = frozenset({"f32", "f16", "bf16"})


@dataclass(frozen=True)
class Candidate:
    """A place that looks like a pattern.

    Attributes:
        place: The value that the last call of the pattern defines.
        nodes: What would stand in place of that call, the kernel's call last; none if the pattern itself says no.
        reason: Why the pattern itself says no.
    """

    place: str
    nodes: tuple[Node, ...]
    reason: str = ""


Pattern = Callable[[Node, Graph], Candidate | None]
"""The candidate that ends at a call, or None if the call does not look like the pattern's end."""


def produced(name: str, graph: Graph, *ops: str) -> Node | None:
    """The call of one of these operators that defines the value, or None."""
    node = graph.producers.get(name)
    return node if node is not None and node.op in ops else None


def uncast(name: str, graph: Graph) -> tuple[str, ...]:
    """The value, what it was cast from, and so on down to what no cast between floats made."""
    names = [name]
    while (node := _cast(names[-1], graph)) is not None:
        names.append(node.ref("self"))
    return tuple(names)


def unwidened(name: str, graph: Graph) -> str:
    """The narrowest value of which ``name`` is a copy that lost nothing."""
    while (node := _cast(name, graph)) is not None:
        source = graph.type(node.ref("self")).dtype
        if source != node.type.dtype and BITS[source] >= BITS[node.type.dtype]:
            break
        name = node.ref("self")
    return name


def _cast(name: str, graph: Graph) -> Node | None:
    node = produced(name, graph, *CASTS)
    is_float = node is not None and {node.type.dtype, graph.type(node.ref("self")).dtype} <= FLOATS
    return node if is_float else None


def rounded(node: Node, dtype: str, graph: Graph) -> Node | None:
    """The call itself if it gives ``dtype``, or else the cast to ``dtype`` that alone uses it."""
    if node.type.dtype == dtype:
        return node
    if not used_once(node.name, graph):
        return None
    (user,) = graph.users[node.name]
    return user if user.op in CASTS and user.args.get("self") == Ref(node.name) and user.type.dtype == dtype else None


def used_once(name: str, graph: Graph) -> bool:
    """Whether exactly one call uses the value, and the outputs do not."""
    return len(graph.users.get(name, ())) == 1 and name not in graph.outputs


def used_elsewhere(names: tuple[str, ...], graph: Graph) -> str:
    """The reason if a value inside the pattern is also used outside, so that it would be computed twice."""
    used = next((name for name in names if not used_once(name, graph)), None)
    return f"%{used}, inside the pattern, is used elsewhere too" if used else ""


def operands(node: Node) -> tuple[str, str] | None:
    """Both operands of a sum or product of two tensors; None for other calls."""
    first, second = node.args.get("self"), node.args.get("other")
    if not isinstance(first, Ref) or not isinstance(second, Ref) or node.args.get("alpha", 1) != 1:
        return None
    return first.name, second.name
