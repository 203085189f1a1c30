"""The rules of a graph, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from intarsia.ir.errors import InvalidGraph
from intarsia.ir.graph import Graph, Node
from intarsia.ir.sizes import Size
from intarsia.ir.verify import verify

GOOD = """\
graph g {
  size N in [1, inf]
  input %x: f32[N, 2]
  param %w: f32[2]
  %y: f32[N, 2] = aten.mul.Tensor(self=%x, other=%w)
  return %y
}
"""


def test_a_good_graph_passes() -> None:
    verify(Graph.parse(GOOD))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("other=%w", "other=%v", "%y: input %v is not defined before its use"),
        ("other=%w", "other=%y", "%y: input %y is not defined before its use"),
        ("other=%w", "other=[1, [%v]]", "%y: input %v is not defined before its use"),
        ("%w: f32[2]", "%x: f32[2]", "%x is defined twice"),
        ("  %y: f32[N, 2]", "  %x: f32[N, 2]", "%x is defined twice"),
        ("  %y: f32[N, 2]", "  %y: f32[N, 2], %y: f32[2]", "%y is defined twice"),
        ("return %y", "return %z", "graph g: output %z is not defined"),
        ("%x: f32[N, 2]", "%x: f32[M, 2]", "%x: size M is not declared in the graph's head"),
        ("  %y: f32[N, 2]", "  %y: f32[2*N + M, 2]", "%y: size M is not declared in the graph's head"),
        ("%w: f32[2]", "%w: f32[2*]", "dimension '2*' is not an expression over named sizes"),
        ("  size N in [1, inf]", "  size N in [1, inf]\n  size N in [2, 3]", "graph g: a size is declared twice"),
        ("  size N in [1, inf]", "  size N in [4, 3]", "graph g: size N in [4, 3] leaves no extent"),
    ],
)
def test_a_broken_rule_is_told_with_the_name_it_is_broken_at(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidGraph) as caught:
        verify(Graph.parse(GOOD.replace(old, new, 1)))
    assert message in str(caught.value)


def test_a_node_defines_at_least_one_value() -> None:
    graph = Graph.parse(GOOD)
    nothing = Node("aten._assert", {}, ())
    with pytest.raises(InvalidGraph, match=r"a call of aten\._assert defines nothing"):
        verify(replace(graph, nodes=(*graph.nodes, nothing)))


def test_a_size_is_an_identifier_and_no_function() -> None:
    graph = Graph.parse(GOOD)
    for name in ("max", "N M", "2N"):
        with pytest.raises(InvalidGraph, match=f"'{name}' is no name for a size"):
            verify(replace(graph, sizes=(*graph.sizes, Size(name))))
