"""Programs: a graph with its weights, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.ir.errors import InvalidGraph, ParseError, UsageError
from intarsia.ir.graph import Graph, Ref
from intarsia.ir.program import (
    Program,
    example_inputs,
    load_program,
    load_weights,
    materialize,
    meta_weights,
    save_weights,
    split_constant,
)
from intarsia.ir.verify import verify

TEXT = """\
graph g {
  size N in [2, 64]
  input %x: f32[N, 4]
  param %w: f32[4, 4]
  param %bias: f32[4]
  %turned: f32[4, 4] = aten.t(self=%w)
  %rows: int = aten.sym_size.int(self=%w, dim=0)
  %scaled: f32[4, 4] = aten.mul.Tensor(self=%turned, other=2.0)
  %noise: f32[4] = aten.rand(size=[4])
  %n: int = aten.sym_size.int(self=%x, dim=0)
  %y: f32[N, 4] = aten.linear(input=%x, weight=%scaled, bias=%bias)
  %z: f32[N, 4] = aten.view(self=%y, size=[%n, %rows])
  return %z, %turned
}
"""


def program(text: str = TEXT) -> Program:
    graph = Graph.parse(text)
    generator = torch.Generator().manual_seed(0)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) for p in graph.params})  # type: ignore[arg-type,union-attr]


def test_a_program_has_a_tensor_for_each_parameter() -> None:
    with pytest.raises(InvalidGraph, match="graph g: there is no weight for parameter %bias"):
        Program(Graph.parse(TEXT), {"w": torch.zeros(4, 4)})


def test_what_needs_no_input_is_told_apart_and_randomness_is_no_constant() -> None:
    constant, dynamic = split_constant(program().graph)
    assert [node.name for node in constant] == ["turned", "rows", "scaled"]
    assert [node.name for node in dynamic] == ["noise", "n", "y", "z"]


def test_materializing_runs_weight_only_nodes_once_and_keeps_what_they_give() -> None:
    source = program()
    built = materialize(source)
    verify(built.graph)
    assert [param.name for param in built.graph.params] == ["bias", "turned", "scaled"]
    assert [node.name for node in built.graph.nodes] == ["noise", "n", "y", "z"]
    assert built.graph.producers["z"].args["size"] == (Ref("n"), 4)
    assert torch.equal(built.weights["scaled"], source.weights["w"].t() * 2)
    assert built.weights["scaled"].is_contiguous()
    (x,) = example_inputs(source.graph)
    for ours, theirs in zip(built.module()(x), source.module()(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_materializing_again_changes_nothing() -> None:
    once = materialize(program())
    assert materialize(once).graph == once.graph


def test_example_inputs_fit_the_types_and_follow_the_seed() -> None:
    graph = Graph.parse("""\
graph g {
  size N in [6, inf]
  size H in [1, 3]
  input %x: bf16[N, 2*H]
  input %mask: b1[H]
  input %index: i64[2]
  return %x
}
""")
    x, mask, index = example_inputs(graph, seed=3)
    assert (x.dtype, x.shape) == (torch.bfloat16, (6, 6))
    assert (mask.dtype, mask.shape) == (torch.bool, (3,))
    assert index.dtype == torch.int64
    assert torch.equal(example_inputs(graph, seed=3)[0], x)
    assert not torch.equal(example_inputs(graph, seed=4)[0], x)
    assert example_inputs(graph, {"N": 9})[0].shape == (9, 6)


def test_the_fingerprint_is_that_of_the_bytes_the_graph_uses() -> None:
    first = program()
    assert first.fingerprint() == program().fingerprint()
    assert first.fingerprint() == Program(first.graph, {**first.weights, "unused": torch.ones(1)}).fingerprint()
    changed = {**first.weights, "bias": first.weights["bias"] + 1}
    assert first.fingerprint() != Program(first.graph, changed).fingerprint()


def test_meta_weights_have_no_bytes() -> None:
    graph = Graph.parse(TEXT)
    meta = Program(graph, meta_weights(graph.params))
    assert meta.is_meta
    assert not program().is_meta
    with pytest.raises(UsageError, match="graph g: weights are on the meta device and have no bytes"):
        meta.fingerprint()


def test_a_program_is_a_text_beside_safetensors(tmp_path: Path) -> None:
    source = program()
    path = tmp_path / "g.graph"
    path.write_text(str(source.graph))
    save_weights(source.weights, tmp_path / "g.safetensors")
    loaded = load_program(path)
    assert loaded.graph == source.graph
    assert loaded.fingerprint() == source.fingerprint()


def test_equal_weights_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    weights = dict(program().weights)
    save_weights(weights, tmp_path / "a.safetensors")
    save_weights(dict(reversed(weights.items())), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_weights_that_share_memory_are_saved_each_on_its_own(tmp_path: Path) -> None:
    shared = torch.arange(8.0)
    save_weights({"a": shared, "b": shared, "c": shared[:4]}, tmp_path / "w.safetensors")
    params = Graph.parse(
        "graph g {\n  param %a: f32[8]\n  param %b: f32[8]\n  param %c: f32[4]\n  return %a\n}\n"
    ).params
    loaded = load_weights(tmp_path / "w.safetensors", params)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["c"], shared[:4])


def test_without_weights_beside_it_a_graph_is_loaded_on_the_meta_device(tmp_path: Path) -> None:
    (tmp_path / "g.graph").write_text(TEXT)
    loaded = load_program(tmp_path / "g.graph")
    assert loaded.is_meta
    assert loaded.weights["w"].shape == (4, 4)


def test_what_cannot_be_loaded_is_told_by_path_and_rule(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.graph: cannot be read as a graph: No such file"):
        load_program(tmp_path / "nowhere.graph")
    path = tmp_path / "g.graph"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"g\.graph: cannot be read as a graph: not text"):
        load_program(path)
    path.write_text("graph g {")
    with pytest.raises(ParseError, match="line 1"):
        load_program(path)
    path.write_text(TEXT)
    (tmp_path / "g.safetensors").write_bytes(b"not weights")
    with pytest.raises(UsageError, match=r"g\.safetensors: cannot be read as safetensors: "):
        load_program(path)
    save_weights({"w": torch.zeros(4, 4)}, tmp_path / "g.safetensors")
    with pytest.raises(UsageError, match=r"g\.safetensors: no tensor for parameter %bias"):
        load_program(path)
    save_weights({"w": torch.zeros(4, 5), "bias": torch.zeros(4)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"other\.safetensors: w is f32\[4, 5\], the graph asks for f32\[4, 4\]"):
        load_program(path, weights=tmp_path / "other.safetensors")
