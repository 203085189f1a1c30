"""How values certainly lie in memory, proved from the operators that make them.

A graph has no strides: what a value is does not depend on how it lies. But kernels round alike only when their inputs
also lie alike, so a pass that must not change a single bit removes a copy only where nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from math import prod

from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol
from intarsia.ir.sizes import Dim
from intarsia.ir.types import TensorType

Order = tuple[int, ...]
"""A dense tensor's axes from the slowest to the fastest in memory; row by row is ``(0, 1, 2, ...)``."""

Layouts = Mapping[str, frozenset[Order]]
"""The orders in which a tensor may lie, by name; a tensor that is absent may lie anyhow, with gaps even."""

ALLOCATE = frozenset(
    {
        "aten.arange",
        "aten.arange.start",
        "aten.arange.start_step",
        "aten.empty.memory_format",
        "aten.layer_norm",
        "aten.linear",
        "intarsia.add_requantized",
        "intarsia.avg_pool2d_i8",
        "intarsia.conv2d_i8i8",
        "intarsia.dequantize_static",
        "intarsia.gated_residual",
        "intarsia.linear_i4",
        "intarsia.linear_i8",
        "intarsia.linear_i8i8",
        "intarsia.modulated_norm",
        "intarsia.norm_rope",
        "intarsia.quantize_static",
        "intarsia.requantize",
    }
)
"""Operators that allocate their result row by row whatever they are given.

``linear`` ends in ``mm`` or ``addmm`` and ``layer_norm`` in its native kernel, which allocate so on every device.
"""

FOLLOW = frozenset(
    {
        "aten._to_copy",
        "aten.alias",
        "aten.clone",
        "aten.cos",
        "aten.detach",
        "aten.dropout",
        "aten.empty_like",
        "aten.exp",
        "aten.gelu",
        "aten.neg",
        "aten.relu",
        "aten.rms_norm",
        "aten.rsqrt",
        "aten.sigmoid",
        "aten.silu",
        "aten.sin",
        "aten.tanh",
        "aten.to.dtype",
        "aten.type_as",
    }
)
"""Operators whose result lies as their first tensor does, if that is dense: elementwise, preserving copies."""

REGROUP = frozenset(
    {
        "aten._unsafe_view",
        "aten.flatten.using_ints",
        "aten.reshape",
        "aten.squeeze.dim",
        "aten.unflatten.int",
        "aten.unsqueeze",
        "aten.view",
    }
)
"""Operators whose result lies row by row if their input does."""

COMBINE = frozenset({"aten.add.Tensor", "aten.div.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"})
"""Operators whose result lies row by row if both operands do, broadcast or not."""


TOKENS_FIRST = frozenset({(0, 2, 1, 3)})
"""Our attention's result: (B, H, S, D) with the heads of a token side by side."""


def layouts(graph: Graph) -> Layouts:
    """The orders in which each tensor may lie; inputs and parameters are the caller's, and so absent."""
    known: dict[str, frozenset[Order]] = {}
    for node in graph.nodes:
        orders = _orders(node, known) if isinstance(node.outputs[0].type, TensorType) else None
        if orders is not None:
            known[node.name] = orders
    return known


def is_contiguous(name: str, known: Layouts) -> bool:
    """Whether the tensor certainly lies row by row."""
    return name in known and all(order == tuple(sorted(order)) for order in known[name])


def _orders(node: Node, known: Layouts) -> frozenset[Order] | None:
    """The orders in which the call's result may lie; None if unknown."""
    format_ = node.args.get("memory_format")
    if format_ not in (None, Symbol("torch.preserve_format")):
        return _rows(node) if format_ == Symbol("torch.contiguous_format") else None
    rule = _RULES.get(node.op)
    return None if rule is None else rule(node, known)


def _rows(node: Node) -> frozenset[Order]:
    return frozenset({tuple(range(len(node.type.shape)))})


def _source(node: Node) -> str:
    source = node.args.get("self", node.args.get("input"))
    return source.name if isinstance(source, Ref) else ""


def _allocate(node: Node, known: Layouts) -> frozenset[Order] | None:
    return _rows(node)


def _follow(node: Node, known: Layouts) -> frozenset[Order] | None:
    return known.get(_source(node))


def _regroup(node: Node, known: Layouts) -> frozenset[Order] | None:
    return _rows(node) if is_contiguous(_source(node), known) else None


