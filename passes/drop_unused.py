"""Drop what no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.graph import Graph
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused
from intarsia.ir.target import Target
from intarsia.passes.base import Pass


@dataclass(frozen=True)
class DropUnused(Pass):
    """Drop calls and parameters that no output needs.

    %a: f32[4] = aten.relu(self=%x)
    %b: f32[4] = aten.exp(self=%x)        ->  %a: f32[4] = aten.relu(self=%x)
    return %a                                 return %a
    """

    name: ClassVar[str] = "drop-unused"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph without dead calls; inputs stay, for they are the model's interface."""
        return drop_unused(graph)
