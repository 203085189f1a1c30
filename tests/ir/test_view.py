"""The networkx view."""

from __future__ import annotations

import networkx as nx

from intarsia.ir.graph import Graph
from intarsia.ir.view import as_networkx

DIAMOND = Graph.parse("""\
graph diamond {
  input %x: f32[4]
  param %w: f32[4]
  %top.0: f32[2], %top.1: f32[2] = aten.split.Tensor(self=%x, split_size=2)
  %left: f32[2] = aten.relu(self=%top.0)
  %right: f32[2] = aten.add.Tensor(self=%top.1, other=%top.0)
  %end: f32[2] = aten.mul.Tensor(self=%left, other=%right)
  %square: f32[2] = aten.mul.Tensor(self=%end, other=%end)
  return %square
}
""")


def test_nodes_carry_their_calls_and_edges_the_values_that_flow() -> None:
    view = as_networkx(DIAMOND)
    assert list(view) == ["top.0", "left", "right", "end", "square"]
    assert view.nodes["left"]["node"] is DIAMOND.producers["left"]
    assert view.edges["top.0", "right"]["values"] == ["top.1", "top.0"]
    assert view.edges["end", "square"]["values"] == ["end"]


def test_networkx_answers_questions_about_the_graph() -> None:
    view = as_networkx(DIAMOND)
    dominators = nx.immediate_dominators(view, "top.0")
    assert dominators["end"] == "top.0"
    assert nx.ancestors(view, "end") == {"top.0", "left", "right"}
    assert nx.is_directed_acyclic_graph(view)
