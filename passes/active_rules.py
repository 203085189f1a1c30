"""How a call is made on some of the tokens: which operands lose the other tokens, and which arguments change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.types import TensorType
from intarsia.passes.token_places import Place
from intarsia.passes.token_rules import BESIDE, PRODUCTS, REDUCTIONS, REGROUP, is_pointwise, reduced

END = 2**63 - 1
"""What PyTorch writes for the end of a slice that has none."""

Needed = Mapping[str, Place]
"""Of which operands only the active tokens are taken, and where their tokens lie."""

Row = tuple[Mapping[str, Arg], Needed]
"""The call's arguments, and what its operands have to be."""

RowRule = Callable[[Node, Graph, Mapping[str, Place]], Row | None]


def by_rows(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """The call on active tokens, each of whose results follows from the same token of the operands; None if it mixes.

    Args:
        node: One of whose operands has tokens.
        places: Where the tokens lie in its operands and results, as far as they lie along an axis.
    """
    if any(value.name not in places for value in node.outputs):
        return None
    rule = _RULES.get(node.op)
    if rule is None and (node.op in BESIDE or is_pointwise(node.op)):
        rule = _beside
    found = rule(node, graph, places) if rule else None
    if found is None:
        return None
    asked = found[1]
    return found if all(asked.get(name) == places[name] for name in node.inputs if name in places) else None


def pieces(node: Node, graph: Graph, places: Mapping[str, Place]) -> tuple[Node, ...] | None:
    """A slice or split along the axis of tokens as slices that hold whatever the number of active tokens.

    Each takes all tokens of the video or none; None if the call is no slice or split, or cuts through the video.
    """
    if node.op not in _CUTS or node.args.get("step", 1) != 1:
        return None
    source, given = node.ref("self"), node.args.get("dim", 0)
    place, rank = places.get(source), len(graph.type(source).shape)
    if place is None or not isinstance(given, int) or given % rank != place.dim:
        return None
    total, lengths = (
        _extent(graph, source, place.dim),
        [_extent(graph, value.name, place.dim) for value in node.outputs],
    )
    first = node.args.get("start") or 0
    if total is None or None in lengths or not isinstance(first, int):
        return None
    made, first = [], first + total if first < 0 else first
    for value, length in zip(node.outputs, lengths, strict=True):
        assert length is not None
        last, start, end = first + length, place.before, total - place.after
        if not (last <= start or first >= end or (first <= start and last >= end)):
            return None
        cuts: dict[str, Arg] = {"start": _held(first, total, place), "end": _held(last, total, place)}
        made.append(Node("aten.slice.Tensor", {"self": Ref(source), "dim": place.dim, **cuts}, (value,), node.source))
        first = last
    return tuple(made)


def _held(cut: int, total: int, place: Place) -> int:
    """The place of a cut, counted from the end where it lies behind the video."""
    if cut <= place.before:
        return cut
    return END if cut == total else cut - total


_CUTS = frozenset({"aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes", "aten.chunk"})


def _extent(graph: Graph, name: str, dim: int) -> int | None:
    extent = graph.type(name).shape[dim]
    return extent if isinstance(extent, int) else None


def _beside(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """Operands broadcast against the result, the axis of tokens of each being that of the result."""
    place, rank = places[node.name], len(node.type.shape)
    if place.dim in _mixed(node, rank):
        return None
    needed: dict[str, Place] = {}
    for name in _tensors(node, graph):
        shape = graph.type(name).shape
        dim = place.dim - (rank - len(shape))
        if dim >= 0 and shape[dim] != 1:
            needed[name] = replace(place, dim=dim)
    return _sized(node, place), needed


def _mixed(node: Node, rank: int) -> frozenset[int]:
    """Axes along which a norm or a softmax mixes, or a repetition repeats."""
    dims: list[int] = []
    if isinstance(shape := node.args.get("normalized_shape"), tuple):
        dims += range(rank - len(shape), rank)
    if "softmax" in node.op and isinstance(dim := node.args.get("dim"), int):
        dims.append(dim % rank)
    if node.op == "aten.repeat" and isinstance(repeats := node.args.get("repeats"), tuple):
        dims += (number for number, times in enumerate(repeats) if times != 1)
    if node.op == "aten.repeat_interleave.self_int":
        dim = node.args.get("dim")
        dims += [dim % rank] if isinstance(dim, int) else range(rank)
    return frozenset(dims)


def _sized(node: Node, place: Place) -> Mapping[str, Arg]:
    """The arguments; an extent that is asked for along the axis of tokens becomes -1, which keeps what is there."""
    for key in ("size", "shape"):
        sizes = node.args.get(key)
        if isinstance(sizes, tuple):
            told = [
                extent if given == -1 and isinstance(extent, int) and node.op != "aten.expand" else given
                for given, extent in zip(sizes, node.type.shape, strict=True)
            ]
            told[place.dim] = -1
            return {**node.args, key: tuple(told)}
    return node.args


def _tensors(node: Node, graph: Graph) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(node.inputs) if isinstance(graph.values[name].type, TensorType))


def _regroup(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """A view that leaves the axis of tokens whole."""
    source = node.inputs[0]
    if source not in places:
        return None
    if node.op in ("aten.view_as", "aten.reshape_as"):
        return None
    return _sized(node, places[node.name]), {source: places[source]}


def _moved(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """Axes in another order, or one of the others taken apart: the arguments stay."""
    source = node.ref("self")
    return (node.args, {source: places[source]}) if source in places else None


def _product(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """The rows of the first factor; the second has no tokens."""
    left, right = PRODUCTS[node.op]
    source = node.ref(left)
    if source not in places or places[source] != places[node.name] or (right and node.ref(right) in places):
        return None
    return node.args, {source: places[source]}


def _reduction(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    source = node.ref("input" if "input" in node.args else "self")
    if source not in places or places[source].dim in reduced(node, len(graph.type(source).shape)):
        return None
    return node.args, {source: places[source]}


def _joined(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """Concatenation and stacking: along the axis of tokens one operand has the video, along others all have."""
    place, rank = places[node.name], len(node.type.shape)
    dim = node.args.get("dim", 0)
    if not isinstance(dim, int):
        return None
    names = _tensors(node, graph)
    if node.op == "aten.stack":
        inner = replace(place, dim=place.dim - (dim % rank < place.dim))
        return node.args, dict.fromkeys(names, inner)
    if dim % rank != place.dim:
        return node.args, dict.fromkeys(names, place)
    holding = [name for name in names if name in places]
    return (node.args, {name: places[name] for name in holding}) if len(holding) == 1 else None


def _placed_into(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """A piece written into another axis than that of tokens, or one that has all of the video into that axis."""
    place, dim, rank = places[node.name], node.args.get("dim", 0), len(node.type.shape)
    self, source = node.ref("self"), node.ref("src")
    if not isinstance(dim, int):
        return None
    if dim % rank != place.dim:
        gone = node.op == "aten.select_scatter" and dim % rank < place.dim
        return node.args, {self: place, source: replace(place, dim=place.dim - gone)}
    start, total = node.args.get("start") or 0, _extent(graph, self, place.dim)
    if source not in places or total is None or not isinstance(start, int) or node.args.get("step", 1) != 1:
        return None
    inner = places[source]
    end = start + inner.others + total - place.others
    cuts = {"start": _held(start, total, place), "end": _held(end, total, place)}
    return {**node.args, **cuts}, {self: place, source: inner}


def _norm_rope(node: Node, graph: Graph, places: Mapping[str, Place]) -> Row | None:
    """Tables of cos and sin have a row for each token."""
    source = node.ref("input")
    if source not in places or places[source].dim != 1:
        return None
    tables = {node.ref(key): replace(places[source], dim=0) for key in ("cos", "sin")}
    return node.args, {source: places[source], **tables}


_RULES: Mapping[str, RowRule] = {
    **dict.fromkeys(REGROUP, _regroup),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(
        (
            "aten.permute",
            "aten.transpose.int",
            "aten.t",
            "aten.index_select",
            "aten.unbind.int",
            "aten.select.int",
            "aten.slice.Tensor",
            "aten.split.Tensor",
            "aten.split_with_sizes",
            "aten.chunk",
        ),
        _moved,
    ),
    **dict.fromkeys(("aten.cat", "aten.stack"), _joined),
    **dict.fromkeys(("aten.slice_scatter", "aten.select_scatter"), _placed_into),
    "intarsia.norm_rope": _norm_rope,
}
"""By operator; all that work element by element have a rule in common."""
