"""Which values of a graph come as integers, on which grid each is kept, and on which grid each reader wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from intarsia.ir.graph import Node
from intarsia.passes import integer_island_roles as island_roles
from intarsia.passes.integer_island_roles import Island
from intarsia.passes.quantize_integer_grids import TRUNK, Grid, grid, why_no_grid
from intarsia.passes.quantize_integer_layers import head
from intarsia.passes.quantize_integer_ranges import Ranged
from intarsia.passes.quantize_integer_roles import Window, addends, bounds, joined, keeps_grid, source, window
from intarsia.passes.quantize_integer_trunk import NARROW, grid_below, narrow_grids, trunk_grids

LEAST = 8
"""Bits of a value that something reads besides products: averages and operators in float."""

PRODUCT, SUM, AVERAGE, JOIN, CLAMP, KEEPS = "product", "sum", "average", "join", "clamp", "keeps"
ISLAND, SCALED = "island", "scaled"

MADE_ELSEWHERE = (JOIN, KEEPS, SCALED)
"""Roles of values that lie on a grid because what they are made of does."""


@dataclass(frozen=True)
class Values:
    """What becomes of the values that come as integers.

    Attributes:
        roles: What makes each such value, by name; the last clamp behind a product is of the product's role.
        kept: The grid on which each value is kept; where a clamp follows that its maker can take along, there is none.
        wanted: The grid on which a node wants its operands, by the node's name.
    """

    roles: Mapping[str, str]
    kept: Mapping[str, Grid]
    wanted: Mapping[str, Mapping[str, Grid]]


def plan_values(
    ranged: Ranged, input_bits: Mapping[str, int], *, islands: bool = False, trunk_bits: int = TRUNK
) -> Values:
    """The grids of all integers when the layers in ``input_bits`` read inputs of so many bits.

    A sum is on the trunk, and so are its operands: of 16 bits all on one grid; of 8 bits on grids that layers read as
    they are. What is concatenated is on one grid too; a value that several want otherwise is kept in the widest form
    and requantized for each. With ``islands``, results of functions, softmax and norms are on grids too, and products
    of two activations, which read 8 bits. Source: HAWQ-V3, equations 7 and 18.
    """
    found = _islands(ranged) if islands else {}
    roles = _roles(ranged, input_bits, found)
    kept: dict[str, Grid] = {}
    wanted: dict[str, dict[str, Grid]] = {}
    asked: dict[str, list[Grid]] = {}
    loosely = {name for name in ranged.graph.outputs if name in roles}

    sums = [node.name for node in ranged.graph.nodes if roles.get(node.name) == SUM and addends(node, ranged.graph)]
    trunk = (narrow_grids if trunk_bits == NARROW else trunk_grids)(ranged, sums)

    def ask(node: Node, names: tuple[str, ...], grids: Mapping[str, Grid]) -> None:
        wanted[node.name] = dict(grids)
        for name in names:
            if grids[name] not in asked.setdefault(name, []):
                asked[name].append(grids[name])

    for node in reversed(ranged.graph.nodes):
        role, below = roles.get(node.name), source(node)
        if _is_kept(node.name, ranged, roles) and role not in (KEEPS, SCALED):
            readers = asked.get(node.name, [])
            loose = node.name in loosely
            kept[node.name] = trunk[node.name] if role == SUM else _grid(node.name, ranged, readers, trunk, loose=loose)
        if node.name in input_bits:
            name = node.ref("input")
            ask(node, (name,), {name: _read(name, ranged, input_bits[node.name], trunk)})
        elif role == SUM and (names := addends(node, ranged.graph)):
            ask(node, names, {name: trunk[name] for name in names})
        elif role == JOIN and (parts := joined(node)):
            ask(node, parts, dict.fromkeys(parts, kept[node.name]))
        elif role == ISLAND and found[node.name].kind == island_roles.PRODUCT:
            reads = found[node.name].reads
            ask(node, reads, {name: _read(name, ranged, LEAST, trunk) for name in reads})
        elif role == SCALED and below:
            factor = found[node.name].factor
            finer = [replace(one, scale=one.scale / factor) for one in asked.get(node.name, [])]
            asked.setdefault(below, []).extend(one for one in finer if one not in asked[below])
            loosely |= {below} if node.name in loosely else set()
        elif role == KEEPS and below:
            asked.setdefault(below, []).extend(one for one in asked.get(node.name, []) if one not in asked[below])
            loosely |= {below} if node.name in loosely else set()
        else:
            loosely |= {name for name in node.inputs if name in roles}
    for node in ranged.graph.nodes:
        below = source(node)
        if roles.get(node.name) == KEEPS and below:
            kept[node.name] = kept[below]
        elif roles.get(node.name) == SCALED and below:
            kept[node.name] = replace(kept[below], scale=kept[below].scale * found[node.name].factor)
    return Values(roles, kept, wanted)


def _islands(ranged: Ranged) -> dict[str, Island]:
    """Operators that integers compute between grids, by name."""
    found = {node.name: island_roles.island(node, ranged.graph) for node in ranged.graph.nodes}
    return {name: one for name, one in found.items() if isinstance(one, Island)}


def _roles(ranged: Ranged, input_bits: Mapping[str, int], islands: Mapping[str, Island]) -> dict[str, str]:
    """What makes each value that comes as integers."""
    graph = ranged.graph
    inputs = {value.name for value in graph.inputs}
    roles: dict[str, str] = {}
    taken: set[str] = set()

    def fits(names: tuple[str, ...], result: str) -> bool:
        """Whether operands are integers, but for inputs of the network, and all that has to be has a grid."""
        if not any(name in roles for name in names) or not all(name in roles or name in inputs for name in names):
            return False
        return all(why_no_grid(name, ranged.of(name)) is None for name in (*names, result))

    for node in graph.nodes:
        below, result = source(node), head(node.name, graph) if len(node.outputs) == 1 else node.name
        if node.name in input_bits:
            roles[node.name] = PRODUCT
        elif node.name in taken and below:
            roles[node.name] = roles[below]
        elif (names := addends(node, graph)) and fits(names, result):
            roles[node.name] = SUM
        elif (parts := joined(node)) and fits(parts, node.name):
            roles[node.name] = JOIN
        elif node.name in islands and fits(islands[node.name].reads, node.name):
            roles[node.name] = SCALED if islands[node.name].kind == island_roles.SCALED else ISLAND
        elif below not in roles or below is None:
            continue
        elif isinstance(window(node, graph), Window) and fits((below,), result):
            roles[node.name] = AVERAGE
        elif keeps_grid(node):
            roles[node.name] = KEEPS
        elif bounds(node) and fits((below,), result):
            roles[node.name] = CLAMP
        if node.name in roles and roles[node.name] not in MADE_ELSEWHERE and result != node.name:
            taken.add(graph.users[node.name][0].name)
    return roles


def _is_kept(name: str, ranged: Ranged, roles: Mapping[str, str]) -> bool:
    """Whether the value is one that readers see: an integer behind which no clamp is taken along."""
    if name not in roles:
        return False
    return roles[name] in MADE_ELSEWHERE or head(name, ranged.graph) == name


def _grid(name: str, ranged: Ranged, asked: list[Grid], trunk: Mapping[str, Grid], *, loose: bool) -> Grid:
    """The grid for a value of which readers ask these, and ``loose``: others read it too, which take any."""
    if len(asked) == 1 and not loose:
        return asked[0]
    least = LEAST if loose or len(asked) > 1 else 0
    bits = max([least, *(one.bits for one in asked)]) if asked else TRUNK
    return trunk[name] if name in trunk and trunk[name].bits == bits else _measured(name, ranged, bits)


def _read(name: str, ranged: Ranged, bits: int, trunk: Mapping[str, Grid]) -> Grid:
    """The grid of so many bits for a reader: the trunk's own, if it has as many."""
    found = grid_below(name, ranged, trunk)
    return found if found and found.bits == bits else _measured(name, ranged, bits)


def _measured(name: str, ranged: Ranged, bits: int) -> Grid:
    seen = ranged.of(name)
    assert seen is not None
    return grid(seen, bits)
