"""Where the heads of attention lie in a value, and what each operator does with them.

Attention treats its heads alike, so they may stand in any order if all calls between the projections and attention, and
from there to the output projection, take part. Each rule below says, of one call, what permuting the heads of one of
its values does to the others, so that the call still computes the same: that is the proof that ``trace_heads`` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import cast

import torch

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.operators import resolve
from intarsia.ir.sizes import Dim
from intarsia.ir.types import TensorType
from intarsia.passes.head_blocks import HeadAxis, reshaped


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


Rule = Callable[[Place], Carried | str]
"""What the call does, or why nothing is known of it."""


def carried(place: Place) -> Carried | str:
    """What the call does with the heads of one of its values; the reason if that is not known."""
    rule = _RULES.get(place.node.op) or (elementwise if _is_pointwise(place.node.op) else None)
    if rule is None:
        return f"{place.node.op} has no rule that says where it leaves the heads of %{place.name}"
    return rule(place)


@lru_cache(maxsize=4096)
def _is_pointwise(op: str) -> bool:
    found = resolve(op)
    return isinstance(found, torch._ops.OpOverload) and torch.Tag.pointwise in found.tags


def tensors(node: Node, graph: Graph) -> Iterator[str]:
    """Names of all tensors that the call reads or defines, each once."""
    names = dict.fromkeys((*node.inputs, *(value.name for value in node.outputs)))
    return (name for name in names if isinstance(graph.values[name].type, TensorType))


def elementwise(place: Place) -> Carried | str:
    """Aligned from the last axis; an operand with one entry there, or without the axis, is alike for all heads."""
    return _aligned(place, tuple(tensors(place.node, place.graph)))


def _same(place: Place) -> Carried | str:
    """As elementwise, of the input ``self`` alone: the others only say which type the result has."""
    names = (place.node.ref("self"), place.node.name)
    return _aligned(place, names) if place.name in names else Carried({})


def _aligned(place: Place, names: Sequence[str]) -> Carried:
    last = place.axis.axis - len(place.shape(place.name))
    extent = place.shape(place.name)[last]
    shapes = {name: place.shape(name) for name in names}
    found = {name: shape for name, shape in shapes.items() if len(shape) >= -last and shape[last] == extent}
    return Carried({name: replace(place.axis, axis=len(shape) + last) for name, shape in found.items()})


def _reshape(place: Place) -> Carried | str:
    """Blocks of one axis are an axis of their own, or the other way round."""
    other = _other(place, "self")
    found = reshaped(place.axis, place.shape(place.name), place.shape(other), place.heads)
    if found is None:
        shapes = f"{_extents(place.shape(place.node.ref('self')))} to {_extents(place.shape(place.node.name))}"
        return f"{place.node.op} from {shapes} does not keep the {place.heads} heads together"
    return Carried({other: found})


def _permute(place: Place) -> Carried | str:
    dims = cast("tuple[int, ...]", place.node.args["dims"])
    return _moved(place, [dim % len(dims) for dim in dims])


def _transpose(place: Place) -> Carried | str:
    dims = list(range(len(place.node.type.shape)))
    first, second = (cast("int", place.node.args[arg]) for arg in ("dim0", "dim1"))
    dims[first], dims[second] = dims[second], dims[first]
    return _moved(place, dims)


def _moved(place: Place, dims: Sequence[int]) -> Carried:
    """Axis i of the result is axis ``dims[i]`` of the input."""
    backwards = place.name == place.node.name
    axis = dims[place.axis.axis] if backwards else dims.index(place.axis.axis)
    return Carried({_other(place, "self"): replace(place.axis, axis=axis)})


def _slice(place: Place) -> Carried | str:
    """A part of the input, which begins at ``start``."""
    whole, dim = place.node.ref("self"), place.dim(place.node.ref("self"))
    if place.node.args.get("step", 1) != 1 and place.axis.axis == dim:
        return f"aten.slice.Tensor takes every {place.node.args['step']}th entry of the heads' axis"
    return _parts(place, whole, [(place.node.name, first_of_slice(place.node, place.graph))], dim)


def first_of_slice(node: Node, graph: Graph) -> int:
    """The entry at which ``aten.slice.Tensor`` begins; 0 along an axis of unknown extent."""
    source = graph.type(node.ref("self")).shape
    extent, start = source[cast("int", node.args.get("dim", 0))], node.args.get("start") or 0
    if not isinstance(extent, int) or not isinstance(start, int):
        return 0
    return min(max(start + extent if start < 0 else start, 0), extent)


def _split(place: Place) -> Carried | str:
    """Parts of the input, one after the other."""
    whole = place.node.ref("self")
    return _lined_up(place, whole, [value.name for value in place.node.outputs], place.dim(whole))


def _cat(place: Place) -> Carried | str:
    """Parts of the result, one after the other."""
    return _lined_up(place, place.node.name, place.node.inputs, place.dim(place.node.name))


def _lined_up(place: Place, whole: str, parts: Sequence[str], dim: int) -> Carried | str:
    extents = [place.shape(part)[dim] for part in parts]
    starts = [0] * len(parts)
    if place.axis.axis == dim:
        if not all(isinstance(extent, int) for extent in extents):
            return f"{place.node.op} puts parts of unknown extents on the heads' axis"
        starts = [0, *accumulate(cast("list[int]", extents))][:-1]
    return _parts(place, whole, list(zip(parts, starts, strict=True)), dim)


def _parts(place: Place, whole: str, parts: Sequence[tuple[str, int]], dim: int) -> Carried | str:
    """``parts`` hold the entries of ``whole`` along ``dim`` from these entries on."""
    if place.axis.axis != dim:
        return Carried(dict.fromkeys((whole, *(part for part, _ in parts)), place.axis))
    if place.name != whole:
        starts = sorted({start + first for part, first in parts if part == place.name for start in place.axis.starts})
        return Carried({whole: replace(place.axis, starts=tuple(starts))})
    found: dict[str, HeadAxis] = {}
    for part, first in parts:
        extent = cast("int", place.shape(part)[dim])
        inside = place.axis.within(first, extent, place.heads)
        if inside is None:
            return f"{place.node.op} cuts between the {place.heads} heads of %{whole}"
        if inside.starts:
            found[part] = inside
    return Carried(found)


def _unbind(place: Place) -> Carried | str:
    """The axis disappears from all parts."""
    source = place.node.ref("self")
    return _removed(place, source, [value.name for value in place.node.outputs], place.dim(source))


def _select(place: Place) -> Carried | str:
    source = place.node.ref("self")
    return _removed(place, source, [place.node.name], place.dim(source))


def _stack(place: Place) -> Carried | str:
    """The axis is new in the result."""
    return _removed(place, place.node.name, place.node.inputs, place.dim(place.node.name))


def _removed(place: Place, whole: str, parts: Sequence[str], dim: int) -> Carried | str:
    """``whole`` has the axis ``dim``, which its parts have not."""
    axis = place.axis.axis
    if place.name == whole:
        if axis == dim:
            return f"{place.node.op} takes the heads of %{whole} apart"
        axis -= axis > dim
    parted = replace(place.axis, axis=axis)
    return Carried({**dict.fromkeys(parts, parted), whole: replace(parted, axis=axis + (axis >= dim))})


def _scatter(place: Place) -> Carried | str:
    """``src`` takes the place of a part of ``self``, along an axis without heads."""
    if place.axis.axis == place.dim(place.node.name):
        return f"{place.node.op} writes into the heads' axis"
    return Carried(dict.fromkeys(tensors(place.node, place.graph), place.axis))


def _take(place: Place) -> Carried | str:
    """An index takes entries of an axis without heads."""
    if place.axis.axis == place.dim(place.node.ref("self")):
        return f"{place.node.op} takes single heads"
    return Carried({_other(place, "self"): place.axis})


def _norm(place: Place) -> Carried | str:
    """Over a head's channels every head is normed alone; over all heads the weight goes with them."""
    node = place.node
    normed = cast("tuple[int, ...]", node.args["normalized_shape"])
    outer = len(node.type.shape) - len(normed)
    operands = [arg.name for key in ("weight", "bias") if isinstance(arg := node.args.get(key), Ref)]
    axis = place.axis if place.name not in operands else replace(place.axis, axis=place.axis.axis + outer)
    axes = {node.ref("input"): axis, node.name: axis}
    if axis.axis < outer:
        return Carried(axes)
    return Carried({**axes, **dict.fromkeys(operands, replace(axis, axis=axis.axis - outer))}, whole=True)


