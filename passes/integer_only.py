"""Prove that a network computes with integers alone, or list every float operator with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import split_constant
from intarsia.ir.types import TensorType
from intarsia.passes.integer_island_roles import island
from intarsia.passes.quantize_integer_roles import LAYERS, addends, bounds, joined, keeps_grid, window

INTO, OUT_OF = "intarsia.quantize_static", "intarsia.dequantize_static"

_FLOATS = frozenset({"f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2", "c64", "c128"})

_DIVISIONS = ("div", "floor_divide", "remainder", "fmod", "reciprocal", "mean", "avg_pool2d", "adaptive_avg_pool2d")


def integer_only(graph: Graph) -> tuple[str, ...]:
    """Every float operator and every division between the network's inputs and its outputs, a line each.

    Empty is the proof: each input goes into an ``intarsia.quantize_static``, each output comes out of an
    ``intarsia.dequantize_static``, and all between them has integers for operands and results. What is computed of
    parameters alone runs once, at build time, and does not count; neither does arithmetic with sizes, nor what only
    moves the numbers of an input or an output.
    """
    _, dynamic = split_constant(graph)
    outside = _before(graph, dynamic) | _behind(graph, dynamic)
    return tuple(line for node in dynamic if node.name not in outside and (line := _line(node, graph)))


def left_in_float(graphs: Iterable[Graph]) -> tuple[str, ...] | None:
    """What ``integer_only`` lists of the graphs, each line once; None where there are integers in none of them."""
    with_integers = [graph for graph in graphs if any(graph.find(INTO))]
    if not with_integers:
        return None
    return tuple(dict.fromkeys(line for graph in with_integers for line in integer_only(graph)))


def _before(graph: Graph, dynamic: tuple[Node, ...]) -> set[str]:
    """Calls that only move the numbers of inputs."""
    inputs = {value.name for value in graph.inputs}
    found: set[str] = set()
    for node in dynamic:
        if _only_moves(node) and _tensors(node, graph) <= inputs | found:
            found.add(node.name)
    return found


def _behind(graph: Graph, dynamic: tuple[Node, ...]) -> set[str]:
    """Calls that only move the numbers of outputs."""
    ends, found = set(graph.outputs), set[str]()
    for node in reversed(dynamic):
        users = {user.name for user in graph.users.get(node.name, ())}
        if node.name in ends and _only_moves(node) and users <= found:
            found.add(node.name)
            ends |= _tensors(node, graph)
    return found


def _only_moves(node: Node) -> bool:
    return keeps_grid(node) and bounds(node) is None


def _tensors(node: Node, graph: Graph) -> set[str]:
    return {name for name in node.inputs if isinstance(graph.values[name].type, TensorType)}


def _line(node: Node, graph: Graph) -> str | None:
    """What stands against the call, or None if it is one of integers."""
    types = [value.type for value in node.outputs] + [graph.values[name].type for name in node.inputs]
    tensors = [type_ for type_ in types if isinstance(type_, TensorType)]
    if not tensors or node.op.startswith("aten.sym_size"):
        return None
    if any(type_.dtype in _FLOATS for type_ in tensors):
        return _float_line(node, graph)
    if node.op.startswith("aten.") and node.op.split(".")[1] in _DIVISIONS:
        return f"%{node.name}: {node.op} divides; lower-integer multiplies and shifts"
    return None


def _float_line(node: Node, graph: Graph) -> str | None:
    """The reason against a call with floats; none against what leads into integers and out of them."""
    where = f"%{node.name}: {node.op}"
    if node.op == INTO:
        below = graph.producers.get(node.ref("input"))
        return f"{where} requantizes %{below.name} through float" if below and below.op == OUT_OF else None
    if node.op == OUT_OF:
        return None
    if isinstance(found := window(node, graph), str):
        return f"{where}: {found}"
    if node.op in LAYERS:
        return f"{where} is kept in float: its input, weight or result is on no integer grid"
    if addends(node, graph) or joined(node) or found or keeps_grid(node) or bounds(node):
        return f"{where} is computed in float: not all that it reads comes in integers"
    return f"{where}{_between(node, graph)}"


def _between(node: Node, graph: Graph) -> str:
    """What is to be said of an operator that may have an integer form between grids alone."""
    found = island(node, graph)
    if found is None:
        return " has no integer form"
    return f": {found}" if isinstance(found, str) else " is in float; integer-islands has an integer form"
