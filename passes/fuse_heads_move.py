"""Permute the heads of the values on a path: weights by an index, activations by what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.rewrite import fresh, renamed
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.passes.head_blocks import HeadAxis
from intarsia.passes.head_trace import Path


@dataclass
class Gathered:
    """Weights with their heads in another order, each made once however often it is read.

    Attributes:
        orders: Names of the indices made so far, by their text.
        weights: Names of the weights made so far, by name, axis and index.
    """

    graph: Graph
    orders: dict[str, str] = field(default_factory=dict)
    weights: dict[tuple[str, int, str], str] = field(default_factory=dict)

    def weight(self, name: str, axis: HeadAxis, order: Sequence[int], heads: int, use: Node) -> tuple[str, list[Node]]:
        """The name of the weight as ``order`` has it, and the calls that make it where none did before.

            %q.order: i64[6] = intarsia.integers(runs="2:2*1,0:2*1,6:2*1")
            %q.weight: f32[6, 8] = aten.index_select(self=%w, dim=0, index=%q.order)

        Args:
            use: The call that reads it, after which it is named.
        """
        type_ = self.graph.type(name)
        extent = cast("int", type_.shape[axis.axis])
        entries = axis.entries(order, heads, extent)
        if entries == list(range(extent)):
            return name, []
        runs = str(TokenOrder.of(entries))
        nodes: list[Node] = []
        if runs not in self.orders:
            index = Value(self._fresh(f"{use.name}.order"), TensorType("i64", (len(entries),)))
            self.orders[runs] = index.name
            nodes.append(Node("intarsia.integers", {"runs": runs}, (index,), use.source))
        key = (name, axis.axis, runs)
        if key not in self.weights:
            shape = (*type_.shape[: axis.axis], len(entries), *type_.shape[axis.axis + 1 :])
            value = Value(self._fresh(f"{use.name}.{name.rpartition('.')[2]}"), TensorType(type_.dtype, shape))
            self.weights[key] = value.name
            args: Mapping[str, Arg] = {"self": Ref(name), "dim": axis.axis, "index": Ref(self.orders[runs])}
            nodes.append(Node("aten.index_select", args, (value,), use.source))
        return self.weights[key], nodes

    def _fresh(self, name: str) -> str:
        return fresh(name, {*self.graph.values, *self.orders.values(), *self.weights.values()})


@dataclass(frozen=True)
class Move:
    """The heads of a path in a new order, which may leave some out.

    Attributes:
        heads: How many there were.
        order: Those that are left, in their order.
        likes: To a product with a weight of which nothing is left, by its name, a value of its result's type.
    """

    graph: Graph
    path: Path
    heads: int
    order: tuple[int, ...]
    likes: Mapping[str, str]

    def type(self, name: str) -> TensorType:
        """The type of a value once heads are left out."""
        type_, axis = self.graph.type(name), self.path.axes.get(name)
        if axis is None:
            return type_
        extent = axis.moved(cast("int", type_.shape[axis.axis]), len(self.order), self.heads)
        return replace(type_, shape=(*type_.shape[: axis.axis], extent, *type_.shape[axis.axis + 1 :]))

    def is_empty(self, name: str) -> bool:
        """Whether nothing is left of a value."""
        axis = self.path.axes.get(name)
        return axis is not None and self.type(name).shape[axis.axis] == 0

    def reads_nothing(self, node: Node) -> bool:
        """Whether a call of which something is left reads a value of which nothing is, other than to join it."""
        gives = not all(self.is_empty(value.name) for value in node.outputs)
        return gives and node.op != "aten.cat" and any(self.is_empty(name) for name in node.inputs)

    def nodes(self, node: Node, gathered: Gathered) -> Sequence[Node]:
        """What stands in place of a call on the path: nothing if nothing is left of its results."""
        if all(self.is_empty(value.name) for value in node.outputs):
            return ()
        if node.name in self.likes:
            return (_constant(node, self.likes[node.name]),)
        made: list[Node] = []
        names: dict[str, str] = {}
        for name in dict.fromkeys(node.inputs):
            axis = self.path.weights.get((node.name, name))
            if axis is not None:
                names[name], calls = gathered.weight(name, axis, self.order, self.heads, node)
                made += calls
        args = {key: renamed(arg, names) for key, arg in self._resized(node).items()}
        outputs = tuple(
            replace(value, type=self.type(value.name)) if isinstance(value.type, TensorType) else value
            for value in node.outputs
        )
        op = "aten.split_with_sizes" if "split_sizes" in args else node.op
        return (*made, replace(node, op=op, args=args, outputs=outputs))

    def _resized(self, node: Node) -> Mapping[str, Arg]:
        """The call's arguments, those that speak of extents with the extents that are left."""
        rule = _EXTENTS.get(node.op)
        return node.args if rule is None or len(self.order) == self.heads else dict(rule(node, self))


