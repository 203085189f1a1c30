"""Follow the heads of attention through the graph until weights make them, or sum over them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import split_constant
from intarsia.passes.head_axis import carried
from intarsia.passes.head_blocks import HeadAxis
from intarsia.passes.head_place import Place, tensors


@dataclass(frozen=True)
class Path:
    """Values whose heads can be permuted together, proved call by call.

    Attributes:
        axes: Where the heads lie, by value.
        weights: Where they lie in what depends on parameters alone, by the call that reads it and the value's name.
        calls: The calls that have any of these values, by name.
        whole: Whether a call needs all heads, so that none may be left out.
    """

    axes: Mapping[str, HeadAxis]
    weights: Mapping[tuple[str, str], HeadAxis]
    calls: frozenset[str]
    whole: bool


class Surroundings:
    """A graph, and which of its values depend on parameters alone."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of all parameters, and of what is computed from them alone."""
        constant, _ = split_constant(self.graph)
        made = (value.name for node in constant for value in node.outputs)
        return frozenset((*(param.name for param in self.graph.params), *made))

    @cached_property
    def interface(self) -> frozenset[str]:
        """Names of all inputs and outputs."""
        return frozenset((*(value.name for value in self.graph.inputs), *self.graph.outputs))


def trace_heads(
    within: Surroundings, start: Mapping[str, HeadAxis], heads: int, site: Collection[str]
) -> tuple[Path, ...] | str:
    """The paths on which ``start`` lies, values that no call connects on different ones; or why there is no proof.

    Args:
        start: Values, and where their ``heads`` heads lie.
        site: Names of the calls of attention itself, at which the paths end.
    """
    graph = within.graph
    axes, weights, wholes = dict(start), dict[tuple[str, str], HeadAxis](), set[str]()
    pending = list(start)
    while pending:
        name = pending.pop()
        if name in within.interface:
            return f"%{name} belongs to the graph's interface, whose heads stay as they are"
        for node in _around(name, graph, site):
            found = carried(Place(node, graph, name, axes[name], heads))
            if isinstance(found, str):
                return f"%{node.name}: {found}"
            if found.whole:
                wholes.add(node.name)
            for other, axis in found.axes.items():
                if not axis.fits(graph.type(other).shape, heads):
                    return f"%{node.name}: %{other} is {graph.type(other)}, which has no room for {heads} heads"
                known = weights.get((node.name, other)) if other in within.weights else axes.get(other)
                joined = _joined(known, axis)
                if joined is None or not joined.fits(graph.type(other).shape, heads):
                    return f"%{node.name}: the heads of %{other} would lie in two ways, as {known} and as {axis}"
                if other in within.weights:
                    weights[node.name, other] = joined
                elif joined != known:
                    axes[other] = joined
                    pending.append(other)
    return tuple(_paths(graph, axes, weights, wholes, site))


def _around(name: str, graph: Graph, site: Collection[str]) -> Iterable[Node]:
    """The call that defines the value and those that use it, the site's excepted."""
    producer = graph.producers.get(name)
    calls = (*([producer] if producer else []), *graph.users.get(name, ()))
    return (node for node in calls if node.name not in site)


def _joined(known: HeadAxis | None, axis: HeadAxis) -> HeadAxis | None:
    """Both at once, if they differ in which blocks of heads the axis holds only."""
    if known is None:
        return axis
    both = replace(axis, starts=tuple(sorted({*known.starts, *axis.starts})))
    return both if replace(known, starts=both.starts) == both else None


def _paths(
    graph: Graph,
    axes: Mapping[str, HeadAxis],
    weights: Mapping[tuple[str, str], HeadAxis],
    wholes: Collection[str],
    site: Collection[str],
) -> Iterable[Path]:
    """The values of ``axes``, each with those that a call connects with it."""
    calls = {node.name: node for name in axes for node in _around(name, graph, site)}
    groups: list[frozenset[str]] = [frozenset([name]) for name in axes]
    for node in calls.values():
        names = {name for name in tensors(node, graph) if name in axes}
        joined = frozenset().union(*(group for group in groups if group & names))
        groups = [*(group for group in groups if not group & names), joined]
    for group in groups:
        members = frozenset(name for name, node in calls.items() if not group.isdisjoint(tensors(node, graph)))
        own = {use: axis for use, axis in weights.items() if use[0] in members}
        yield Path({name: axes[name] for name in group}, own, members, bool(members & set(wholes)))
