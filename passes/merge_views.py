"""Turn a view of a view into one view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import rewrite
from intarsia.ir.target import Target
from intarsia.passes.base import Pass

OUTER = frozenset({"aten.view", "aten._unsafe_view"})
"""Views that spell their extents out, and so can look straight at what lies beneath."""

INNER = OUTER | {"aten.unflatten.int", "aten.unsqueeze", "aten.squeeze.dim"}
"""Operators that regroup extents and never copy."""


@dataclass(frozen=True)
class MergeViews(Pass):
    """Let a view of a view look at the first one's input.

        %a: f32[2, 4, 6] = aten.view(self=%x, size=[2, 4, 6])
        %b: f32[8, 6] = aten.view(self=%a, size=[8, 6])        ->  %b: f32[8, 6] = aten.view(self=%x, size=[8, 6])

    The inner view stays where something else uses it. Whatever both views can express, one can: each regroups
    neighbouring axes, and regrouping twice is regrouping.
    """

    name: ClassVar[str] = "merge-views"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with every view on the lowest value that it is a view of; the inner views may be left unused."""
        beneath: dict[str, Ref] = {}

        def rule(node: Node) -> Sequence[Node] | None:
            source = node.args.get("self")
            if node.op not in INNER or not isinstance(source, Ref):
                return None
            lowest = beneath.setdefault(node.name, beneath.get(source.name, source))
            if node.op not in OUTER or lowest == source:
                return None
            return [replace(node, args={**node.args, "self": lowest})]

        return rewrite(graph, rule)
