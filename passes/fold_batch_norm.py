"""Fold batch norms, as they are once training is over, into the layers before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused, fresh, rewrite
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import Pass

NORMS = ("aten._native_batch_norm_legit_no_training", "aten.batch_norm")
LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear")


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Scale a layer's weight and move its bias by the statistics of the norm behind it.

        %c: f32[N, 8, 6, 6] = aten.conv2d(input=%x, weight=%w, bias=None, ...)
        %y: f32[N, 8, 6, 6], ... = aten._native_batch_norm_legit_no_training(input=%c, weight=%g, bias=%b, ...)

    becomes, with calls on parameters only, which run once at build,

        %y.gain: f32[8] = %g / sqrt(%running_var + eps), %y.weight: f32[8, 3, 3, 3] = %w * %y.gain, row by row
        %y.bias: f32[8] = %b - %running_mean * %y.gain (and %y.gain times the layer's own bias)
        %y: f32[N, 8, 6, 6] = aten.conv2d(input=%x, weight=%y.weight, bias=%y.bias, ...)

    Source: HAWQ-V3 (arXiv 2011.10680), appendix D, equations 16 and 17.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Norms that stay, each with the reason."""
        reasons = {norm.name: _why_not(norm, graph) for norm in graph.find(*NORMS)}
        return {name: reason for name, reason in reasons.items() if reason}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph without the norms that follow a layer of their own."""
        folded = {norm.name: norm for norm in graph.find(*NORMS) if _why_not(norm, graph) is None}
        if not folded:
            return graph
        return drop_unused(rewrite(graph, lambda node: _folded(node, graph) if node.name in folded else None))


def _why_not(norm: Node, graph: Graph) -> str | None:
    if norm.args.get("training"):
        return "it takes its statistics from the batch; trace the model in eval mode"
    if not all(isinstance(norm.args.get(name), Ref) for name in ("running_mean", "running_var")):
        return "it has no running statistics, so that it normalizes by the batch"
    name = norm.ref("input")
    layer = graph.producers.get(name)
    if layer is None or layer.op not in LAYERS:
        return f"what it normalizes, %{name}, comes from {layer.op if layer else 'outside'}, not from a layer"
    if name in graph.outputs or len(graph.users.get(name, ())) > 1:
        return f"what it normalizes, %{name}, is used elsewhere too"
    if any(value.name in graph.outputs or graph.users.get(value.name) for value in norm.outputs[1:]):
        return "its statistics are used"
    return _why_no_product(norm, layer, graph)


def _why_no_product(norm: Node, layer: Node, graph: Graph) -> str | None:
    """Why the weight cannot be multiplied by what the norm multiplies with: element types that differ."""
    own = [norm.args.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    kinds = {graph.type(arg.name).dtype for arg in (*own, layer.args.get("bias")) if isinstance(arg, Ref)}
    weight = graph.type(layer.ref("weight"))
    if kinds != {weight.dtype}:
        return f"its numbers are {', '.join(sorted(kinds))} and the layer's weight is {weight.dtype}; cast one of them"
    return None


def _folded(norm: Node, graph: Graph) -> Sequence[Node]:
    layer = graph.producers[norm.ref("input")]
    weight, variance = layer.ref("weight"), norm.ref("running_var")
    channels = graph.type(variance)
    made: list[Node] = []

    def call(name: str, op: str, type_: TensorType, **args: Arg) -> Ref:
        value = Value(fresh(f"{norm.name}.{name}", graph.values), type_)
        made.append(Node(op, args, (value,), norm.source))
        return Ref(value.name)

    wide = call("variance", "aten.add.Scalar", channels, self=Ref(variance), other=norm.args["eps"])
    gain = call("inverse", "aten.rsqrt", channels, self=wide)
    if isinstance(scale := norm.args.get("weight"), Ref):
        gain = call("gain", "aten.mul.Tensor", channels, self=scale, other=gain)
    kernel = graph.type(weight)
    column = (channels.shape[0], *[1] * (len(kernel.shape) - 1))
    rows = call("rows", "aten.view", replace(channels, shape=column), self=gain, size=tuple(column))
    scaled = call("weight", "aten.mul.Tensor", kernel, self=Ref(weight), other=rows)
    middle: Arg = norm.args["running_mean"]
    if isinstance(bias := layer.args.get("bias"), Ref):
        middle = call("middle", "aten.sub.Tensor", channels, self=middle, other=bias)
    moved = call("moved", "aten.mul.Tensor", channels, self=middle, other=gain)
    if isinstance(offset := norm.args.get("bias"), Ref):
        moved = call("bias", "aten.sub.Tensor", channels, self=offset, other=moved)
    else:
        moved = call("bias", "aten.neg", channels, self=moved)
    made.append(replace(layer, args={**layer.args, "weight": scaled, "bias": moved}, outputs=norm.outputs[:1]))
    return made
