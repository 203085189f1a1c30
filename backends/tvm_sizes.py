"""A graph with a named size where kernels are compiled for numbers: the graph at a few values, a library for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.tvm_engine import TvmEngine
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph, Node, Value
from intarsia.ir.sizes import evaluate
from intarsia.ir.types import TensorType


def sets_of_sizes(graph: Graph, count: int) -> tuple[dict[str, int], ...]:
    """The sizes that a graph is compiled for: its only named size at ``count`` values, evenly spread up to its largest.

    One empty set where there is no named size, none is asked for, or several are or an endless one, which is refused.
    """
    if not count or len(graph.sizes) != 1 or graph.sizes[0].maximum is None:
        return ({},)
    (size,) = graph.sizes
    assert size.maximum is not None
    values = {max(size.minimum, -(-number * size.maximum // count)) for number in range(1, count + 1)}
    return tuple({size.name: value} for value in sorted(values))


def graph_at(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The graph with numbers for its named sizes; itself where none are given."""
    if not sizes:
        return graph
    inputs, params = (tuple(_at(value, sizes) for value in values) for values in (graph.inputs, graph.params))
    nodes = tuple(replace(node, outputs=tuple(_at(value, sizes) for value in node.outputs)) for node in graph.nodes)
    return replace(graph, inputs=inputs, params=params, nodes=nodes, sizes=())


def call_at(node: Node, graph: Graph, sizes: Mapping[str, int]) -> tuple[Node, Graph]:
    """One call with numbers for named sizes, and a graph of it alone; both as they are where none are given."""
    if not sizes:
        return node, graph
    params = {param.name for param in graph.params}
    used = [graph.values[name] for name in dict.fromkeys(node.inputs)]
    inputs = tuple(value for value in used if value.name not in params)
    weights = tuple(value for value in used if value.name in params)
    alone = Graph(graph.name, inputs, weights, (node,), tuple(value.name for value in node.outputs), graph.sizes)
    made = graph_at(alone, sizes)
    return made.nodes[0], made


def _at(value: Value, sizes: Mapping[str, int]) -> Value:
    if not isinstance(value.type, TensorType):
        return value
    return Value(value.name, replace(value.type, shape=tuple(evaluate(dim, sizes) for dim in value.type.shape)))


class TvmSizes(Engine):
    """Libraries of one graph at several sizes; each call runs the one that was compiled for its inputs' shapes."""

    def __init__(self, engines: Sequence[TvmEngine]) -> None:
        self._engines = engines

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the library of these shapes answers; UsageError where there is none."""
        engine = next((engine for engine in self._engines if engine.why_not(inputs) is None), None)
        if engine is None:
            count, reason = len(self._engines), self._engines[-1].why_not(inputs)
            raise UsageError(
                f"none of {count} libraries is compiled for these shapes; of the largest {reason}; "
                f"active-tokens(buckets={count}) fills active tokens up to one of them"
            )
        return engine(*inputs)

    @property
    def device(self) -> str:
        """Threads and TVM's version."""
        return self._engines[0].device
