"""Where a change of channels costs least: in the weights before it, in few numbers, or in a call of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.program import split_constant
from intarsia.ir.rewrite import drop_unused, renamed
from intarsia.ir.sizes import evaluate
from intarsia.ir.types import TensorType
from intarsia.passes.smooth_linear_calls import Calls
from intarsia.passes.smooth_linear_heads import KEEPING, value_of_heads
from intarsia.passes.smooth_linear_maps import Factors, Map

LONG = 4096
"""What a size that may vary is taken for when numbers are counted."""

SUMS = ("aten.add.Tensor", "aten.sub.Tensor")
NORMS = ("aten.layer_norm", "aten.rms_norm")


class Rewriting:
    """The graph as its values change, one after the other; calls keep their names."""

    def __init__(self, graph: Graph) -> None:
        self.before, self.now, self.calls = graph, dict(graph.producers), Calls(graph)
        self.sizes = {size.name: max(size.minimum, min(size.maximum or LONG, LONG)) for size in graph.sizes}
        constant, _ = split_constant(graph)
        self.constant = {param.name for param in graph.params} | {v.name for node in constant for v in node.outputs}

    def change(self, value: str, layers: Sequence[str], map_: Map) -> None:
        """Let linear layers that read ``value`` read it changed, and change their weights back."""
        users = {user.name for user in self.before.users[value]}
        alone = users == set(layers) and value not in self.before.outputs
        name = self._changed(value, map_) if alone else self.calls.changed(value, map_)
        shifted = map_ if isinstance(map_, Factors) and map_.shifts else None
        if shifted:
            name = self.calls.shifted(value, name, shifted)
        for layer in layers:
            node = self.now[layer]
            weight = self.calls.columns(layer, node.ref("weight"), map_)
            args = {**node.args, "input": Ref(name), "weight": weight}
            if shifted:
                args["bias"] = self.calls.bias(layer, weight, node.args.get("bias"), shifted)
            self.now[layer] = replace(node, args=args)

    def graph(self) -> Graph:
        """What has become of it."""
        return drop_unused(replace(self.before, nodes=tuple(self._nodes())))

    def _nodes(self) -> Iterator[Node]:
        yield from self.calls.first
        for value in (*self.before.inputs, *self.before.params):
            yield from self.calls.behind.get(value.name, ())
        for node in self.before.nodes:
            yield from self.calls.ahead.get(node.name, ())
            yield self.now[node.name]
            for value in node.outputs:
                yield from self.calls.behind.get(value.name, ())

    def _changed(self, value: str, map_: Map) -> str:
        """The name under which the changed value is found, where nobody needs it unchanged."""
        below = self._below(value, map_)
        if below is None or self._price_of(below, map_) > self._count(value):
            return self.calls.changed(value, map_)
        if not below:
            node = self.now[value]
            rows = {key: self.calls.rows(value, arg, map_) for key, arg in _affine(node).items()}
            self.now[value] = replace(node, args={**node.args, **rows})
        for name, reader in below.items():
            found = self._changed(name, map_) if self._is_alone(name) else self.calls.changed(name, map_)
            node = self.now[reader]
            args = {key: renamed(arg, {name: found}) for key, arg in node.args.items()}
            self.now[reader] = replace(node, args=args)
        return value

    def _below(self, value: str, map_: Map) -> Mapping[str, str] | None:
        """The values to change in this one's stead, each with the call that reads it; None where that cannot be.

        None at all where the call that makes the value has weights that take the change.
        """
        node = self.before.producers.get(value)
        if node is None or value in self.constant or len(node.outputs) != 1:
            return None
        if heads := value_of_heads(value, self.before):
            fits = isinstance(map_, Factors) or heads.channels % map_.block == 0
            return {heads.value: heads.reader} if fits else None
        channels = node.type.shape[-1]
        parts = [name for name in dict.fromkeys(node.inputs) if self._has(name, channels)]
        each = node.inputs.count
        if node.op == "aten.linear" or (node.op in NORMS and isinstance(map_, Factors)):
            affine = _affine(node)
            fits = "weight" in affine and node.args.get("normalized_shape", (channels,)) == (channels,)
            return {} if fits and all(arg.name in self.constant for arg in affine.values()) else None
        if node.op in KEEPING or _joins_rows(node) or (node.op in SUMS and len(parts) == 2):
            return dict.fromkeys(parts, node.name)
        if node.op == "aten.mul.Tensor" and isinstance(map_, Factors):
            parts = [name for name in parts if each(name) == 1]
            return {min(parts, key=lambda name: self._price(name, map_)): node.name} if parts else None
        return None

    def _price(self, value: str, map_: Map) -> int:
        """Numbers that are multiplied at run time so that one call reads the value changed."""
        if value in self.constant:
            return 0
        below = self._below(value, map_) if self._is_alone(value) else None
        return self._count(value) if below is None else min(self._count(value), self._price_of(below, map_))

    def _price_of(self, values: Iterable[str], map_: Map) -> int:
        return sum(self._price(name, map_) for name in values)

    def _count(self, value: str) -> int:
        return prod(evaluate(extent, self.sizes) for extent in self.before.type(value).shape)

    def _has(self, value: str, channels: object) -> bool:
        """Whether a value is a tensor of so many channels."""
        type_ = self.before.values[value].type
        return isinstance(type_, TensorType) and type_.shape[-1:] == (channels,)

    def _is_alone(self, value: str) -> bool:
        """Whether one call alone reads the value."""
        return len(self.before.users.get(value, ())) == 1 and value not in self.before.outputs


def _affine(node: Node) -> Mapping[str, Ref]:
    """Weight and bias of a call, where it has them."""
    args: Mapping[str, Arg] = {key: node.args.get(key) for key in ("weight", "bias")}
    return {key: arg for key, arg in args.items() if isinstance(arg, Ref)}


def _joins_rows(node: Node) -> bool:
    """Whether the call concatenates along an axis other than the last."""
    dim = node.args.get("dim", 0)
    return node.op == "aten.cat" and isinstance(dim, int) and dim % len(node.type.shape) != len(node.type.shape) - 1
