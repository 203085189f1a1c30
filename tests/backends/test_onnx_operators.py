"""Operators of ours through ONNX: spelled in ONNX's own where it has them whole, as their reference otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.backends import agreement
from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target

onnx = pytest.importorskip("onnx")

BLOCK = """graph block {
  size N in [2, 64]
  input %x: f32[2, N, 32]
  input %m: f32[2, 1, 32]
  input %e: f32[2, N, 32]
  input %n: i64[2]
  param %w: f32[32]
  param %cos: f32[64, 4]
  param %sin: f32[64, 4]
  %count: int = aten.sym_size.int(self=%x, dim=1)
  %c: f32[N, 4] = aten.slice.Tensor(self=%cos, dim=0, start=0, end=%count)
  %s: f32[N, 4] = aten.slice.Tensor(self=%sin, dim=0, start=0, end=%count)
  %norm: f32[2, N, 32] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%m, shift=%e, eps=1e-06)
  %q: f32[2, N, 4, 8] = intarsia.norm_rope(input=%norm, weight=%w, cos=%c, sin=%s, heads=4, eps=1e-06)
  %k: f32[2, N, 4, 8] = intarsia.norm_rope(input=%x, weight=None, cos=%c, sin=%s, heads=4, eps=1e-05)
  %v: f32[2, N, 4, 8] = aten.view(self=%x, size=[2, %count, 4, 8])
  %qt: f32[2, 4, N, 8] = aten.permute(self=%q, dims=[0, 2, 1, 3])
  %kt: f32[2, 4, N, 8] = aten.permute(self=%k, dims=[0, 2, 1, 3])
  %vt: f32[2, 4, N, 8] = aten.permute(self=%v, dims=[0, 2, 1, 3])
  %a: f32[2, 4, N, 8] = intarsia.attention(query=%qt, key=%kt, value=%vt, lengths=%n, scale=0.3)
  %at: f32[2, N, 4, 8] = aten.permute(self=%a, dims=[0, 2, 1, 3])
  %flat: f32[2, N, 32] = aten.view(self=%at, size=[2, %count, 32])
  %y: f32[2, N, 32] = intarsia.gated_residual(residual=%x, input=%flat, gate=%m)
  return %y
}
"""

ATTENTION = """graph attention {
  input %q: f32[3, 2, 5, 8]
  input %k: f32[3, 2, 7, 8]
  input %n: i32[3]
  input %row: b1[3, 1, 1, 7]
  input %added: f32[5, 7]
  %lengths: f32[3, 2, 5, 8] = intarsia.attention(query=%q, key=%k, value=%k, lengths=%n, scale=None)
  %all: f32[3, 2, 5, 8] = intarsia.attention(query=%q, key=%k, value=%k, lengths=None, scale=0.5)
  %mask: f32[3, 2, 5, 8] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%k, attn_mask=%row)
  %bias: f32[3, 2, 5, 8] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%k, attn_mask=%added, scale=0.2)
  return %lengths, %all, %mask, %bias
}
"""

SELECTIONS = """graph g {
  input %c: b1[3, 4]
  input %b: b1[3, 4]
  input %i: i16[3, 4]
  %x: b1[3, 4] = aten.masked_fill.Scalar(self=%b, mask=%c, value=False)
  %y: i16[3, 4] = aten.where.self(condition=%c, self=%i, other=%i)
  %z: b1[3, 4] = aten.where.self(condition=%x, self=%b, other=%c)
  return %x, %y, %z
}
"""


def made(text: str, folder: Path, target: Target):  # type: ignore[no-untyped-def]
    """The program with random weights, its engine, and the operators in the file."""
    graph = Graph.parse(text)
    generator = torch.Generator().manual_seed(2)
    weights = {param.name: torch.randn(param.type.shape, generator=generator) for param in graph.params}
    program, backend = Program(graph, weights), OnnxBackend()
    engine = backend.load(folder, backend.build(program, target, folder).files)
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    return program, engine, [node.op_type for node in model.graph.node]


def test_a_block_of_our_operators_is_onnx_own(target: Target, tmp_path: Path) -> None:
    program, engine, operators = made(BLOCK, tmp_path, target)
    for tokens in (3, 17):
        inputs = example_inputs(program.graph, {"N": tokens})
        for lengths in ([tokens, 2], [1, tokens - 1], [0, tokens]):
            given = (*inputs[:3], torch.tensor(lengths))
            assert agreement.error(engine(*given), tuple(program.module()(*given))) < 1e-6
    counts = {name: operators.count(name) for name in ("Attention", "RotaryEmbedding", "RMSNormalization", "Range")}
    assert counts == {"Attention": 1, "RotaryEmbedding": 2, "RMSNormalization": 2, "Range": 2}
    assert "LayerNormalization" in operators
    assert not {"Softmax", "Transpose", "Sqrt"} & set(operators)


def test_masks_and_lengths_of_attention(target: Target, tmp_path: Path) -> None:
    program, engine, operators = made(ATTENTION, tmp_path, target)
    assert operators.count("Attention") == 4
    row = torch.arange(7) < torch.tensor([7, 1, 4])[:, None, None, None]
    for lengths in ([7, 3, 1], [0, 9, 2]):
        q, k, _, _, added = example_inputs(program.graph, seed=lengths[0])
        given = (q, k, torch.tensor(lengths, dtype=torch.int32), row, added)
        assert agreement.error(engine(*given), tuple(program.module()(*given))) < 1e-6


def test_a_row_without_keys_gives_zeros(target: Target, tmp_path: Path) -> None:
    program, engine, _ = made(ATTENTION, tmp_path, target)
    q, k, _, row, added = example_inputs(program.graph)
    answer = engine(q, k, torch.tensor([0, 7, 0], dtype=torch.int32), row | True, added)[0]
    assert answer[[0, 2]].abs().max() == 0
    assert answer[1].abs().min() > 0


def test_choices_between_booleans_and_short_integers_run(target: Target, tmp_path: Path) -> None:
    program, engine, _ = made(SELECTIONS, tmp_path, target)
    c = torch.rand(3, 4) > 0.5
    given = (c, torch.rand(3, 4) > 0.3, torch.randint(-(2**15), 2**15, (3, 4)).to(torch.int16))
    assert all(torch.equal(a, b) for a, b in zip(engine(*given), program.module()(*given), strict=True))


def test_an_operator_of_another_package_becomes_its_reference(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from intarsia import kernels

    @torch.library.custom_op("intarsia_test_onnx::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    known = kernels.decompositions()
    ours = {torch.ops.intarsia_test_onnx.twice.default: lambda x: torch.ops.aten.mul.Tensor(x, 2)}
    monkeypatch.setattr(kernels, "decompositions", lambda: {**known, **ours})
    text = """graph g {
      input %x: f32[3]
      %y: f32[3] = intarsia_test_onnx.twice(x=%x)
      return %y
    }"""
    _, engine, operators = made(text, tmp_path, target)
    assert operators == ["Mul"]
    assert engine(torch.ones(3))[0].tolist() == [2, 2, 2]
