"""Limits that several operators share, each as a reason or None."""

from __future__ import annotations

from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import split_constant

FLOATS = ("f32", "f16", "bf16")
"""Element types of weights and activations that our linear layers take."""


def floating(node: Node, arg: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` is no activation that we multiply: not f32, f16 or bf16."""
    dtype = graph.type(node.ref(arg)).dtype
    return None if dtype in FLOATS else f"{arg} is {dtype}; {node.op} takes {', '.join(FLOATS)}"


def weight(node: Node, arg: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` is no weight that can be rounded at build time."""
    name = node.ref(arg)
    type_ = graph.type(name)
    if len(type_.shape) != 2:
        return f"{arg} is {type_}; {node.op} takes a matrix"
    if not all(isinstance(extent, int) for extent in type_.shape):
        return f"{arg} is {type_}; {node.op} takes fixed extents"
    if type_.dtype not in FLOATS:
        return f"{arg} is {type_.dtype}; {node.op} takes {', '.join(FLOATS)}"
    if not _is_constant(name, graph):
        return f"{arg} depends on the model's inputs; only weights are rounded at build time"
    return None


def _is_constant(name: str, graph: Graph) -> bool:
    if any(name == param.name for param in graph.params):
        return True
    constant, _ = split_constant(graph)
    return any(name == value.name for node in constant for value in node.outputs)
