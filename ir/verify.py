"""Is this a graph? Structure in milliseconds, types by asking PyTorch's fake kernels."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import InvalidGraph
from .graph import Graph, Value
from .sizes import Size, names
from .types import TensorType


def verify(graph: Graph) -> None:
    """Raise InvalidGraph unless names are unique and defined before use, and sizes are declared, with ranges."""
    sizes = {size.name for size in graph.sizes}
    if len(sizes) < len(graph.sizes):
        raise InvalidGraph(f"graph {graph.name}: a size is declared twice")
    for size in graph.sizes:
        _check_size(size, graph)
    seen: set[str] = set()
    for value in (*graph.inputs, *graph.params):
        _define(value, seen, sizes)
    for node in graph.nodes:
        if not node.outputs:
            raise InvalidGraph(f"a call of {node.op} defines nothing; every node defines at least one value")
        for name in node.inputs:
            if name not in seen:
                raise InvalidGraph(f"%{node.name}: input %{name} is not defined before its use")
        for value in node.outputs:
            _define(value, seen, sizes)
    for name in graph.outputs:
        if name not in seen:
            raise InvalidGraph(f"graph {graph.name}: output %{name} is not defined")


def _check_size(size: Size, graph: Graph) -> None:
    if not size.name.isidentifier() or names(size.name) != {size.name}:
        raise InvalidGraph(f"graph {graph.name}: {size.name!r} is no name for a size; take a word such as 'frames'")
    if size.maximum is not None and size.maximum < size.minimum:
        raise InvalidGraph(f"graph {graph.name}: size {size} leaves no extent; the minimum comes first")


def _define(value: Value, seen: set[str], sizes: set[str]) -> None:
    if value.name in seen:
        raise InvalidGraph(f"%{value.name} is defined twice")
    seen.add(value.name)
    for name in _size_names(value):
        if name not in sizes:
            raise InvalidGraph(f"%{value.name}: size {name} is not declared in the graph's head")


def _size_names(value: Value) -> Iterator[str]:
    if isinstance(value.type, TensorType):
        for dim in value.type.shape:
            if isinstance(dim, str):
                yield from sorted(names(dim))