def _reduce(place: Place) -> Carried | str:
    """Over axes without heads every head is reduced alone; over the heads' axis the result is alike for all."""
    node, source = place.node, place.node.ref("self")
    rank = len(place.shape(source))
    given = node.args.get("dim")
    dims = {dim % rank for dim in given if isinstance(dim, int)} if isinstance(given, tuple) else set(range(rank))
    kept = [axis for axis in range(rank) if node.args.get("keepdim", False) or axis not in dims]
    axis = place.axis.axis if place.name == source else kept[place.axis.axis]
    if axis in dims:
        return Carried({}, whole=True)
    return Carried({source: replace(place.axis, axis=axis), node.name: replace(place.axis, axis=kept.index(axis))})


def _linear(place: Place) -> Carried | str:
    """Rows of the weight, and bias, make the result's channels; columns take the input's; other axes pass through."""
    node, axis = place.node, place.axis
    input, weight = node.ref("input"), node.ref("weight")
    bias = node.args.get("bias")
    last = len(node.type.shape) - 1
    if place.name in (input, node.name) and axis.axis != last:
        return Carried({input: axis, node.name: axis})
    if place.name == input or (place.name == weight and axis.axis == 1):
        return Carried({input: replace(axis, axis=last), weight: replace(axis, axis=1)}, whole=False)
    rows = {weight: replace(axis, axis=0), node.name: replace(axis, axis=last)}
    return Carried(rows | ({bias.name: replace(axis, axis=0)} if isinstance(bias, Ref) else {}))


