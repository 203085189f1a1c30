"""Store the weights of linear layers in eight or four bits, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia import kernels
from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.program import split_constant
from intarsia.ir.rewrite import fresh, rewrite
from intarsia.ir.spec import Spec
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import Pass

KEEP = "keep"
OPTIONS = ("i8", "i4(group=32)", "i4(group=64)", "i4(group=128)")


@dataclass(frozen=True)
class QuantizeLinear(Pass):
    """Round the weight of a linear layer once, at build time, and widen it where it is used.

        %y: f32[N, 64] = aten.linear(input=%x, weight=%w, bias=%b)

    becomes, where ``i4(group=32)`` is chosen at ``y``,

        %y.i4: u8[64, 16], %y.scale: f32[64, 1] = intarsia.quantize_groups(weight=%w, group=32)
        %y: f32[N, 64] = intarsia.linear_i4(input=%x, packed=%y.i4, scale=%y.scale, bias=%b, group=32)

    Attributes:
        min_rows: Layers with fewer output features are left alone: they hold few bytes and often end the network.
    """

    name: ClassVar[str] = "quantize-linear"
    min_rows: int = 32

    def choices(self, graph: Graph, target: Target) -> Choices:
        """At each layer ``keep`` and those of ``i8`` and ``i4`` that the kernels take."""
        return {place: (KEEP, *offers) for place, offers, _ in self._places(graph, target) if offers}

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Layers that can only be kept, each with the reason."""
        return {place: reason for place, offers, reason in self._places(graph, target) if not offers}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with every chosen layer in its bits; PlanError for an option that no layer has."""
        options = {place: option for place, option in chosen.items() if option != KEEP}
        for place, option in options.items():
            if option not in OPTIONS:
                raise PlanError(
                    f"{self.name}: %{place} offers {', '.join((KEEP, *OPTIONS))}; the plan asks for {option}"
                )

        def rule(node: Node) -> Sequence[Node] | None:
            return _rounded(node, graph, options[node.name]) if node.name in options else None

        return rewrite(graph, rule)

    def _places(self, graph: Graph, target: Target) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Every linear layer: its name, what it offers besides keeping, and why it offers nothing."""
        weights = _weights(graph)
        for node in graph.find("aten.linear"):
            rows = node.type.shape[-1]
            if isinstance(rows, int) and rows < self.min_rows:
                yield node.name, (), f"{rows} rows are fewer than min_rows={self.min_rows}"
                continue
            reasons = {option: _why_not(node, graph, target, option, weights) for option in OPTIONS}
            offers = tuple(option for option, reason in reasons.items() if reason is None)
            yield node.name, offers, "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))


def _weights(graph: Graph) -> frozenset[str]:
    """Everything that depends on parameters alone."""
    constant, _ = split_constant(graph)
    made = (value.name for node in constant for value in node.outputs)
    return frozenset((*(param.name for param in graph.params), *made))


def _why_not(node: Node, graph: Graph, target: Target, option: str, weights: frozenset[str]) -> str | None:
    """The kernels' reason not to take the layer as ``option``, asked about the nodes that would stand there."""
    used = [graph.values[name] for name in dict.fromkeys(node.inputs)]
    if len(graph.type(node.ref("weight")).shape) != 2:
        return f"weight is {graph.type(node.ref('weight'))}; a linear layer's is a matrix"
    nodes = tuple(_rounded(node, graph, option))
    piece = Graph(
        graph.name,
        tuple(value for value in used if value.name not in weights),
        tuple(value for value in used if value.name in weights),
        nodes,
        (node.name,),
        graph.sizes,
    )
    return next((reason for made in nodes if (reason := kernels.why_not(made, piece, target))), None)


def _rounded(node: Node, graph: Graph, option: str) -> Sequence[Node]:
    spec = Spec.parse(option)
    return _rows(node, graph) if spec.name == "i8" else _groups(node, graph, int(str(spec.args["group"])))


def _rows(node: Node, graph: Graph) -> Sequence[Node]:
    rows, columns = graph.type(node.ref("weight")).shape
    weight = Value(fresh(f"{node.name}.i8", graph.values), TensorType("i8", (rows, columns)))
    scale = Value(fresh(f"{node.name}.scale", graph.values), TensorType("f32", (rows,)))
    args = {
        "input": node.args["input"],
        "weight": Ref(weight.name),
        "scale": Ref(scale.name),
        "bias": node.args.get("bias"),
    }
    quantize = Node("intarsia.quantize_rows", {"weight": node.args["weight"]}, (weight, scale), node.source)
    return quantize, replace(node, op="intarsia.linear_i8", args=args)


def _groups(node: Node, graph: Graph, group: int) -> Sequence[Node]:
    rows, columns = graph.type(node.ref("weight")).shape
    half, count = (columns // 2, columns // group) if isinstance(columns, int) else (columns, columns)
    packed = Value(fresh(f"{node.name}.i4", graph.values), TensorType("u8", (rows, half)))
    scale = Value(fresh(f"{node.name}.scale", graph.values), TensorType("f32", (rows, count)))
    refs = {"packed": Ref(packed.name), "scale": Ref(scale.name)}
    args = {"input": node.args["input"], **refs, "bias": node.args.get("bias"), "group": group}
    weight = {"weight": node.args["weight"], "group": group}
    quantize = Node("intarsia.quantize_groups", weight, (packed, scale), node.source)
    return quantize, replace(node, op="intarsia.linear_i4", args=args)
