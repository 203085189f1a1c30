"""Write into the graph between which numbers its activations were seen to lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.errors import PlanError, SpecError
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.program import split_constant
from intarsia.ir.rewrite import fresh, renamed
from intarsia.ir.spec import Spec
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.kernels.limits import FLOATS
from intarsia.passes.base import Pass
from intarsia.passes.integer_island_roles import SCALED, Island, island
from intarsia.passes.quantize_integer_layers import head
from intarsia.passes.quantize_integer_roles import LAYERS, addends, bounds, joined, keeps_grid, source, window

KEEP = "keep"


@dataclass(frozen=True)
class Calibrate(Pass):
    """Let every use of a value see the range that was found for it.

        %y: f32[N, 64] = aten.relu(self=%x)

    becomes, where ``range(low=0.0, high=3.5)`` is chosen at ``y``,

        %y: f32[N, 64] = aten.relu(self=%x)
        %y.calibrated: f32[N, 64] = intarsia.calibrated(input=%y, low=0.0, high=3.5)

    Nothing is clipped: ``quantize-integer`` reads the ranges and takes the calls away. ``intarsia calibrate`` finds the
    ranges (``search.calibration``).
    """

    name: ClassVar[str] = "calibrate"
    steers: ClassVar[bool] = True

    def choices(self, graph: Graph, target: Target) -> Choices:
        """At each place ``keep``; ranges are taken too, whatever they are."""
        return dict.fromkeys(places(graph), (KEEP,))

    def unlisted(self, graph: Graph, target: Target, chosen: Chosen) -> dict[str, str]:
        """Ranges that are none."""
        reasons: dict[str, str] = {}
        for place, option in chosen.items():
            try:
                range_of(option)
            except SpecError as error:
                reasons[place] = str(error)
        return reasons

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with the ranges in it; PlanError for a value that is none, or a range that is none."""
        found = {place: _range(place, option, graph) for place, option in chosen.items() if option != KEEP}
        if not found:
            return graph
        names: dict[str, str] = {}
        nodes: list[Node] = []

        def marked(value: Value, origin: str) -> None:
            if value.name in found:
                low, high = found[value.name]
                made = Value(fresh(f"{value.name}.calibrated", graph.values), value.type)
                args: dict[str, Arg] = {"input": Ref(value.name), "low": low, "high": high}
                nodes.append(Node("intarsia.calibrated", args, (made,), origin))
                names[value.name] = made.name

        for value in graph.inputs:
            marked(value, "")
        for node in graph.nodes:
            args = {key: renamed(arg, names) for key, arg in node.args.items()}
            nodes.append(Node(node.op, args, node.outputs, node.source))
            for value in node.outputs:
                marked(value, node.source)
        outputs = tuple(names.get(name, name) for name in graph.outputs)
        return Graph(graph.name, graph.inputs, graph.params, tuple(nodes), outputs, graph.sizes)


def places(graph: Graph) -> tuple[str, ...]:
    """The values whose ranges integers need: what layers, sums, concatenations and islands read and give.

    Behind one of these the value after a clamp that follows directly; what pools and views make of a value has its
    range.
    """
    constant, _ = split_constant(graph)
    weights = {param.name for param in graph.params} | {value.name for node in constant for value in node.outputs}
    found = dict.fromkeys(name for node in graph.nodes for name in _of(node, graph))
    return tuple(name for name in found if name not in weights and _is_float(name, graph))


def range_of(option: str) -> tuple[float, float]:
    """The numbers of ``range(low=-1.25, high=3.5)``; SpecError unless it is that, finite and in order."""
    spec = Spec.parse(option)
    low, high = spec.args.get("low"), spec.args.get("high")
    if spec.name != "range" or set(spec.args) != {"low", "high"}:
        raise SpecError(f"expected 'range(low=..., high=...)', found {option!r}")
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)):
        raise SpecError(f"{option}: low and high are finite numbers")
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if low > high:
        raise SpecError(f"{option}: low is above high")
    return float(low), float(high)


def _of(node: Node, graph: Graph) -> Iterator[str]:
    """The places about one node."""
    parts: Sequence[str] = addends(node, graph) or joined(node) or ()
    if node.op in LAYERS:
        parts = (node.ref("input"),)
    if isinstance(found := island(node, graph), Island) and found.kind != SCALED:
        parts = found.reads
    yield from (_origin(name, graph) for name in parts)
    if parts:
        yield head(node.name, graph)


def _origin(name: str, graph: Graph) -> str:
    """The value whose range this one has: where views, pools and clamps behind no layer begin."""
    while node := graph.producers.get(name):
        below = source(node)
        if below is None or not (keeps_grid(node) or window(node, graph)) or bounds(node):
            return name
        name = below
    return name


def _is_float(name: str, graph: Graph) -> bool:
    type_ = graph.values[name].type
    return isinstance(type_, TensorType) and type_.dtype in FLOATS


def _range(place: str, option: str, graph: Graph) -> tuple[float, float]:
    if place not in graph.values or not _is_float(place, graph):
        raise PlanError(f"calibrate: %{place} is no activation of the graph")
    try:
        return range_of(option)
    except SpecError as error:
        raise PlanError(f"calibrate: %{place}: {error}") from error
