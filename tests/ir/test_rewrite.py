"""The primitives from which passes are made: replace, rename, drop."""

from __future__ import annotations

from dataclasses import replace

import pytest

from intarsia.ir.errors import InvalidGraph
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.rewrite import drop_unused, rename_uses, rewrite

CHAIN = Graph.parse("""\
graph chain {
  input %x: f32[2]
  input %ignored: f32[2]
  param %w: f32[2]
  param %unused: f32[2]
  %a: f32[2] = aten.relu(self=%x)
  %b: f32[2] = aten.mul.Tensor(self=%a, other=%w)
  %dead: f32[2] = aten.neg(self=%b)
  %parts.0: f32[1], %parts.1: f32[1] = aten.split.Tensor(self=%b, split_size=1)
  %c: f32[2] = aten.cat(tensors=[%parts.0, %a, [%b]])
  return %c, %b
}
""")


def test_a_rule_replaces_a_node_by_nodes_that_define_the_same_names() -> None:
    def sigmoid_of_relu(node: Node) -> list[Node] | None:
        if node.op != "aten.relu":
            return None
        inner = replace(node, outputs=(replace(node.outputs[0], name="a.inner"),))
        return [inner, replace(node, op="aten.sigmoid", args={"self": Ref("a.inner")})]

    changed = rewrite(CHAIN, sigmoid_of_relu)
    assert [node.name for node in changed.nodes] == ["a.inner", "a", "b", "dead", "parts.0", "c"]
    assert changed.nodes[1].op == "aten.sigmoid"
    assert changed.nodes[2:] == CHAIN.nodes[1:]


def test_a_rule_that_never_fires_gives_the_same_object() -> None:
    assert rewrite(CHAIN, lambda node: None) is CHAIN


def test_an_empty_replacement_removes_the_node() -> None:
    assert [n.name for n in rewrite(CHAIN, lambda n: [] if n.name == "dead" else None).nodes] == [
        "a",
        "b",
        "parts.0",
        "c",
    ]


def test_renaming_follows_chains_into_lists_and_outputs() -> None:
    renamed = rename_uses(CHAIN, {"b": "middle", "middle": "a"})
    assert renamed.producers["dead"].args["self"] == Ref("a")
    assert renamed.producers["c"].args["tensors"] == (Ref("parts.0"), Ref("a"), (Ref("a"),))
    assert renamed.outputs == ("c", "a")
    assert renamed.nodes[0] is CHAIN.nodes[0]


def test_renaming_nothing_gives_the_same_object() -> None:
    assert rename_uses(CHAIN, {}) is CHAIN


def test_renaming_in_a_circle_is_refused() -> None:
    with pytest.raises(InvalidGraph, match="%b is renamed to itself"):
        rename_uses(CHAIN, {"b": "a", "a": "b"})


def test_what_no_output_needs_is_dropped_but_inputs_stay() -> None:
    kept = drop_unused(CHAIN)
    assert [node.name for node in kept.nodes] == ["a", "b", "parts.0", "c"]
    assert [param.name for param in kept.params] == ["w"]
    assert kept.inputs == CHAIN.inputs
    assert drop_unused(kept) is kept
