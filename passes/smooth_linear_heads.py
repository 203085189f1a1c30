"""Attention between the values that it weighs and its result, in both of which heads stand side by side."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.ir.graph import Graph, Node, Ref

_ATTENTION = "aten.scaled_dot_product_attention"
_JOINS = ("aten.reshape", "aten.view", "aten._unsafe_view", "aten.flatten.using_ints")
_SPLITS = ("aten.reshape", "aten.view", "aten._unsafe_view", "aten.unflatten.int")
_SWAPS = ("aten.permute", "aten.transpose.int")
KEEPING = ("aten.alias", "aten.clone", "aten.contiguous", "aten.detach")


@dataclass(frozen=True)
class Heads:
    """What attention weighs.

    Attributes:
        value: The values of all heads side by side, (B, S, H * D), as the result is.
        reader: The call that takes them apart.
        channels: D, channels of a head; what stays inside one goes through attention.
    """

    value: str
    reader: str
    channels: int


def value_of_heads(result: str, graph: Graph) -> Heads | None:
    """What is weighed where ``result`` (B, S, H * D) is attention's, all heads joined; None if it is not.

    Every call in between has one reader, so that nothing but ``result`` shows what becomes of the values.
    """
    join = graph.producers.get(result)
    turned = _below(join, "self", graph, *_SWAPS) if join and join.op in _JOINS else None
    attention = _below(turned, "self", graph, _ATTENTION)
    swapped = _below(attention, "value", graph, *_SWAPS)
    split = _below(swapped, "self", graph, *_SPLITS)
    below = split.args.get("self") if split else None
    if not (join and turned and swapped and split and isinstance(below, Ref) and _swaps(turned) and _swaps(swapped)):
        return None
    whole, parted = graph.type(below.name).shape, split.type.shape
    heads, channels = (*parted, None, None)[2:4]
    if not (isinstance(heads, int) and isinstance(channels, int)) or turned.type.shape[2:] != parted[2:]:
        return None
    if whole != (*parted[:2], heads * channels) or join.type.shape != (*turned.type.shape[:2], heads * channels):
        return None
    return Heads(below.name, split.name, channels)


def _below(node: Node | None, arg: str, graph: Graph, *ops: str) -> Node | None:
    """The call of one of ``ops`` that makes an argument, for this one reader, copies passed over."""
    given = node.args.get(arg) if node else None
    if not isinstance(given, Ref) or len(graph.users.get(given.name, ())) != 1 or given.name in graph.outputs:
        return None
    found = graph.producers.get(given.name)
    if found is not None and found.op in KEEPING:
        return _below(found, "self", graph, *ops)
    return found if found is not None and found.op in ops else None


def _swaps(node: Node) -> bool:
    """Whether the call swaps tokens and heads, the axes 1 and 2 of four."""
    if node.op == "aten.permute":
        return node.args.get("dims") == (0, 2, 1, 3)
    return {node.args["dim0"], node.args["dim1"]} in ({1, 2}, {-2, -3})
