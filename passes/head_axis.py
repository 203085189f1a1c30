"""Where the heads of attention lie in a value, and what each operator does with them.

Attention treats its heads alike, so they may stand in any order if all calls between the projections and attention, and
from there to the output projection, take part. Each rule below says, of one call, what permuting the heads of one of
its values does to the others, so that the call still computes the same: that is the proof that ``trace_heads`` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch

from intarsia.ir.graph import Ref
from intarsia.ir.operators import resolve
from intarsia.ir.sizes import Dim
from intarsia.passes import head_parts
from intarsia.passes.head_blocks import HeadAxis, reshaped
from intarsia.passes.head_place import Carried, Place, tensors

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
    other = place.other("self")
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
    return Carried({place.other("self"): replace(place.axis, axis=axis)})


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


def _extents(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(str, shape))}]"


_ALIKE = ("_to_copy", "alias", "contiguous", "detach", "empty_like", "to.dtype", "type_as", "zeros_like")
_REGROUPING = ("_unsafe_view", "flatten.using_ints", "reshape", "unflatten.int")

_RULES: Mapping[str, Rule] = {
    **{f"aten.{op}": _same for op in _ALIKE},
    **{f"aten.{op}": _reshape for op in (*_REGROUPING, "unsqueeze", "view")},
    **dict.fromkeys(("aten.copy", "aten.expand"), elementwise),
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _norm),
    **dict.fromkeys(("aten.amax", "aten.mean.dim", "aten.sum.dim_IntList"), _reduce),
    **dict.fromkeys(("aten.chunk", "aten.split.Tensor", "aten.split_with_sizes"), head_parts.split),
    **dict.fromkeys(
        ("aten.scaled_dot_product_attention", "intarsia.attention", "intarsia.block_sparse_attention"), _attention
    ),
    "aten.cat": head_parts.cat,
    "aten.index_select": head_parts.take,
    "aten.linear": _linear,
    "aten.permute": _permute,
    "aten.select.int": head_parts.select,
    "aten.slice.Tensor": head_parts.slice,
    "aten.slice_scatter": head_parts.scatter,
    "aten.stack": head_parts.stack,
    "aten.transpose.int": _transpose,
    "aten.unbind.int": head_parts.unbind,
    "intarsia.norm_rope": _norm_rope,
}
"""What is known of operators; pointwise ones, by PyTorch's own tag, are elementwise."""
