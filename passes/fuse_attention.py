"""Find softmax attention, whole or in pieces, for ``intarsia.attention``.

    %y: f16[B, H, S, D] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v, attn_mask=%mask)

becomes, if ``%mask`` is proved to be "key index < length",

    %y: f16[B, H, S, D] = intarsia.attention(query=%q, key=%k, value=%v, lengths=%lengths, scale=None)

and so does ``softmax(%q @ %k.T * scale) @ %v``, with that scale.
"""

from __future__ import annotations

from dataclasses import replace

from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.rewrite import fresh
from intarsia.ir.types import TensorType
from intarsia.passes.fuse_candidates import Candidate, produced, uncast, used_elsewhere
from intarsia.passes.fuse_key_lengths import KeyLengths, key_lengths

OP = "intarsia.attention"

SOFTMAX = ("aten.softmax.int", "aten._softmax")
PRODUCTS = ("aten.matmul", "aten.bmm")

STEPS = 4
"""Calls between a product and a softmax over which a mask or a bias is looked for."""


def attention(node: Node, graph: Graph) -> Candidate | None:
    """The candidate for a call that is attention as PyTorch has it."""
    args = node.args
    if args.get("dropout_p", 0.0) != 0.0:
        return Candidate(node.name, (), f"dropout_p is {args['dropout_p']}; {OP} drops nothing")
    if args.get("is_causal", False):
        return Candidate(node.name, (), f"is_causal is set; {OP} lets every query see every key")
    if args.get("enable_gqa", False):
        return Candidate(node.name, (), f"enable_gqa is set; {OP} has as many heads in key and value as in query")
    mask = args.get("attn_mask")
    proved = key_lengths(mask.name, graph) if isinstance(mask, Ref) else KeyLengths("")
    if isinstance(mask, Ref) and not proved.reason and not _covers(mask.name, node, graph):
        proved = KeyLengths("", f"the mask %{mask.name} is {graph.type(mask.name)}, not one row for each of the batch")
    if proved.reason:
        return Candidate(node.name, (), proved.reason)
    lengths = Ref(proved.lengths) if proved.lengths else None
    given = {key: args[key] for key in ("query", "key", "value")}
    return Candidate(node.name, (replace(node, op=OP, args=given | {"lengths": lengths, "scale": args.get("scale")}),))


def _covers(mask: str, node: Node, graph: Graph) -> bool:
    """Whether the mask has a row of its own for every query's batch, and an entry for every key."""
    shape, batch, keys = graph.type(mask).shape, graph.type(node.ref("query")).shape[0], graph.type(node.ref("key"))
    return (shape[0], shape[3]) == (batch, keys.shape[2])


def softmax_attention(node: Node, graph: Graph) -> Candidate | None:
    """The candidate for a product of a softmax of scores with values."""
    left, value = list(node.args.values())[:2]
    if not isinstance(left, Ref) or not isinstance(value, Ref):
        return None
    weights = uncast(left.name, graph)
    softmax = produced(weights[-1], graph, *SOFTMAX)
    if softmax is None or softmax.args["dim"] not in (-1, len(softmax.type.shape) - 1):
        return None
    scores = uncast(softmax.ref("self"), graph)
    scaling = produced(scores[-1], graph, "aten.mul.Tensor", "aten.div.Tensor")
    scale = _number(scaling)
    below = uncast(scaling.ref("self"), graph) if scaling is not None and scale is not None else ()
    product = produced((*scores, *below)[-1], graph, *PRODUCTS)
    if product is None:
        return _unknown_scores(node, scores[-1], graph)
    if reason := used_elsewhere((*weights, *scores, *below), graph):
        return Candidate(node.name, (), reason)
    query, turned = product.inputs
    key, made = _key(turned, node.name, graph)
    args = {
        "query": Ref(query),
        "key": Ref(key),
        "value": value,
        "lengths": None,
        "scale": 1.0 if scale is None else scale,
    }
    return Candidate(node.name, (*made, replace(node, op=OP, args=args)))


def _number(scaling: Node | None) -> float | None:
    """What the scores are multiplied by; None if they are not scaled by a number."""
    other = scaling.args.get("other") if scaling else None
    if scaling is None or not isinstance(other, int | float) or other == 0:
        return None
    return float(other) if scaling.op == "aten.mul.Tensor" else 1.0 / other


def _unknown_scores(node: Node, scores: str, graph: Graph) -> Candidate | None:
    """The refusal of attention whose scores are more than a scaled product; None if they stem from no product."""
    names = {scores}
    for _ in range(STEPS):
        makers = [graph.producers[name] for name in names if name in graph.producers]
        if any(maker.op in PRODUCTS for maker in makers):
            changed = graph.producers[scores].op
            return Candidate(node.name, (), f"the scores %{scores} come from {changed}; {OP} only scales a product")
        names = {name for maker in makers for name in maker.inputs}
    return None


def _key(turned: str, place: str, graph: Graph) -> tuple[str, tuple[Node, ...]]:
    """The key (..., T, D) whose last two axes ``turned`` swaps, and the calls that swap them back if nothing did."""
    node = produced(turned, graph, "aten.transpose.int", "aten.permute")
    if node is not None and _swaps(node):
        return node.ref("self"), ()
    *outer, channels, tokens = graph.type(turned).shape
    value = Value(fresh(f"{place}.key", graph.values), TensorType(graph.type(turned).dtype, (*outer, tokens, channels)))
    back = Node("aten.transpose.int", {"self": Ref(turned), "dim0": -2, "dim1": -1}, (value,))
    return value.name, (back,)


def _swaps(node: Node) -> bool:
    rank = len(node.type.shape)
    if node.op == "aten.permute":
        return node.args["dims"] == (*range(rank - 2), rank - 1, rank - 2)
    axes = {axis % rank for axis in (node.args["dim0"], node.args["dim1"]) if isinstance(axis, int)}
    return axes == {rank - 2, rank - 1}
