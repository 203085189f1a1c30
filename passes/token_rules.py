"""How the axes of a call's result follow from those of its operands, by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Protocol

import torch

from intarsia.ir.graph import Arg, Node, Ref
from intarsia.ir.operators import resolve
from intarsia.passes.token_axes import Axes, Axis, Factor, count, cut, joined, length, regrouped, unknown

REGROUP = frozenset(
    {
        "aten._unsafe_view",
        "aten.flatten.using_ints",
        "aten.reshape",
        "aten.squeeze",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.unflatten.int",
        "aten.unsqueeze",
        "aten.view",
        "aten.view_as",
        "aten.reshape_as",
    }
)
"""Operators whose result is the same elements in the same order under another shape."""

BESIDE = frozenset(
    {
        "aten.clone",
        "aten.contiguous",
        "aten.copy",
        "aten.dropout",
        "aten.expand",
        "aten.expand_as",
        "aten.layer_norm",
        "aten.repeat",
        "aten.repeat_interleave.self_int",
        "aten.rms_norm",
        "aten.softmax.int",
        "aten.type_as",
        "aten.zeros_like",
        "aten._softmax",
        "aten._to_copy",
        "intarsia.add_requantized",
        "intarsia.dequantize_static",
        "intarsia.gated_residual",
        "intarsia.modulated_norm",
        "intarsia.quantize_static",
        "intarsia.requantize",
    }
)
"""Operators that leave each element at its place along an axis that keeps its extent, beside all pointwise ones."""

PRODUCTS: Mapping[str, tuple[str, str]] = {
    "aten.linear": ("input", ""),
    "aten.addmm": ("mat1", "mat2"),
    "aten.mm": ("self", "mat2"),
    "aten.bmm": ("self", "mat2"),
    "aten.matmul": ("self", "other"),
    "intarsia.linear_i8": ("input", ""),
    "intarsia.linear_i4": ("input", ""),
    "intarsia.linear_i8i8": ("input", ""),
}
"""Matrix products by the names of their factors; a layer's weight gives no axis."""

REDUCTIONS = frozenset({"aten.amax", "aten.amin", "aten.mean.dim", "aten.sum.dim_IntList", "aten.var.correction"})
"""Operators that make one number of those along the axes ``dim``, and leave the other axes as they are."""

CONVOLUTIONS = frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"})


class Known(Protocol):
    """What is known of the values before a call."""

    def of(self, name: str) -> Axes:
        """The axes of a tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The extents of a tensor."""

    def is_tensor(self, name: str) -> bool:
        """Whether the value is a tensor and no number."""


def moved(node: Node, place: int, known: Known) -> Axes:
    """The axes of the call's output at ``place``; none if the operator may move elements otherwise than by axes."""
    name = node.outputs[place].name
    rule = _RULES.get(node.op)
    if rule is not None:
        return rule(node, known, place)
    if node.op in REGROUP:
        return regrouped(known.of(node.inputs[0]), known.shape(name))
    if node.op in BESIDE or is_pointwise(node.op):
        return _beside(node.inputs, known.shape(name), known)
    return ()


def _beside(names: tuple[str, ...], shape: tuple[int, ...], known: Known) -> Axes:
    """What is known of a result of this shape whose elements stand beside those of the values, broadcast."""
    found = [unknown(extent) for extent in shape]
    for name in filter(known.is_tensor, names):
        for back, axis in enumerate(reversed(known.of(name)[-len(shape) :] if shape else ()), start=1):
            if length(axis) == shape[-back]:
                found[-back] = joined(found[-back], axis)
    return tuple(found)


@lru_cache(maxsize=4096)
def is_pointwise(op: str) -> bool:
    """Whether PyTorch says that the operator works element by element."""
    if not op.startswith("aten."):
        return False
    return torch.Tag.pointwise in getattr(resolve(op), "tags", ())


def _axis(node: Node, rank: int, *, default: Arg = None, arg: str = "dim") -> int | None:
    found = node.args.get(arg, default)
    return found % rank if isinstance(found, int) and rank else None


def _permute(node: Node, known: Known, place: int) -> Axes:
    given, dims = known.of(node.ref("self")), node.args["dims"]
    assert isinstance(dims, tuple)
    return tuple(given[dim] for dim in dims if isinstance(dim, int))


def _transpose(node: Node, known: Known, place: int) -> Axes:
    given = list(known.of(node.ref("self")))
    one, other = _axis(node, len(given), arg="dim0"), _axis(node, len(given), arg="dim1")
    if one is None or other is None:
        return ()
    given[one], given[other] = given[other], given[one]
    return tuple(given)


def _transpose_matrix(node: Node, known: Known, place: int) -> Axes:
    return known.of(node.ref("self"))[::-1]


def _slice(node: Node, known: Known, place: int) -> Axes:
    given = known.of(node.ref("self"))
    dim = _axis(node, len(given), default=0)
    start, end = (node.args.get(arg) for arg in ("start", "end"))
    if dim is None or node.args.get("step", 1) != 1 or isinstance(start, Ref) or isinstance(end, Ref):
        return _but(given, dim, known.shape(node.name))
    assert isinstance(start, int | None)
    assert isinstance(end, int | None)
    extent = length(given[dim])
    first, last, _ = slice(start, end).indices(extent)
    return (*given[:dim], cut(given[dim], first, last), *given[dim + 1 :])


