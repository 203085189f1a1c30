"""Values that residual sums join: one grid of 16 bits for all of them, so that nothing is multiplied to be added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from intarsia.passes.quantize_integer_grids import TRUNK, Grid, grid
from intarsia.passes.quantize_integer_layers import head
from intarsia.passes.quantize_integer_ranges import Ranged
from intarsia.passes.quantize_integer_roles import addends, bounds, keeps_grid, source

COARSEST = 8.0
"""How much wider than its own the range of the whole trunk may be for a value: three of sixteen bits."""

FRACTION_BITS = 7
"""Of the quotient between a step of a layer's sum and one of its 16-bit result: f32 holds both at once, and a bias."""


def trunk_grids(ranged: Ranged, sums: Iterable[str]) -> Mapping[str, Grid]:
    """The grid of all operands and results of ``sums``, nodes of a calibrated graph, by name.

    As HAWQ-V3 has it for what is concatenated (arXiv 2011.10680, equation 18), values that are added to each other, or
    to each other's sums, share a grid; but where one is so small that three bits would be lost, it keeps its own.
    """
    graph = ranged.graph
    chains: dict[str, set[str]] = {}
    for name in sums:
        names = addends(graph.producers[name], graph) or ()
        parts = {below for one in names for below in _kept(one, ranged)} | {head(name, graph)}
        whole = parts.union(*(chains[one] for one in parts if one in chains))
        chains |= dict.fromkeys(whole, whole)
    found: dict[str, Grid] = {}
    for name, whole in chains.items():
        widths = {one: max(map(abs, seen)) for one in whole if (seen := ranged.of(one)) is not None}
        if name in widths:
            widest, own = max(widths.values()), widths[name]
            width = widest if widest <= COARSEST * own else own
            found[name] = grid((-width, width), TRUNK)
    return found


def grain(onto_input: Grid, onto: Grid) -> float:
    """Of what the steps of a weight are to be multiples, so that f32 multiplies sums exactly to 16-bit results."""
    return onto.scale / onto_input.scale / float(1 << FRACTION_BITS)


def _kept(name: str, ranged: Ranged) -> Iterable[str]:
    """The value, and those below it that are on its grid whatever happens."""
    while True:
        yield name
        node = ranged.graph.producers.get(name)
        below = source(node) if node and keeps_grid(node) and not bounds(node) else None
        if below is None:
            return
        name = below
