"""The graph itself: plain immutable data that answers questions about itself."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace

import pytest

from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.types import TensorType

TEXT = """\
graph g {
  input %x: f32[2]
  param %w: f32[2]
  %n: int = aten.sym_size.int(self=%x, dim=0)
  %y: f32[2] = aten.mul.Tensor(self=%x, other=%w)
  %z: f32[2] = aten.add.Tensor(self=%y, other=%y)
  return %z
}
"""


@pytest.fixture
def graph() -> Graph:
    return Graph.parse(TEXT)


def test_nodes_cannot_be_changed(graph: Graph) -> None:
    node = graph.nodes[1]
    with pytest.raises(FrozenInstanceError):
        node.op = "aten.sub.Tensor"  # type: ignore[misc]
    for change in (
        lambda args: args.update(other=Ref("x")),
        lambda args: args.__setitem__("other", 1),
        lambda args: args.pop("other"),
        lambda args: args.__ior__({"other": 1}),
    ):
        with pytest.raises(TypeError, match=r"arguments are immutable; use replace\(node, args="):
            change(node.args)


def test_changing_is_replacing(graph: Graph) -> None:
    node = graph.nodes[1]
    other = replace(node, args={**node.args, "other": 2.0})
    assert other.args["other"] == 2.0
    assert node.args["other"] == Ref("w")
    assert other != node


def test_nodes_are_hashable_and_survive_copying(graph: Graph) -> None:
    node = graph.nodes[1]
    assert {node: 1}[Graph.parse(TEXT).nodes[1]] == 1
    assert copy.deepcopy(node) == node
    assert copy.deepcopy(node) is not node


def test_a_graph_knows_values_producers_and_users_by_name(graph: Graph) -> None:
    assert list(graph.values) == ["x", "w", "n", "y", "z"]
    assert graph.producers["z"] is graph.nodes[2]
    assert "x" not in graph.producers
    assert graph.users["x"] == graph.nodes[:2]
    assert graph.users["y"] == (graph.nodes[2],)
    assert "z" not in graph.users
    assert [node.name for node in graph.find("aten.mul.Tensor", "aten.add.Tensor")] == ["y", "z"]


def test_a_node_knows_what_it_uses(graph: Graph) -> None:
    assert graph.nodes[2].inputs == ("y", "y")
    assert graph.nodes[1].ref("other") == "w"
    with pytest.raises(TypeError, match=r"%n: dim of aten\.sym_size\.int is 0, not a value of the graph"):
        graph.nodes[0].ref("dim")


def test_the_type_of_a_number_is_no_tensor_type(graph: Graph) -> None:
    assert graph.type("y") == TensorType("f32", (2,))
    with pytest.raises(TypeError, match="%n is a number of type int, not a tensor"):
        graph.type("n")
    with pytest.raises(TypeError, match="%n is a number of type int, not a tensor"):
        _ = graph.nodes[0].type


def test_the_fingerprint_changes_with_anything_but_the_sources(graph: Graph) -> None:
    assert len(graph.fingerprint) == 12
    assert graph.fingerprint == Graph.parse(TEXT).fingerprint
    seen = {graph.fingerprint}
    for old, new in [
        ("graph g", "graph h"),
        ("%x: f32[2]", "%x: f16[2]"),
        ("other=%w", "other=2"),
        ("return %z", "return %y"),
    ]:
        seen.add(Graph.parse(TEXT.replace(old, new)).fingerprint)
    assert len(seen) == 5
    moved = tuple(replace(node, source="elsewhere.py:1") for node in graph.nodes)
    assert replace(graph, nodes=moved).fingerprint == graph.fingerprint


def test_a_node_needs_no_special_mapping_for_its_arguments() -> None:
    node = Node("aten.relu", {"self": Ref("x")}, (Value("y", TensorType("f32", ())),))
    assert node == replace(node)
    assert node.args == {"self": Ref("x")}
