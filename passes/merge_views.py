"""Turn a view of a view into one view, and a view of a copy into a reshape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Graph, Node, Ref, Symbol
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import rewrite
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.layout import Layouts, is_contiguous, layouts, reshape_gives_rows

OUTER = frozenset({"aten.view", "aten._unsafe_view"})
"""Views that spell their extents out, and so can look straight at what lies beneath."""

INNER = OUTER | {"aten.unflatten.int", "aten.unsqueeze", "aten.squeeze.dim"}
"""Operators that regroup extents and never copy."""


@dataclass(frozen=True)
class MergeViews(Pass):
    """Let a view of a view look at the first one's input, and spell a copy that is made for a view as a reshape.

        %a: f32[2, 4, 6] = aten.view(self=%x, size=[2, 4, 6])
        %b: f32[8, 6] = aten.view(self=%a, size=[8, 6])
        %p: f32[6, 8] = aten.permute(self=%b, dims=[1, 0])
        %c: f32[6, 8] = aten.clone(self=%p, memory_format=torch.contiguous_format)
        %d: f32[48] = aten.view(self=%c, size=[48])

    becomes, ``%x`` lying row by row,

        %b: f32[8, 6] = aten.view(self=%x, size=[8, 6])
        %p: f32[6, 8] = aten.permute(self=%b, dims=[1, 0])
        %d: f32[48] = aten.reshape(self=%p, shape=[48])

    What else uses the inner call keeps it. Whatever two views express, one can: each regroups neighbouring axes, and
    regrouping twice is regrouping. A reshape stands for a copy only where it certainly lies as the copy would; and for
    a view of what may lie otherwise on another device, where the view would fail (attention is traced on one device
    with tokens before heads in memory, on another with heads before tokens).
    """

    name: ClassVar[str] = "merge-views"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with every view on the lowest value that it is a view of; the inner calls may be left unused."""
        known = layouts(graph)
        beneath: dict[str, Ref] = {}

        def rule(node: Node) -> Sequence[Node] | None:
            source = node.args.get("self")
            if node.op not in INNER or not isinstance(source, Ref):
                return None
            lowest = beneath.setdefault(node.name, beneath.get(source.name, source))
            if node.op not in OUTER:
                return None
            if reshaped := _reshaped(lowest, node, graph, known):
                return [replace(node, op="aten.reshape", args={"self": reshaped, "shape": node.args["size"]})]
            return None if lowest == source else [replace(node, args={**node.args, "self": lowest})]

        return rewrite(graph, rule)


def _reshaped(source: Ref, view: Node, graph: Graph, known: Layouts) -> Ref | None:
    """What a reshape must look at to give what ``view`` of ``source`` gives, lying alike; None if a view it stays."""
    if source.name in known and not is_contiguous(source.name, known):
        return source
    copy = graph.producers.get(source.name)
    if copy is None or copy.op != "aten.clone" or copy.args.get("memory_format") != Symbol("torch.contiguous_format"):
        return None
    copied = Ref(copy.ref("self"))
    orders = known.get(copied.name)
    if orders is None or not reshape_gives_rows(orders, graph.type(copied.name).shape, view.type.shape):
        return None
    return copied
