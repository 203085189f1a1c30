"""Drop the calls that carry calibrated ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.graph import Graph
from intarsia.ir.plan import Chosen
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.quantize_integer_ranges import take_ranges


@dataclass(frozen=True)
class DropRanges(Pass):
    """Let every use of a value that carries a range see the value itself.

        %y: f32[N, 64] = aten.relu(self=%x)
        %y.calibrated: f32[N, 64] = intarsia.calibrated(input=%y, low=0.0, high=3.5)
        %z: f32[N, 8] = aten.linear(input=%y.calibrated, ...)

    becomes

        %y: f32[N, 64] = aten.relu(self=%x)
        %z: f32[N, 8] = aten.linear(input=%y, ...)

    Backends that would run the call as a copy ask for this; what makes integers of a graph comes before it.
    """

    name: ClassVar[str] = "drop-ranges"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph without ``intarsia.calibrated``; itself where there is none."""
        return take_ranges(graph).graph
