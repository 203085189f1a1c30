"""Make a trace readable without changing a bit of what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.graph import Graph
from intarsia.ir.plan import Chosen
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.drop_noops import DropNoops
from intarsia.passes.drop_unused import DropUnused
from intarsia.passes.fold_sizes import FoldSizes
from intarsia.passes.merge_duplicates import MergeDuplicates
from intarsia.passes.merge_rope import MergeRope
from intarsia.passes.merge_views import MergeViews

PASSES: tuple[Pass, ...] = (FoldSizes(), MergeRope(), DropNoops(), MergeViews(), MergeDuplicates(), DropUnused())
"""What cleaning consists of, in the order in which one pass makes work for the next."""


@dataclass(frozen=True)
class Clean(Pass):
    """Run all cleaning passes until none finds anything to do.

        %a: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=%b)
        %d: f32[4, 8] = aten.dropout(input=%a, p=0.5, train=False)
        %t: f32[4, 8] = aten.type_as(self=%d, other=%x)
        %v: f32[2, 2, 8] = aten.view(self=%t, size=[2, 2, 8])
        %w: f32[32] = aten.view(self=%v, size=[32])

    becomes

        %a: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=%b)
        %w: f32[32] = aten.view(self=%a, size=[32])
    """

    name: ClassVar[str] = "clean"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The smallest graph that the cleaning passes reach; each round makes it smaller, so the rounds end."""
        while True:
            cleaned = graph
            for step in PASSES:
                cleaned = step.run(cleaned, target, {})
            if cleaned == graph:
                return graph
            graph = cleaned
