"""Values that residual sums join: of 16 bits on one grid, so that nothing is multiplied to be added; or of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from intarsia.passes.quantize_integer_grids import TRUNK, Grid, grid
from intarsia.passes.quantize_integer_layers import head
from intarsia.passes.quantize_integer_ranges import Ranged
from intarsia.passes.quantize_integer_roles import addends, bounds, keeps_grid, source

COARSEST = 8.0
"""How much wider than its own the range of the whole trunk may be for a value: three of sixteen bits."""

FRACTION_BITS = 7
"""Of the quotient between a step of a layer's sum and one of its 16-bit result: f32 holds both at once, and a bias."""

NARROW = 8
"""Bits of a trunk that layers read as it is."""

RATIO_BITS = 12
"""Of the quotient between the step of what an 8-bit sum finds on a grid and its own. The last bit is 1: then no code is
half a step, as 2**12 is more than twice the largest, and f32 holds every sum before it is rounded."""


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


def narrow_grids(ranged: Ranged, sums: Iterable[str]) -> Mapping[str, Grid]:
    """Grids of 8 bits for operands and results of ``sums``, in execution order, and for what lies on them, by name.

    Each result has its own, on which layers read it, and what is made for it alone is rounded to that. The step of an
    operand that others read too, as the unit before left it, is an odd multiple of 2**-12 of the result's: one rounding
    of the sum is then this operand's, be halves rounded up or to even. No operand is clipped that could come back.
    """
    graph = ranged.graph
    found: dict[str, Grid] = {}
    for name in sums:
        names, result = addends(graph.producers[name], graph) or (), head(name, graph)
        shared = [one for one in names if grid_below(one, ranged, found) or not _is_alone(one, ranged)]
        for one in shared:
            known = grid_below(one, ranged, found) or grid((-_width(one, ranged), _width(one, ranged)), NARROW)
            found |= dict.fromkeys(_kept(one, ranged), known)
        # Beside operands that are never negative, what leaves the ends of a rectified sum does so with them too.
        rectified = all(_lowest(one, ranged) >= 0 for one in (result, *shared)) and bool(shared)
        width = max(_width(one, ranged) for one in (result, *(shared if rectified else names)))
        found[result] = _commensurable(grid((-width, width), NARROW), [found[one] for one in shared])
        for one in names:
            if one not in shared:
                found |= dict.fromkeys(_kept(one, ranged), found[result])
    return found


def grid_below(name: str, ranged: Ranged, grids: Mapping[str, Grid]) -> Grid | None:
    """Of ``grids`` that of the value, or of what it lies on the grid of; None if there is none."""
    return next((grids[one] for one in _kept(name, ranged) if one in grids), None)


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


def _is_alone(name: str, ranged: Ranged) -> bool:
    """Whether the value, and all below on its grid, are made for one reader."""
    graph = ranged.graph
    return all(len(graph.users.get(one, ())) == 1 and one not in graph.outputs for one in _kept(name, ranged))


def _commensurable(own: Grid, shared: list[Grid]) -> Grid:
    """The next wider grid of which the first of ``shared`` has steps of an odd multiple of 2**-RATIO_BITS."""
    units = int(shared[0].scale / own.scale * 2**RATIO_BITS) if shared else 0
    odd = units if units % 2 else units - 1
    return replace(own, scale=shared[0].scale * 2**RATIO_BITS / odd) if odd > 0 else own


def _width(name: str, ranged: Ranged) -> float:
    """The largest magnitude of the value, and of all below on its grid."""
    return max(max(map(abs, seen)) for one in _kept(name, ranged) if (seen := ranged.of(one)) is not None)


def _lowest(name: str, ranged: Ranged) -> float:
    seen = ranged.of(name)
    return -1.0 if seen is None else seen[0]