def _constant(node: Node, like: str) -> Node:
    """A linear layer of nothing: its bias, for each token."""
    bias = node.args.get("bias")
    if isinstance(bias, Ref):
        return replace(node, op="aten.expand_as", args={"self": bias, "other": Ref(like)})
    return replace(node, op="aten.zeros_like", args={"self": Ref(like)})


def _view(node: Node, move: Move) -> Iterator[tuple[str, Arg]]:
    """``size`` names every axis of the result."""
    axis = move.path.axes.get(node.name)
    for key, arg in node.args.items():
        if axis is not None and key in ("size", "shape") and isinstance(arg, tuple):
            yield key, (*arg[: axis.axis], _extent(node.name, move), *arg[axis.axis + 1 :])
        else:
            yield key, arg


def _unflatten(node: Node, move: Move) -> Iterator[tuple[str, Arg]]:
    """``sizes`` names the axes into which ``dim`` is cut."""
    axis = move.path.axes[node.name]
    place = axis.axis - cast("int", node.args["dim"]) % len(move.graph.type(node.ref("self")).shape)
    sizes = cast("tuple[Arg, ...]", node.args["sizes"])
    changed = 0 <= place < len(sizes)
    new = (*sizes[:place], _extent(node.name, move), *sizes[place + 1 :]) if changed else sizes
    yield from {**node.args, "sizes": new}.items()


def _slice(node: Node, move: Move) -> Iterator[tuple[str, Arg]]:
    """``start`` and ``end`` count entries, of which there are fewer."""
    source, axis = move.graph.type(node.ref("self")), move.path.axes[node.ref("self")]
    yield from node.args.items()
    if cast("int", node.args.get("dim", 0)) % len(source.shape) != axis.axis:
        return
    extent = cast("int", source.shape[axis.axis])
    first, last, _ = slice(node.args.get("start"), node.args.get("end")).indices(extent)
    yield "start", axis.moved(first, len(move.order), move.heads)
    yield "end", axis.moved(last, len(move.order), move.heads)


def _split(node: Node, move: Move) -> Iterator[tuple[str, Arg]]:
    """Parts that were of one extent may not be any more."""
    source, axis = node.ref("self"), move.path.axes[node.ref("self")]
    dim = cast("int", node.args.get("dim", 0)) % len(move.graph.type(source).shape)
    if dim != axis.axis:
        yield from node.args.items()
        return
    yield "self", node.args["self"]
    yield "split_sizes", tuple(cast("int", move.type(value.name).shape[dim]) for value in node.outputs)
    yield "dim", dim


def _cat(node: Node, move: Move) -> Iterator[tuple[str, Arg]]:
    """Parts of which nothing is left are left out."""
    left = tuple(Ref(name) for name in node.inputs if not move.is_empty(name))
    yield from {**node.args, "tensors": left}.items()


def _extent(name: str, move: Move) -> int:
    return cast("int", move.type(name).shape[move.path.axes[name].axis])


_EXTENTS: Mapping[str, Callable[[Node, Move], Iterator[tuple[str, Arg]]]] = {
    **dict.fromkeys(("aten._unsafe_view", "aten.expand", "aten.reshape", "aten.view"), _view),
    **dict.fromkeys(("aten.chunk", "aten.split.Tensor", "aten.split_with_sizes"), _split),
    "aten.cat": _cat,
    "aten.slice.Tensor": _slice,
    "aten.unflatten.int": _unflatten,
}
"""How arguments that speak of extents change, by operator."""