def _combine(node: Node, known: Layouts) -> frozenset[Order] | None:
    return _rows(node) if all(is_contiguous(name, known) for name in node.inputs) else None


def _cat(node: Node, known: Layouts) -> frozenset[Order] | None:
    """By rows if all operands lie so, or if there are too few axes for a channels-last result."""
    return _rows(node) if len(node.type.shape) < 4 else _combine(node, known)


def _stack(node: Node, known: Layouts) -> frozenset[Order] | None:
    """By rows if the stacked axis is the last: then no input can make ``stack`` choose a channels-last result."""
    return _rows(node) if node.args.get("dim", 0) in (-1, len(node.type.shape) - 1) else None


def _permute(node: Node, known: Layouts) -> frozenset[Order] | None:
    orders = known.get(_source(node))
    return None if orders is None else frozenset(_permuted(order, node.args["dims"]) for order in orders)


def _permuted(order: Order, dims: Arg) -> Order:
    assert isinstance(dims, tuple)
    place = {dim % len(order): axis for axis, dim in enumerate(dims) if isinstance(dim, int)}
    return tuple(place[axis] for axis in order)


def _attention(node: Node, known: Layouts) -> frozenset[Order] | None:
    """By rows, tokens before heads, or as the query: one of these in each of PyTorch's attention kernels."""
    query = known.get(node.ref("query"))
    if query is None or len(node.type.shape) != 4:
        return None
    return query | {(0, 1, 2, 3), (0, 2, 1, 3)}


_RULES: Mapping[str, Callable[[Node, Layouts], frozenset[Order] | None]] = {
    **dict.fromkeys(ALLOCATE, _allocate),
    **dict.fromkeys(FOLLOW, _follow),
    **dict.fromkeys(REGROUP, _regroup),
    **dict.fromkeys(COMBINE, _combine),
    "aten.permute": _permute,
    "aten.scaled_dot_product_attention": _attention,
    **dict.fromkeys(("intarsia.attention", "intarsia.block_sparse_attention"), lambda node, known: TOKENS_FIRST),
    "aten.cat": _cat,
    "aten.stack": _stack,
}
"""What is known of a call's result, by operator."""


def reshape_gives_rows(orders: frozenset[Order], shape: Sequence[Dim], target: Sequence[Dim]) -> bool:
    """Whether ``reshape`` from ``shape`` to ``target`` certainly gives a result that lies row by row.

    It does where it views what lies row by row already, and where it must copy because it merges neighbouring axes
    that are not neighbours in memory. An axis of one element lies anywhere; a named size may turn out to be one.
    """
    merged = _merged(shape, target)
    if merged is None:
        return False
    named = [axis for axis, extent in enumerate(shape) if isinstance(extent, str)]
    return all(
        _copies_or_lies([axis for axis in order if shape[axis] != 1 and axis not in single], merged)
        for order in orders
        for single in _subsets(named)
    )


def _subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for count in range(len(items) + 1):
        yield from combinations(items, count)


def _copies_or_lies(memory: Sequence[int], merged: Sequence[frozenset[int]]) -> bool:
    """``memory`` holds the axes of more than one element, slowest first."""
    if list(memory) == sorted(memory):
        return True
    for group in merged:
        axes = sorted(group & set(memory))
        if any(memory.index(inner) != memory.index(outer) + 1 for outer, inner in pairwise(axes)):
            return True
    return False


def _merged(shape: Sequence[Dim], target: Sequence[Dim]) -> list[frozenset[int]] | None:
    """The axes of ``shape`` that go into each axis of ``target``; None if an axis is split or extents are unclear."""
    groups: list[frozenset[int]] = []
    axis = 0
    for extent in target:
        ends = range(axis + 1, len(shape) + 1)
        end = next((end for end in ends if _multiplies_to(shape[axis:end], extent)), None)
        if end is None:
            return None
        groups.append(frozenset(range(axis, end)))
        axis = end
    return groups if all(extent == 1 for extent in shape[axis:]) else None


def _multiplies_to(extents: Sequence[Dim], product: Dim) -> bool:
    if len(extents) == 1:
        return extents[0] == product
    return isinstance(product, int) and all(isinstance(e, int) for e in extents) and prod(map(int, extents)) == product
