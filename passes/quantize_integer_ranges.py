"""Calibrated ranges of a graph, taken off it, and those that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from intarsia.ir.graph import Graph
from intarsia.ir.rewrite import rename_uses
from intarsia.passes.quantize_integer_grids import Range
from intarsia.passes.quantize_integer_roles import bounds, joined, keeps_grid, source, window

CALIBRATED = "intarsia.calibrated"


@dataclass(frozen=True)
class Ranged:
    """A graph without ``intarsia.calibrated``, and what those said.

    Attributes:
        measured: Ranges by the value that was calibrated.
    """

    graph: Graph
    measured: Mapping[str, Range]

    def of(self, name: str) -> Range | None:
        """The range of a value: as calibrated, or as follows from what it is made of; None if nothing is known.

        What an operator clips, moves or averages stays inside its operand's range.
        """
        if name in self.measured:
            return self.measured[name]
        node = self.graph.producers.get(name)
        if node is None:
            return None
        below = source(node)
        clips = bounds(node)
        if below is None or not (clips or keeps_grid(node) or window(node, self.graph)):
            return self._of_all(joined(node))
        beneath = self.of(below)
        if beneath is None or clips is None:
            return beneath
        return clips.of(beneath[0]), clips.of(beneath[1])

    def _of_all(self, names: tuple[str, ...] | None) -> Range | None:
        found = [self.of(name) for name in names or ()]
        known = [seen for seen in found if seen is not None]
        if not known or len(known) < len(found):
            return None
        return min(low for low, _ in known), max(high for _, high in known)


def take_ranges(graph: Graph) -> Ranged:
    """The graph with every use of ``intarsia.calibrated`` turned into a use of its input, and the ranges."""
    names: dict[str, str] = {}
    measured: dict[str, Range] = {}
    for node in graph.find(CALIBRATED):
        below = node.ref("input")
        names[node.name] = below
        origin = names.get(below, below)
        low, high = node.args["low"], node.args["high"]
        assert isinstance(low, int | float)
        assert isinstance(high, int | float)
        measured[origin] = (float(low), float(high))
    if not names:
        return Ranged(graph, {})
    kept = rename_uses(graph, names)
    return Ranged(replace(kept, nodes=tuple(node for node in kept.nodes if node.op != CALIBRATED)), measured)