def _norm_rope(place: Place) -> Carried | str:
    """All heads are normed together, and then have an axis of their own."""
    node = place.node
    input, weight = node.ref("input"), node.args.get("weight")
    if node.args["heads"] != place.heads or place.name not in (input, node.name):
        return f"{node.op} is of {node.args['heads']} heads, attention of {place.heads}"
    inner = cast("int", node.type.shape[3])
    expected = {input: HeadAxis(2, inner), node.name: HeadAxis(2, 1)}
    if place.axis != expected[place.name]:
        return f"{node.op} takes heads of {inner} channels side by side, %{place.name} has {place.axis}"
    return Carried(expected | ({weight.name: HeadAxis(0, inner)} if isinstance(weight, Ref) else {}), whole=True)


def _attention(place: Place) -> str:
    return f"%{place.name} goes through another attention too"


def _other(place: Place, arg: str) -> str:
    """The result of a call with one tensor, or that tensor, whichever the place is not."""
    return place.node.ref(arg) if place.name == place.node.name else place.node.name


def _extents(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(str, shape))}]"


_ALIKE = ("_to_copy", "alias", "contiguous", "detach", "empty_like", "to.dtype", "type_as", "zeros_like")
_REGROUPING = ("_unsafe_view", "flatten.using_ints", "reshape", "squeeze.dim", "squeeze.dims", "unflatten.int")

_RULES: Mapping[str, Rule] = {
    **{f"aten.{op}": _same for op in _ALIKE},
    **{f"aten.{op}": _reshape for op in (*_REGROUPING, "unsqueeze", "view")},
    **dict.fromkeys(("aten.copy", "aten.expand"), elementwise),
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _norm),
    **dict.fromkeys(("aten.amax", "aten.mean.dim", "aten.sum.dim_IntList"), _reduce),
    **dict.fromkeys(("aten.chunk", "aten.split.Tensor", "aten.split_with_sizes"), _split),
    **dict.fromkeys(
        ("aten.scaled_dot_product_attention", "intarsia.attention", "intarsia.block_sparse_attention"), _attention
    ),
    "aten.cat": _cat,
    "aten.index_select": _take,
    "aten.linear": _linear,
    "aten.permute": _permute,
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.slice_scatter": _scatter,
    "aten.stack": _stack,
    "aten.transpose.int": _transpose,
    "aten.unbind.int": _unbind,
    "intarsia.norm_rope": _norm_rope,
}
"""What is known of operators; pointwise ones, by PyTorch's own tag, are elementwise."""
