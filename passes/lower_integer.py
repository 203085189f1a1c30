"""Turn a network on grids into integer products, additions and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Graph, Node
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused, renamed
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.lower_integer_codes import Codes
from intarsia.passes.lower_integer_nodes import Emitter
from intarsia.passes.quantize_integer_ranges import take_ranges
from intarsia.passes.quantize_integer_roles import joined, keeps_grid, source

FAKE = "intarsia.fake_quantize"


@dataclass(frozen=True)
class LowerInteger(Pass):
    """Compute what lies on grids with integers: int8 products summed in int32, dyadic numbers between the grids.

        %x.i8: f32[N, 64] = intarsia.fake_quantize(input=%x, scale=0.01575, low=-128, high=127)
        %y.w8: f32[64, 64] = intarsia.fake_quantize_channels(weight=%w, bits=8)
        %y: f32[N, 64] = aten.linear(input=%x.i8, weight=%y.w8, bias=None)
        %relu: f32[N, 64] = aten.relu(self=%y)
        %relu.i8: f32[N, 64] = intarsia.fake_quantize(input=%relu, scale=0.0315, low=-128, high=127)

    becomes

        %x.i8.codes: i8[N, 64] = intarsia.quantize_static(input=%x, scale=0.01575, low=-128, high=127)
        %y.codes: i8[64, 64], %y.scale: f32[64] = intarsia.quantize_channels(weight=%w, bits=8)
        %y.multiplier: i32[64], %y.shift: i32[64] = intarsia.dyadic(scale=%y.scale, factor=0.5)
        %y.exact.multiplier: i32[64], %y.exact.shift: i32[64] = intarsia.exact_dyadic(multiplier=%y.multiplier, ...)
        %relu.i8.codes: i8[N, 64] = intarsia.linear_i8i8(input=%x.i8.codes, weight=%y.codes, ..., low=0, high=127)
        %relu.i8: f32[N, 64] = intarsia.dequantize_static(input=%relu.i8.codes, scale=0.0315, dtype=torch.float32)

    where ``exact_dyadic`` takes numbers beside those given that f32 multiplies by exactly. Only what float operators or
    the network's user read is dequantized. What has no integer form stays in float between a ``dequantize_static`` and
    a ``quantize_static``; ``integer_only`` lists it. Integers and floats on the same grid differ by
    what rounding does: halves go up here and to even there, and a sum rounds each operand. Source: HAWQ-V3 (arXiv
    2011.10680), equations 3 to 7 and 18.
    """

    name: ClassVar[str] = "lower-integer"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph in integers; PlanError for a sum that int32 may not hold, or a scale that no shift reaches."""
        if not any(graph.find(FAKE, "intarsia.fake_quantize_channels", "intarsia.calibrated")):
            return graph
        plain = take_ranges(graph).graph
        codes = Codes()
        emitter = Emitter(plain, codes)
        nodes: list[Node] = []
        for node in plain.nodes:
            nodes.extend(_lowered(node, emitter))
        return drop_unused(replace(plain, nodes=tuple(nodes)))


def _lowered(node: Node, emitter: Emitter) -> Sequence[Node]:
    """What computes the node in integers, and its result in float, which goes in the end where nobody reads it."""
    names, below = emitter.codes.names, source(node)
    if node.op == FAKE:
        return *emitter.onto_grid(node), emitter.dequantized(node)
    if keeps_grid(node) and below in names:
        return emitter.kept(node, (below,))
    if (parts := joined(node)) and emitter.codes.are_alike(parts):
        return emitter.kept(node, parts)
    if node.op.startswith("aten.sym_size") and below in names:
        return (replace(node, args={key: renamed(arg, names) for key, arg in node.args.items()}),)
    return (node,)
