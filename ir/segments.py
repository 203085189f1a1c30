"""Cut a graph into graphs that run one after the other, each on what those before it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .errors import Unsupported
from .graph import Graph, Value
from .sizes import names
from .types import TensorType


def split(graph: Graph, stages: Mapping[str, int], *, late: bool = False) -> tuple[Graph, ...]:
    """The graph as one graph a stage, ``name.0``, ``name.1`` and so on.

    Every segment takes the inputs of the whole graph that it uses, then what earlier segments made that it uses; it
    gives what later ones use, and its share of the whole graph's outputs. Values keep their names, so that a table of
    all values so far, by name, is all that is needed to run one after the other.

    Args:
        stages: The first stage, from 0, at which inputs and nodes may run, by name; the others follow from what they
            use.
        late: Whether what only one later stage uses moves there, instead of running as early as it can.

    Raises:
        Unsupported: A number that is no tensor would go from one segment to another.
    """
    stage = {value.name: stages.get(value.name, 0) for value in graph.inputs}
    for node in graph.nodes:
        own = max([stages.get(node.name, 0), *(stage.get(name, 0) for name in node.inputs)])
        stage |= dict.fromkeys((value.name for value in node.outputs), own)
    if late:
        _sink(graph, stage)
    return tuple(_segment(graph, stage, number) for number in range(max(stage.values(), default=0) + 1))


def _sink(graph: Graph, stage: dict[str, int]) -> None:
    """Move nodes that one stage alone uses to that stage."""
    for node in reversed(graph.nodes):
        made = [value.name for value in node.outputs]
        used = {stage[user.name] for name in made for user in graph.users.get(name, ())}
        if len(used) == 1 and not any(name in graph.outputs for name in made):
            stage |= dict.fromkeys(made, used.pop())


def _segment(graph: Graph, stage: Mapping[str, int], number: int) -> Graph:
    nodes = tuple(node for node in graph.nodes if stage[node.name] == number)
    made = {value.name for node in nodes for value in node.outputs}
    used = {name for node in nodes for name in node.inputs} - made
    inputs = [value for value in graph.inputs if value.name in used]
    params = tuple(value for value in graph.params if value.name in used)
    known = {value.name for value in (*inputs, *params)}
    inputs += [graph.values[name] for name in graph.values if name in used and name not in known]
    later = {name for node in graph.nodes if stage[node.name] > number for name in node.inputs} | {*graph.outputs}
    crossing = [name for node in nodes for value in node.outputs if (name := value.name) in later]
    outputs = tuple(dict.fromkeys([*(name for name in graph.outputs if name in made), *crossing]))
    for name in (*(value.name for value in inputs), *outputs):
        _require_tensor(graph.values[name])
    segment = replace(
        graph, name=f"{graph.name}.{number}", inputs=tuple(inputs), params=params, nodes=nodes, outputs=outputs
    )
    return replace(segment, sizes=tuple(size for size in graph.sizes if size.name in _mentioned(segment)))


def _require_tensor(value: Value) -> None:
    if not isinstance(value.type, TensorType):
        raise Unsupported(
            f"%{value.name} is a number of type {value.type}, and a cut would have to hand it on; only tensors go from "
            "one segment to the next: run the pass fold-sizes first"
        )


def _mentioned(graph: Graph) -> set[str]:
    """The named sizes in the types of the graph's values."""
    types = [value.type for value in graph.values.values() if isinstance(value.type, TensorType)]
    return {name for type_ in types for dim in type_.shape for name in names(dim)}
