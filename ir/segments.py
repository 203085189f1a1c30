"""Cut a graph into graphs that run one after the other, each on what those before it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .graph import Graph, Node
from .program import split_constant
from .sizes import names
from .types import TensorType


def split(graph: Graph, stages: Mapping[str, int], *, late: bool = False) -> tuple[Graph, ...]:
    """The graph as one graph a stage, ``name.0``, ``name.1`` and so on.

    Every segment takes the inputs of the whole graph that it uses, then what earlier segments made that it uses; it
    gives what later ones use, and its share of the whole graph's outputs. Values keep their names, so that a table of
    all values so far, by name, is all that is needed to run one after the other. Only tensors that follow from an input
    are handed on: numbers, such as sizes, and what follows from parameters alone are computed wherever they are used.

    Args:
        stages: The first stage, from 0, at which inputs and nodes may run, by name; the others follow from what they
            use.
        late: Whether what only one later stage uses moves there, instead of running as early as it can.
    """
    stage = {value.name: stages.get(value.name, 0) for value in graph.inputs}
    for node in graph.nodes:
        own = max([stages.get(node.name, 0), *(stage.get(name, 0) for name in node.inputs)])
        stage |= dict.fromkeys((value.name for value in node.outputs), own)
    if late:
        _sink(graph, stage)
    anywhere = {node.name: node for node in split_constant(graph)[0]} | {
        value.name: node for node in graph.nodes if _gives_numbers(node) for value in node.outputs
    }
    count = max(stage.values(), default=0) + 1
    nodes = [_nodes(graph, stage, number, anywhere) for number in range(count)]
    return tuple(_segment(graph, nodes, number) for number in range(count))


def _sink(graph: Graph, stage: dict[str, int]) -> None:
    """Move nodes that one stage alone uses to that stage."""
    for node in reversed(graph.nodes):
        made = [value.name for value in node.outputs]
        used = {stage[user.name] for name in made for user in graph.users.get(name, ())}
        if len(used) == 1 and not any(name in graph.outputs for name in made):
            stage |= dict.fromkeys(made, used.pop())


def _gives_numbers(node: Node) -> bool:
    return not any(isinstance(value.type, TensorType) for value in node.outputs)


def _nodes(graph: Graph, stage: Mapping[str, int], number: int, anywhere: Mapping[str, Node]) -> tuple[Node, ...]:
    """The nodes of a stage, and those of ``anywhere``, by what they make, that these need."""
    needed: set[str] = set()
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        made = {value.name for value in node.outputs}
        own = stage[node.name] == number and (node.name not in anywhere or not made.isdisjoint(graph.outputs))
        if own or (node.name in anywhere and not made.isdisjoint(needed)):
            needed.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def _segment(graph: Graph, nodes: Sequence[tuple[Node, ...]], number: int) -> Graph:
    made, used = _made(nodes[number]), _used(nodes[number])
    inputs = [value for value in graph.inputs if value.name in used]
    params = tuple(value for value in graph.params if value.name in used)
    known = {value.name for value in (*graph.inputs, *graph.params)}
    earlier = [name for before in nodes[:number] for name in _made(before) if name in used]
    inputs += [graph.values[name] for name in dict.fromkeys(earlier) if name not in known]
    later = {name for after in nodes[number + 1 :] for name in _used(after)}
    crossing = (name for name in made if name in later)
    outputs = tuple(dict.fromkeys([*(name for name in graph.outputs if name in made), *crossing]))
    segment = replace(
        graph, name=f"{graph.name}.{number}", inputs=tuple(inputs), params=params, nodes=nodes[number], outputs=outputs
    )
    return replace(segment, sizes=tuple(size for size in graph.sizes if size.name in _mentioned(segment)))


def _made(nodes: Sequence[Node]) -> dict[str, None]:
    """The names that nodes define, in order."""
    return dict.fromkeys(value.name for node in nodes for value in node.outputs)


def _used(nodes: Sequence[Node]) -> set[str]:
    """The names that nodes use and do not define."""
    return {name for node in nodes for name in node.inputs} - _made(nodes).keys()


def _mentioned(graph: Graph) -> set[str]:
    """The named sizes in the types of the graph's values."""
    types = [value.type for value in graph.values.values() if isinstance(value.type, TensorType)]
    return {name for type_ in types for dim in type_.shape for name in names(dim)}
