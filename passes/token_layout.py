"""Follow the axes of a model's inputs through its graph, and read from them how tokens lie in a video.

Data flow alone decides: no name of a module or of a model does. An axis of tokens is known once the frames, rows and
columns of one input meet in it, or once a grid of coordinates is multiplied onto tokens that came as one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.operators import resolve
from intarsia.ir.sizes import Dim, Size, evaluate
from intarsia.ir.tokens import TokenLayout
from intarsia.ir.types import TensorType
from intarsia.passes.token_axes import Axes, Axis, Factor, Segment, count, cut, is_known, joined, regrouped, unknown

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
        "aten._softmax",
        "aten._to_copy",
        "intarsia.gated_residual",
        "intarsia.modulated_norm",
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

CONVOLUTIONS = frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"})


IF_THEY_ARE = "if they are, give tokens='tokens(frames=..., height=..., width=...)'"


def layout_of(axis: Axis) -> TokenLayout | str:
    """How the tokens along an axis lie in a video, or why they do not."""
    grids = [place for place, segment in enumerate(axis) if _grid(segment) is not None]
    if len(grids) != 1:
        return f"its tokens are {described(axis)}, not frames x height x width of a video; {IF_THEY_ARE}"
    (place,) = grids
    if any(factor.named for segment in axis for factor in segment):
        return "its number of tokens is a named size; trace without --dynamic frames, height, width or text"
    frames, height, width = (factor.extent for factor in axis[place])
    before, after = (sum(map(count, part)) for part in (axis[:place], axis[place + 1 :]))
    return TokenLayout(frames, height, width, before, after)


def described(axis: Axis) -> str:
    """What an axis is made of, for messages: ``16 of %text + 3 x 4 x 6 of %video``."""
    return " + ".join(map(_part, axis))


def _part(segment: Segment) -> str:
    extents = " x ".join(str(factor.extent) for factor in segment) or "1"
    sources = dict.fromkeys(f"%{factor.source}" if factor.source else "unknown origin" for factor in segment)
    return f"{extents} of {' and '.join(sources)}" if sources else extents


def _grid(segment: Segment) -> Segment | None:
    """The segment if it is three axes of one source in their order: frames, height, width."""
    if len(segment) != 3 or len({factor.source for factor in segment}) != 1 or not segment[0].source:
        return None
    order = [(factor.axis, -factor.stride) for factor in segment]
    distinct = len({factor.axis for factor in segment}) in (1, 3)
    return segment if distinct and order == sorted(order) else None


class TokenAxes:
    """What each axis of each value is made of.

    Named sizes get one example value each, so that a named batch does not stand in the way.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._sizes = {size.name: _example(size) for size in graph.sizes}
        self._known: dict[str, Axes] = {}
        for value in graph.inputs:
            if isinstance(value.type, TensorType):
                self._keep(value.name, self._source(value.name, made=False))
        for node in graph.nodes:
            for place, value in enumerate(node.outputs):
                if isinstance(value.type, TensorType):
                    self._keep(value.name, self._moved(node, place))

    def of(self, name: str) -> Axes:
        """The axes of a value; where nothing is known, their extents alone."""
        return self._known.get(name) or tuple(map(unknown, self.shape(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        """The extents of a value, named sizes replaced by the example."""
        return tuple(evaluate(dim, self._sizes) for dim in self._graph.type(name).shape)

    def is_tensor(self, name: str) -> bool:
        """Whether the value is a tensor and no number."""
        return isinstance(self._graph.values[name].type, TensorType)

    def _source(self, name: str, *, made: bool) -> Axes:
        dims = self._graph.type(name).shape
        return tuple(self._whole(name, axis, dim, made=made) for axis, dim in enumerate(dims))

    def _whole(self, name: str, axis: int, dim: Dim, *, made: bool) -> Axis:
        extent = evaluate(dim, self._sizes)
        return ((Factor(extent, name, axis, made=made, named=isinstance(dim, str)),),)

    def _keep(self, name: str, axes: Axes) -> None:
        """Note what is known; an axis that does not have the value's extent is none that we understand."""
        fitting = tuple(
            axis if sum(map(count, axis)) == extent else unknown(extent)
            for axis, extent in zip(axes, self.shape(name), strict=False)
        )
        if len(fitting) == len(self.shape(name)) and any(is_known(segment) for axis in fitting for segment in axis):
            self._known[name] = fitting

    def _moved(self, node: Node, place: int) -> Axes:
        """The axes of the call's output at ``place``."""
        name = node.outputs[place].name
        if node.op == "aten.meshgrid.indexing" and node.args.get("indexing") == "ij":
            return self._source(node.name, made=True)
        rule = _RULES.get(node.op)
        if rule is not None:
            return rule(node, self, place)
        if node.op in REGROUP:
            return regrouped(self.of(node.inputs[0]), self.shape(name))
        if node.op in BESIDE or _is_pointwise(node.op):
            return self.beside(node.inputs, self.shape(name))
        return ()

    def beside(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Axes:
        """What is known of a result of this shape whose elements stand beside those of the values, broadcast."""
        found = [unknown(extent) for extent in shape]
        for name in filter(self.is_tensor, names):
            for back, axis in enumerate(reversed(self.of(name)[-len(shape) :] if shape else ()), start=1):
                if sum(map(count, axis)) == shape[-back]:
                    found[-back] = joined(found[-back], axis)
        return tuple(found)


def _example(size: Size) -> int:
    """As near as the size may come to a prime far from usual extents, so that it is mistaken for no other."""
    return min(max(1009, size.minimum), size.maximum or 1009)


@lru_cache(maxsize=4096)
def _is_pointwise(op: str) -> bool:
    if not op.startswith("aten."):
        return False
    return torch.Tag.pointwise in getattr(resolve(op), "tags", ())


def _axis(node: Node, rank: int, *, default: Arg = None, arg: str = "dim") -> int | None:
    found = node.args.get(arg, default)
    return found % rank if isinstance(found, int) and rank else None


def _permute(node: Node, axes: TokenAxes, place: int) -> Axes:
    given, dims = axes.of(node.ref("self")), node.args["dims"]
    assert isinstance(dims, tuple)
    return tuple(given[dim] for dim in dims if isinstance(dim, int))


def _transpose(node: Node, axes: TokenAxes, place: int) -> Axes:
    given = list(axes.of(node.ref("self")))
    one, other = _axis(node, len(given), arg="dim0"), _axis(node, len(given), arg="dim1")
    if one is None or other is None:
        return ()
    given[one], given[other] = given[other], given[one]
    return tuple(given)


def _transpose_matrix(node: Node, axes: TokenAxes, place: int) -> Axes:
    return axes.of(node.ref("self"))[::-1]


def _slice(node: Node, axes: TokenAxes, place: int) -> Axes:
    given = axes.of(node.ref("self"))
    dim = _axis(node, len(given), default=0)
    start, end = (node.args.get(arg) for arg in ("start", "end"))
    if dim is None or node.args.get("step", 1) != 1 or isinstance(start, Ref) or isinstance(end, Ref):
        return _but(given, dim, axes.shape(node.name))
    assert isinstance(start, int | None)
    assert isinstance(end, int | None)
    extent = sum(map(count, given[dim]))
    first, last, _ = slice(start, end).indices(extent)
    return (*given[:dim], cut(given[dim], first, last), *given[dim + 1 :])


def _split(node: Node, axes: TokenAxes, place: int) -> Axes:
    """Pieces lie one behind the other, each as long as its type says."""
    given = axes.of(node.ref("self"))
    dim = _axis(node, len(given), default=0)
    if dim is None:
        return ()
    lengths = [axes.shape(value.name)[dim] for value in node.outputs]
    first = sum(lengths[:place])
    return (*given[:dim], cut(given[dim], first, first + lengths[place]), *given[dim + 1 :])


def _select(node: Node, axes: TokenAxes, place: int) -> Axes:
    given = axes.of(node.ref("self"))
    dim = _axis(node, len(given), default=0)
    return () if dim is None else (*given[:dim], *given[dim + 1 :])


def _index_select(node: Node, axes: TokenAxes, place: int) -> Axes:
    given = axes.of(node.ref("self"))
    return _but(given, _axis(node, len(given)), axes.shape(node.name))


def _but(given: Axes, dim: int | None, shape: tuple[int, ...]) -> Axes:
    """The same axes, but for ``dim``, of which the extent alone is known."""
    return () if dim is None else (*given[:dim], unknown(shape[dim]), *given[dim + 1 :])


def _cat(node: Node, axes: TokenAxes, place: int) -> Axes:
    parts = [axes.of(name) for name in node.inputs if axes.is_tensor(name)]
    shape = axes.shape(node.name)
    dim = _axis(node, len(shape), default=0)
    if dim is None or any(len(part) != len(shape) for part in parts):
        return ()
    others = list(axes.beside(node.inputs, shape))
    others[dim] = tuple(segment for part in parts for segment in part[dim])
    return tuple(others)


def _stack(node: Node, axes: TokenAxes, place: int) -> Axes:
    shape = axes.shape(node.name)
    dim = _axis(node, len(shape), default=0)
    if dim is None:
        return ()
    others = axes.beside(node.inputs, (*shape[:dim], *shape[dim + 1 :]))
    return (*others[:dim], unknown(shape[dim]), *others[dim:])


def _scatter(node: Node, axes: TokenAxes, place: int) -> Axes:
    return axes.of(node.ref("self"))


def _product(node: Node, axes: TokenAxes, place: int) -> Axes:
    left, right = PRODUCTS[node.op]
    shape, rows = axes.shape(node.name), axes.of(node.ref(left))
    columns = axes.of(node.ref(right)) if right else ()
    last = columns[-1] if len(columns) > 1 and shape else unknown(shape[-1] if shape else 1)
    return (*rows[:-1], last)


def _convolution(node: Node, axes: TokenAxes, place: int) -> Axes:
    """A place in the result is as many places of the input as the stride says."""
    given, shape = axes.of(node.ref("input")), axes.shape(node.name)
    if len(given) != len(shape) or node.args.get("transposed"):
        return ()
    strides = node.args.get("stride", 1)
    spatial = [
        _strided(axis, stride, extent)
        for axis, stride, extent in zip(given[2:], _spread(strides, len(shape) - 2), shape[2:], strict=False)
    ]
    return (given[0], unknown(shape[1]), *spatial)


def _spread(given: Arg, count_: int) -> tuple[Arg, ...]:
    if isinstance(given, tuple):
        return given if len(given) == count_ else given * count_
    return (given,) * count_


def _strided(axis: Axis, stride: Arg, extent: int) -> Axis:
    segment = axis[0] if len(axis) == 1 else ()
    if len(segment) != 1 or not isinstance(stride, int) or segment[0].extent // stride != extent:
        return unknown(extent)
    (factor,) = segment
    return ((Factor(extent, factor.source, factor.axis, factor.stride * stride, factor.made, factor.named),),)


def _attention(node: Node, axes: TokenAxes, place: int) -> Axes:
    return (*axes.of(node.ref("query"))[:-1], axes.of(node.ref("value"))[-1])


def _norm_rope(node: Node, axes: TokenAxes, place: int) -> Axes:
    """The input with its channels split into heads, beside the tables of its tokens."""
    batch, tokens, *rest = regrouped(axes.of(node.ref("input")), axes.shape(node.name))
    return (batch, joined(tokens, axes.of(node.ref("cos"))[0]), *rest)


_RULES: Mapping[str, Callable[[Node, TokenAxes, int], Axes]] = {
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
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(
        ("aten.scaled_dot_product_attention", "intarsia.attention", "intarsia.block_sparse_attention"), _attention
    ),
    "intarsia.norm_rope": _norm_rope,
}
"""How the axes of a result follow from those of the operands, by operator."""
