"""Compute softmax, norms, functions and products of activations with integers where they stand between grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Graph, Node
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused, rename_uses, renamed
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.integer_island_nodes import Emitter
from intarsia.passes.integer_island_roles import SCALED, Island, island
from intarsia.passes.quantize_integer_roles import keeps_grid, source

INTO, OUT_OF = "intarsia.quantize_static", "intarsia.dequantize_static"


@dataclass(frozen=True)
class IntegerIslands(Pass):
    """Put integer operators where ``lower-integer`` left floats between a dequantize and a quantize.

        %up: f32[N, 64] = intarsia.dequantize_static(input=%up.codes, scale=0.000122, dtype=torch.float32)
        %gelu: f32[N, 64] = aten.gelu(self=%up)
        %gelu.i8: i8[N, 64] = intarsia.quantize_static(input=%gelu, scale=0.0315, low=-128, high=127)

    becomes

        %gelu.i8.table: i32[2049] = intarsia.function_table(function="gelu", input_scale=0.000122, ...)
        %gelu.i8: i8[N, 64] = intarsia.apply_table(input=%up.codes, table=%gelu.i8.table, low=-128, high=127)

    and softmax over the last axis, layer norm, RMS norm and products of two activations alike. Multiplying by a
    positive number only says what codes mean; views and slices between are taken on codes. ``quantize-integer`` with
    ``islands=true`` puts on grids what stands on either side. Sources: I-BERT (arXiv 2101.01321), I-ViT (arXiv
    2207.01405); how they are computed here is in docs/decisions/013-integer-islands.md.
    """

    name: ClassVar[str] = "integer-islands"

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Islands between grids that stay in float, each with the reason."""
        _, emitter = _rewritten(graph, target)
        return emitter.refused

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with integers in place of such floats; itself where there are none."""
        changed, emitter = _rewritten(graph, target)
        return changed if emitter.made else graph


def _rewritten(graph: Graph, target: Target) -> tuple[Graph, Emitter]:
    emitter = Emitter(graph, target)
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.extend(_integers(node, emitter))
    return drop_unused(rename_uses(replace(graph, nodes=tuple(nodes)), emitter.names)), emitter


def _integers(node: Node, emitter: Emitter) -> Sequence[Node]:
    """What stands in place of the node; floats go in the end where nobody reads them."""
    codes, below = emitter.codes, source(node)
    if node.op == OUT_OF:
        emitter.dequantized(node)
    elif node.op == INTO:
        made = emitter.quantized(node)
        return (node,) if made is None else made
    elif isinstance(found := island(node, emitter.graph), Island) and found.kind == SCALED:
        emitter.scaled(node, found)
    elif below in codes and keeps_grid(node):
        return emitter.kept(node)
    elif below in codes and node.op.startswith("aten.sym_size"):
        names = {below: codes[below].name}
        return (replace(node, args={key: renamed(arg, names) for key, arg in node.args.items()}),)
    return (node,)
