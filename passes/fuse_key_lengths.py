"""Prove that a mask of keys says "key index < length", from the calls that compute it."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.ir.graph import Graph, Node
from intarsia.passes.fuse_candidates import operands, produced

ALIKE = frozenset({"aten.alias", "aten.clone", "aten.reshape", "aten.unsqueeze", "aten.view"})
"""Operators that keep the elements in their order."""


@dataclass(frozen=True)
class KeyLengths:
    """What was found about a mask.

    Attributes:
        lengths: The value (B) whose entries are the lengths; empty without a proof.
        reason: Why there is no proof.
    """

    lengths: str
    reason: str = ""


def key_lengths(mask: str, graph: Graph) -> KeyLengths:
    """The lengths if the mask b1 (B, 1, 1, T) is true exactly where the key's index is below its row's length.

    Proved are a comparison of ``arange(T)`` with lengths (B, 1), negations of one, and ``True`` that is filled with
    ``False`` where one fails.
    """
    type_ = graph.type(mask)
    if type_.dtype != "b1":
        return KeyLengths("", f"the mask %{mask} is {type_}, added to the scores and not proved to cut keys off")
    if len(type_.shape) != 4 or type_.shape[1:3] != (1, 1):
        return KeyLengths("", f"the mask %{mask} is {type_}; keys are cut off by (B, 1, 1, T) alone")
    name = mask
    while (node := produced(name, graph, *ALIKE)) is not None:
        name = node.ref("self")
    lengths = _lengths(name, graph, below=True)
    if lengths is None:
        made = graph.producers[name].op if name in graph.producers else "the model's caller"
        return KeyLengths("", f"the mask %{mask} comes from {made} and is not proved to be 'key index < length'")
    if graph.type(name).shape != (type_.shape[0], type_.shape[3]) or graph.type(lengths).shape != type_.shape[:1]:
        return KeyLengths("", f"the mask %{mask} has not one length for each row")
    return KeyLengths(lengths)


def _lengths(name: str, graph: Graph, *, below: bool) -> str | None:
    """The lengths (B) if the value is true exactly where the index is below them, or exactly where it is not."""
    node = graph.producers.get(name)
    if node is None:
        return None
    if node.op in ("aten.logical_not", "aten.bitwise_not"):
        return _lengths(node.ref("self"), graph, below=not below)
    if node.op == "aten.masked_fill.Scalar":
        return _filled(node, graph, below=below)
    comparisons = ("aten.lt.Tensor", "aten.gt.Tensor") if below else ("aten.ge.Tensor", "aten.le.Tensor")
    pair = operands(node) if node.op in comparisons else None
    if pair is None:
        return None
    index, limit = pair if node.op == comparisons[0] else pair[::-1]
    column = produced(limit, graph, "aten.unsqueeze")
    if column is None or len(column.type.shape) != 2 or column.args["dim"] not in (1, -1):
        return None
    return column.ref("self") if _counts(index, graph) else None


def _filled(node: Node, graph: Graph, *, below: bool) -> str | None:
    """The lengths of a constant that is filled with its opposite where a mask says so."""
    value = node.args["value"]
    opposite = ("aten.zeros", "aten.zeros_like") if value else ("aten.ones", "aten.ones_like")
    if produced(node.ref("self"), graph, *opposite) is None:
        return None
    return _lengths(node.ref("mask"), graph, below=bool(value) is below)


def _counts(name: str, graph: Graph) -> bool:
    """Whether the value holds 0, 1, 2, ... along its last axis, and has no other."""
    node = produced(name, graph, "aten.unsqueeze", "aten.arange", "aten.arange.start", "aten.arange.start_step")
    if node is None:
        return False
    if node.op == "aten.unsqueeze":
        return node.args["dim"] in (0, -2) and len(node.type.shape) == 2 and _counts(node.ref("self"), graph)
    return node.args.get("start", 0) == 0 and node.args.get("step", 1) == 1
