"""Spell out the mean of all values that sparse attention mixes into its result, for backends, whose kernels do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import fresh, rewrite
from intarsia.ir.sizes import Dim
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.base import Pass


@dataclass(frozen=True)
class BlendMeans(Pass):
    """Make the share of the mean ordinary calls.

        %y: f32[B, H, S, D] = intarsia.block_sparse_attention(query=%q, key=%k, value=%v, ..., mean=0.3)

    becomes

        %y.mean: f32[B, H, 1, D] = aten.mean.dim(self=%v, dim=[2], keepdim=True)
        %y.even: f32[B, H, 1, D] = aten.mul.Scalar(self=%y.mean, other=0.3)
        %y.kept: f32[B, H, S, D] = intarsia.block_sparse_attention(query=%q, key=%k, value=%v, ...)
        %y.near: f32[B, H, S, D] = aten.mul.Scalar(self=%y.kept, other=0.7)
        %y: f32[B, H, S, D] = aten.add.Tensor(self=%y.near, other=%y.even)

    With lengths, the mean is over the values that are attended to. A table without blocks leaves zeros for %y.near.
    """

    name: ClassVar[str] = "blend-means"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with no mean left in any call of sparse attention."""

        def rule(node: Node) -> Sequence[Node] | None:
            blends = node.op == "intarsia.block_sparse_attention" and node.args.get("mean")
            return _blended(node, graph) if blends else None

        return rewrite(graph, rule)


def _blended(node: Node, graph: Graph) -> Sequence[Node]:
    share = cast("float", node.args["mean"])
    means = _mean(node, graph)
    mean = means[-1].outputs[0].name
    even = _call("even", "aten.mul.Scalar", means[-1].type, node, graph, self=Ref(mean), other=share)
    if BlockTable.parse(str(node.args["blocks"])).count:
        kept = Value(fresh(f"{node.name}.kept", graph.values), node.type)
        args = {key: arg for key, arg in node.args.items() if key != "mean"}
        near = _call("near", "aten.mul.Scalar", node.type, node, graph, self=Ref(kept.name), other=1 - share)
        nodes = [replace(node, args=args, outputs=(kept,)), near]
    else:
        nodes = [_call("near", "aten.zeros_like", node.type, node, graph, self=node.args["query"])]
    total: dict[str, Arg] = {"self": Ref(nodes[-1].name), "other": Ref(even.name)}
    return (*means, even, *nodes, Node("aten.add.Tensor", total, node.outputs, node.source))


def _mean(node: Node, graph: Graph) -> Sequence[Node]:
    """The calls that end in the mean of the values (B, H, 1, D)."""
    value, lengths = node.args["value"], node.args.get("lengths")
    batch, heads, tokens, channels = graph.type(node.ref("value")).shape
    mean = replace(node.type, shape=(batch, heads, 1, channels))
    if lengths is None:
        return (_call("mean", "aten.mean.dim", mean, node, graph, self=value, dim=(2,), keepdim=True),)
    made: list[Node] = []

    def call(name: str, op: str, shape: tuple[Dim, ...], of: str = node.type.dtype, **args: Arg) -> Ref:
        made.append(_call(name, op, TensorType(of, shape), node, graph, **args))
        return Ref(made[-1].name)

    assert isinstance(lengths, Ref)
    numbers = call("numbers", "aten.arange", (tokens,), "i64", end=cast("int", tokens))
    ends = call("ends", "aten.unsqueeze", (batch, 1), graph.type(lengths.name).dtype, self=lengths, dim=1)
    below = call("below", "aten.lt.Tensor", (batch, tokens), "b1", self=numbers, other=ends)
    ones = call("ones", "aten._to_copy", (batch, tokens), self=below, dtype=Symbol(str(DTYPES[node.type.dtype])))
    row = call("row", "aten.unsqueeze", (batch, 1, tokens), self=ones, dim=1)
    column = call("column", "aten.unsqueeze", (batch, 1, tokens, 1), self=row, dim=3)
    counts = call("counts", "aten.sum.dim_IntList", (batch, 1, 1, 1), self=column, dim=(2,), keepdim=True)
    least = call("least", "aten.clamp", (batch, 1, 1, 1), self=counts, min=1)
    masked = call("masked", "aten.mul.Tensor", (batch, heads, tokens, channels), self=value, other=column)
    sums = call("sums", "aten.sum.dim_IntList", mean.shape, self=masked, dim=(2,), keepdim=True)
    call("mean", "aten.div.Tensor", mean.shape, self=sums, other=least)
    return made


def _call(name: str, op: str, type_: TensorType, node: Node, graph: Graph, **args: Arg) -> Node:
    """A call whose result is called after the node's."""
    return Node(op, args, (Value(fresh(f"{node.name}.{name}", graph.values), type_),), node.source)
