"""Round weights and activations of convolutions and linear layers to integer grids, in float, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.rewrite import fresh, renamed
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.quantize_integer_grids import TRUNK, Grid
from intarsia.passes.quantize_integer_layers import BITS, KEEP, head, places
from intarsia.passes.quantize_integer_ranges import Ranged, take_ranges
from intarsia.passes.quantize_integer_trunk import NARROW, grain
from intarsia.passes.quantize_integer_values import MADE_ELSEWHERE, Values, plan_values


@dataclass(frozen=True)
class QuantizeInteger(Pass):
    """Put a calibrated network on grids of integers, still computed in float, so that it can be trained.

        %x.calibrated: f32[N, 64] = intarsia.calibrated(input=%x, low=-2.0, high=2.0)
        %y: f32[N, 64] = aten.linear(input=%x.calibrated, weight=%w, bias=%b)
        %y.calibrated: f32[N, 64] = intarsia.calibrated(input=%y, low=-4.0, high=4.0)

    becomes, where ``w8a8`` is chosen at ``y``,

        %x.i8: f32[N, 64] = intarsia.fake_quantize(input=%x, scale=0.01575, low=-128, high=127)
        %y.w8: f32[64, 64] = intarsia.fake_quantize_channels(weight=%w, bits=8, grain=6.05e-05)
        %y.bias: f32[64] = intarsia.fake_quantize_bias(bias=%b, weight=%w, bits=8, grain=6.05e-05, input_scale=0.01575)
        %y: f32[N, 64] = aten.linear(input=%x.i8, weight=%y.w8, bias=%y.bias)
        %y.i16: f32[N, 64] = intarsia.fake_quantize(input=%y, scale=0.000122, low=-32768, high=32767)

    Weights are on a grid of each output channel, activations on one of the tensor, residual sums on one of 16 bits with
    all that they add. Where a result has 16 bits, steps of the weight are multiples of a grain, so that f32 multiplies
    by them exactly (docs/decisions/012-integer-forms.md). ``lower-integer`` turns it
    into integers. Source: HAWQ-V3 (arXiv 2011.10680), section 3.

    Attributes:
        islands: Whether results of softmax, norms, functions and products of activations are on grids too, so that
            ``integer-islands`` can compute them with integers; otherwise they are float, as are sums with them.
        trunk: Bits of residual sums and of what they add, 16 or 8. Of eight, layers read a sum as it is, which takes
            the least time, and sums are as coarse as everything else.
    """

    islands: bool = False
    trunk: int = TRUNK

    name: ClassVar[str] = "quantize-integer"

    def __post_init__(self) -> None:
        if self.trunk not in (NARROW, TRUNK):
            raise ValueError(f"trunk is {self.trunk}; residual sums have {TRUNK} or {NARROW} bits")

    def choices(self, graph: Graph, target: Target) -> Choices:
        """At each layer ``keep`` and those of ``w8a8``, ``w4a8`` (linear layers) and ``w4a4`` that int32 holds."""
        return {place.node.name: (KEEP, *place.offers) for place in places(take_ranges(graph)) if place.offers}

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Layers that can only be kept, each with the reason."""
        return {place.node.name: place.refusal for place in places(take_ranges(graph)) if not place.offers}

    def unlisted(self, graph: Graph, target: Target, chosen: Chosen) -> dict[str, str]:
        """Why a layer does not offer what is asked of it."""
        reasons = {place.node.name: place.reasons for place in places(take_ranges(graph))}
        return {place: reasons[place].get(option, "it is not offered") for place, option in chosen.items()}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with the chosen layers on grids; PlanError for an option that a layer does not take."""
        options = {place: option for place, option in chosen.items() if option != KEEP}
        if not options:
            return graph
        ranged = take_ranges(graph)
        known = {place.node.name: place for place in places(ranged)}
        for name, option in options.items():
            if name not in known:
                raise PlanError(f"{self.name}: nothing to choose at %{name}; it is no convolution and no linear layer")
            if option not in known[name].offers:
                offered = ", ".join((KEEP, *known[name].offers))
                reason = known[name].reasons.get(option, "there is no such option")
                raise PlanError(f"{self.name}: %{name} offers {offered}; the plan asks for {option}: {reason}")
        input_bits = {name: BITS[option][1] for name, option in options.items()}
        values = plan_values(ranged, input_bits, islands=self.islands, trunk_bits=self.trunk)
        return _Rewriting(ranged, values, {name: BITS[option][0] for name, option in options.items()}).graph()


class _Rewriting:
    """The graph as it grows, and the names under which values on grids are found."""

    def __init__(self, ranged: Ranged, values: Values, weight_bits: dict[str, int]) -> None:
        self.ranged, self.values, self.weight_bits = ranged, values, weight_bits
        self.nodes: list[Node] = []
        self.seen: dict[str, str] = {}
        self.made: dict[tuple[str, Grid], str] = {}
        self.taken = set(ranged.graph.values)

    def graph(self) -> Graph:
        before = self.ranged.graph
        for node in before.nodes:
            self.nodes.append(self._layer(node) if node.name in self.weight_bits else self._reading(node))
            if node.name in self.values.kept and self.values.roles[node.name] not in MADE_ELSEWHERE:
                self.seen[node.name] = self._rounded(node.name, self.values.kept[node.name])
        outputs = tuple(self.seen.get(name, name) for name in before.outputs)
        return replace(before, nodes=tuple(self.nodes), outputs=outputs)

    def _reading(self, node: Node) -> Node:
        """The node, its operands on the grids that it wants."""
        wanted = self.values.wanted.get(node.name, {})
        names = {name: self._on(name, wanted.get(name)) for name in node.inputs}
        if all(name == now for name, now in names.items()):
            return node
        return replace(node, args={key: renamed(arg, names) for key, arg in node.args.items()})

    def _on(self, name: str, wanted: Grid | None) -> str:
        """The value on the grid that is wanted of it, or as readers see it."""
        if wanted is None or self.values.kept.get(name) == wanted:
            return self.seen.get(name, name)
        return self._rounded(name, wanted)

    def _rounded(self, name: str, onto: Grid) -> str:
        """The value rounded onto the grid, once for all that want it so."""
        if (name, onto) not in self.made:
            made = self._value(f"{name}.{onto.suffix}", name)
            args: dict[str, Arg] = {"input": Ref(self.seen.get(name, name)), "scale": onto.scale}
            args |= {"low": onto.low, "high": onto.high}
            node = self.ranged.graph.producers.get(name)
            self.nodes.append(Node("intarsia.fake_quantize", args, (made,), node.source if node else ""))
            self.made[name, onto] = made.name
        return self.made[name, onto]

    def _layer(self, node: Node) -> Node:
        """The layer, its input, weight and bias rounded."""
        bits, name = self.weight_bits[node.name], node.ref("input")
        onto = self.values.wanted[node.name][name]
        args = {**node.args, "input": Ref(self._on(name, onto))}
        weight = self._value(f"{node.name}.w{bits}", node.ref("weight"))
        rounding: dict[str, Arg] = {"weight": node.args["weight"], "bits": bits}
        result = self.values.kept.get(head(node.name, self.ranged.graph))
        if result and result.bits == TRUNK:
            rounding["grain"] = grain(onto, result)
        self.nodes.append(Node("intarsia.fake_quantize_channels", rounding, (weight,), node.source))
        args["weight"] = Ref(weight.name)
        if isinstance(bias := node.args.get("bias"), Ref):
            moved = self._value(f"{node.name}.bias", bias.name)
            args["bias"] = Ref(moved.name)
            steps: dict[str, Arg] = {"bias": bias, **rounding, "input_scale": onto.scale}
            self.nodes.append(Node("intarsia.fake_quantize_bias", steps, (moved,), node.source))
        return replace(node, args=args)

    def _value(self, name: str, like: str) -> Value:
        """A value of a fresh name and of the other one's type."""
        free = fresh(name, self.taken)
        self.taken.add(free)
        return Value(free, self.ranged.graph.type(like))
