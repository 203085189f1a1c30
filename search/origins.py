"""Where the rows of a value come from: the streams that the projections behind it read."""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.ir.graph import Graph, Node, Ref

_PROJECTIONS: Mapping[str, tuple[str, str]] = {
    "aten.linear": ("input", "weight"),
    "aten.addmm": ("mat1", "mat2"),
    "aten.mm": ("self", "mat2"),
    "aten.matmul": ("self", "other"),
    "aten.conv1d": ("input", "weight"),
    "aten.conv2d": ("input", "weight"),
    "aten.conv3d": ("input", "weight"),
    "aten.convolution": ("input", "weight"),
}
_POINTWISE = frozenset({"aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor", "aten.addcmul"})
_NORMS = frozenset({"aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm"})
_SAME = frozenset({"aten.clone", "aten.contiguous", "aten.dropout", "aten.alias", "aten.detach", "aten._to_copy"})
_SHAPED = frozenset({"aten.type_as", "aten.view_as", "aten.expand_as", "aten.reshape_as"})
_EMPTY = frozenset({"aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty"})


def sources(graph: Graph, name: str, sizes: Mapping[str, int]) -> frozenset[str]:
    """The values whose rows are projected into ``name``, or the inputs it is made from without a projection.

    Data flow alone decides, no name does. Tables that broadcast against the stream, such as rotary embeddings, are not
    followed. Norms, casts and copies between a stream and its projection are looked through, so that the queries and
    keys of one attention agree even when each projection has a norm of its own.
    """
    found: set[str] = set()
    seen: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        node = graph.producers.get(current)
        if node is None:
            if any(value.name == current for value in graph.inputs):
                found.add(current)
        elif (projected := _projected(node, graph)) is not None:
            found.add(_stream(graph, projected))
        else:
            pending.extend(_carriers(node, graph, sizes))
    return frozenset(found)


def _projected(node: Node, graph: Graph) -> str | None:
    """The input of a projection by weights; None for anything else."""
    if node.op.startswith("intarsia.linear"):
        return node.ref("input")
    if node.op not in _PROJECTIONS:
        return None
    data, weight = (node.args[arg] for arg in _PROJECTIONS[node.op])
    if isinstance(data, Ref) and isinstance(weight, Ref) and _is_weight(graph, weight.name):
        return data.name
    return None


def _is_weight(graph: Graph, name: str) -> bool:
    """Whether the value is a parameter, or one seen through single-input calls such as a transpose."""
    while (node := graph.producers.get(name)) is not None:
        if len(node.inputs) != 1:
            return False
        name = node.inputs[0]
    return all(value.name != name for value in graph.inputs)


def _stream(graph: Graph, name: str) -> str:
    while (node := graph.producers.get(name)) is not None and _keeps_rows(node, graph):
        name = node.inputs[0]
    return name


def _keeps_rows(node: Node, graph: Graph) -> bool:
    return node.op in _NORMS or node.op in _SAME or node.op in _SHAPED or node.op.startswith("aten.to.")


def _carriers(node: Node, graph: Graph, sizes: Mapping[str, int]) -> list[str]:
    """The inputs whose data goes on, without shape givers and tables that broadcast."""
    if node.op in _EMPTY:
        return []
    if node.op in _SHAPED or node.op in _NORMS:
        return [node.inputs[0]]
    if node.op in _POINTWISE:
        elements = {name: graph.type(name).elements(sizes) for name in node.inputs}
        return [name for name, count in elements.items() if count == max(elements.values())]
    return list(node.inputs)
