"""The primitives from which passes are made."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace

from .errors import InvalidGraph
from .graph import Arg, Graph, Node, Ref

Rule = Callable[[Node], Sequence[Node] | None]
"""What stands in place of a node, or ``None`` to leave it; the new nodes define the same names."""


def rewrite(graph: Graph, rule: Rule) -> Graph:
    """The graph with every node replaced by what ``rule`` says; the same object if nothing changes."""
    nodes: list[Node] = []
    changed = False
    for node in graph.nodes:
        new = rule(node)
        changed |= new is not None
        nodes.extend((node,) if new is None else new)
    return replace(graph, nodes=tuple(nodes)) if changed else graph


def rename_uses(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The graph with every use of a key of ``names`` turned into a use of its value, chains followed.

    Raises:
        InvalidGraph: The names go round in a circle.
    """
    if not names:
        return graph
    final = {name: _last(name, names) for name in names}
    nodes = tuple(
        replace(node, args={key: renamed(arg, final) for key, arg in node.args.items()})
        if any(name in final for name in node.inputs)
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes, outputs=tuple(final.get(name, name) for name in graph.outputs))


def _last(name: str, names: Mapping[str, str]) -> str:
    last, met = name, {name}
    while last in names:
        last = names[last]
        if last in met:
            raise InvalidGraph(f"%{name} is renamed to itself, by way of {', '.join(f'%{m}' for m in sorted(met))}")
        met.add(last)
    return last


def renamed(arg: Arg, names: Mapping[str, str]) -> Arg:
    """The argument with every use of a key of ``names`` turned into a use of its value."""
    if isinstance(arg, Ref):
        return Ref(names.get(arg.name, arg.name))
    return tuple(renamed(item, names) for item in arg) if isinstance(arg, tuple) else arg


def fresh(name: str, taken: Container[str]) -> str:
    """The name, made longer until it is not taken; of a graph, ``graph.values`` are."""
    while name in taken:
        name += "_"
    return name


def drop_unused(graph: Graph) -> Graph:
    """The graph without the nodes and parameters that no output needs; the same object if all are needed.

    Inputs stay: they are the model's interface.
    """
    live = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(value.name in live for value in node.outputs):
            live.update(node.inputs)
            kept.append(node)
    params = tuple(param for param in graph.params if param.name in live)
    if len(kept) == len(graph.nodes) and len(params) == len(graph.params):
        return graph
    return replace(graph, params=params, nodes=tuple(reversed(kept)))
