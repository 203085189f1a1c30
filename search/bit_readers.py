"""Which values only certain layers read, so that their range can be one for these layers' bits."""

from __future__ import annotations

from collections.abc import Iterable, Set

from intarsia.ir.graph import Graph, Node
from intarsia.passes.quantize_integer_roles import LAYERS, bounds, keeps_grid, source


def read_by(layers: Set[str], places: Iterable[str], graph: Graph) -> frozenset[str]:
    """Of these values those that only ``layers`` read as their input, straight or through views, padding and max pools.

    A residual sum that a value goes into as well wants it as wide as it is.
    """
    return frozenset(place for place in places if _only(place, layers, graph))


def _only(name: str, layers: Set[str], graph: Graph) -> bool:
    users = graph.users.get(name, ())
    return bool(users) and name not in graph.outputs and all(_fits(user, name, layers, graph) for user in users)


def _fits(user: Node, name: str, layers: Set[str], graph: Graph) -> bool:
    if user.op in LAYERS:
        return user.name in layers and user.ref("input") == name
    return keeps_grid(user) and source(user) == name and bounds(user) is None and _only(user.name, layers, graph)