def _split(node: Node, known: Known, place: int) -> Axes:
    """Pieces lie one behind the other, each as long as its type says."""
    given = known.of(node.ref("self"))
    dim = _axis(node, len(given), default=0)
    if dim is None:
        return ()
    lengths = [known.shape(value.name)[dim] for value in node.outputs]
    first = sum(lengths[:place])
    return (*given[:dim], cut(given[dim], first, first + lengths[place]), *given[dim + 1 :])


def _select(node: Node, known: Known, place: int) -> Axes:
    given = known.of(node.ref("self"))
    dim = _axis(node, len(given), default=0)
    return () if dim is None else (*given[:dim], *given[dim + 1 :])


def reduced(node: Node, rank: int) -> frozenset[int]:
    """The axes of an operand of this rank that one of ``REDUCTIONS`` makes one number of."""
    dims = node.args.get("dim")
    given = (dims,) if isinstance(dims, int) else dims if isinstance(dims, tuple) else ()
    return frozenset(dim % rank for dim in given if isinstance(dim, int)) or frozenset(range(rank))


def _reduction(node: Node, known: Known, place: int) -> Axes:
    given = known.of(node.ref("input" if "input" in node.args else "self"))
    gone = reduced(node, len(given))
    if node.args.get("keepdim"):
        return tuple(unknown(1) if dim in gone else axis for dim, axis in enumerate(given))
    return tuple(axis for dim, axis in enumerate(given) if dim not in gone)


def _index_select(node: Node, known: Known, place: int) -> Axes:
    given = known.of(node.ref("self"))
    return _but(given, _axis(node, len(given)), known.shape(node.name))


def _but(given: Axes, dim: int | None, shape: tuple[int, ...]) -> Axes:
    """The same axes, but for ``dim``, of which the extent alone is known."""
    return () if dim is None else (*given[:dim], unknown(shape[dim]), *given[dim + 1 :])


def _cat(node: Node, known: Known, place: int) -> Axes:
    parts = [known.of(name) for name in node.inputs if known.is_tensor(name)]
    shape = known.shape(node.name)
    dim = _axis(node, len(shape), default=0)
    if dim is None or any(len(part) != len(shape) for part in parts):
        return ()
    others = list(_beside(node.inputs, shape, known))
    others[dim] = tuple(segment for part in parts for segment in part[dim] if count(segment))
    return tuple(others)


def _stack(node: Node, known: Known, place: int) -> Axes:
    shape = known.shape(node.name)
    dim = _axis(node, len(shape), default=0)
    if dim is None:
        return ()
    others = _beside(node.inputs, (*shape[:dim], *shape[dim + 1 :]), known)
    return (*others[:dim], unknown(shape[dim]), *others[dim:])


def _scatter(node: Node, known: Known, place: int) -> Axes:
    return known.of(node.ref("self"))


def _product(node: Node, known: Known, place: int) -> Axes:
    left, right = PRODUCTS[node.op]
    shape, rows = known.shape(node.name), known.of(node.ref(left))
    columns = known.of(node.ref(right)) if right else ()
    last = columns[-1] if len(columns) > 1 and shape else unknown(shape[-1] if shape else 1)
    return (*rows[:-1], last)


def _convolution(node: Node, known: Known, place: int) -> Axes:
    """A place in the result is as many places of the input as the stride says."""
    given, shape = known.of(node.ref("input")), known.shape(node.name)
    if len(given) != len(shape) or node.args.get("transposed"):
        return ()
    strides = node.args.get("stride", 1)
    spatial = [
        _strided(axis, stride, extent)
        for axis, stride, extent in zip(given[2:], _spread(strides, len(shape) - 2), shape[2:], strict=False)
    ]
    return (given[0], unknown(shape[1]), *spatial)


def _spread(given: Arg, axes: int) -> tuple[Arg, ...]:
    if isinstance(given, tuple):
        return given if len(given) == axes else given * axes
    return (given,) * axes


def _strided(axis: Axis, stride: Arg, extent: int) -> Axis:
    segment = axis[0] if len(axis) == 1 else ()
    if len(segment) != 1 or not isinstance(stride, int) or segment[0].extent // stride != extent:
        return unknown(extent)
    (factor,) = segment
    return ((Factor(extent, factor.source, factor.axis, factor.stride * stride, factor.made),),)


def _attention(node: Node, known: Known, place: int) -> Axes:
    return (*known.of(node.ref("query"))[:-1], known.of(node.ref("value"))[-1])


def _norm_rope(node: Node, known: Known, place: int) -> Axes:
    """The input with its channels split into heads, beside the tables of its tokens."""
    batch, tokens, *rest = regrouped(known.of(node.ref("input")), known.shape(node.name))
    return (batch, joined(tokens, known.of(node.ref("cos"))[0]), *rest)


_RULES: Mapping[str, Callable[[Node, Known, int], Axes]] = {
    "aten.permute": _permute,
    "aten.transpose.int": _transpose,
    "aten.t": _transpose_matrix,
    "aten.slice.Tensor": _slice,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes": _split,
    "aten.chunk": _split,
    "aten.select.int": _select,
    "aten.unbind.int": _select,
    "aten.index_select": _index_select,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.slice_scatter": _scatter,
    "aten.select_scatter": _scatter,
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(
        ("aten.scaled_dot_product_attention", "intarsia.attention", "intarsia.block_sparse_attention"), _attention
    ),
    "intarsia.norm_rope": _norm_rope,
}
"""How the axes of a result follow from those of the operands, by operator."""
