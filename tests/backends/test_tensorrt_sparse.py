from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends import agreement, tensorrt_sparse
from intarsia.backends.base import refusals
from intarsia.backends.null import NullEngine
from intarsia.backends.onnx_model import onnx_model
from intarsia.backends.tensorrt import TensorrtBackend
from intarsia.backends.tensorrt_model import TENSORRT
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target

pytest.importorskip("tensorrt_rtx_bindings")
onnx = pytest.importorskip("onnx")

A100, RTX4090 = load_target("a100"), load_target("rtx4090")


def attention(
    blocks: str, *, queries: int, keys: int, block_q: int, block_k: int, order: str = "None", dtype: str = "f32"
) -> Program:
    """One attention of two heads of 16 channels, a named number of samples, keys from ``lengths`` on left out."""
    text = f"""graph sparse {{
      size B in [1, 4]
      input %q: {dtype}[B, 2, {queries}, 16]
      input %k: {dtype}[B, 2, {keys}, 16]
      input %v: {dtype}[B, 2, {keys}, 16]
      input %lengths: i32[B]
      %y: {dtype}[B, 2, {queries}, 16] = intarsia.block_sparse_attention(query=%q, key=%k, value=%v, lengths=%lengths, blocks="{blocks}", order={order}, block_q={block_q}, block_k={block_k}, scale=None)
      return %y
    }}"""  # noqa: E501
    return Program(Graph.parse(text), {})


def without_lengths(program: Program) -> Program:
    text = str(program.graph).replace("input %lengths: i32[B]\n", "\n").replace("lengths=%lengths", "lengths=None")
    return Program(Graph.parse(text), {})


BAND = attention("8:0-1;0-2;1-3;2-4;3-5;4-6;5-7;6-7", queries=64, keys=64, block_q=8, block_k=8)
STRIPE = attention("7:4*0,3,5", queries=100, keys=100, block_q=30, block_k=16)
EMPTY_ROWS = attention("5:2-3;-;0,4;-", queries=64, keys=80, block_q=16, block_k=16)
NOTHING = attention("2:2*-", queries=20, keys=20, block_q=10, block_k=10)
EVERYTHING = attention("1:0", queries=20, keys=24, block_q=20, block_k=24)
NEARLY_ALIKE = attention("22:0-20;1-20;0-19", queries=24, keys=44, block_q=8, block_k=2)
FRAMES_LAST = attention("4:0-1;0-2;1-3;2-3", queries=52, keys=52, block_q=16, block_k=16, order='"48:4*1,0:12*1+4*12"')
CASES = {
    "a band": BAND,
    "a stripe with ragged ends": STRIPE,
    "rows without keys": EMPTY_ROWS,
    "no row with keys": NOTHING,
    "all of it": EVERYTHING,
    "rows of nearly as many keys": NEARLY_ALIKE,
    "text first, then places across frames": FRAMES_LAST,
}


def reference(program: Program, folder: Path, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What the typed ONNX gives; nothing is built."""
    import onnx_ir

    onnx_ir.save(onnx_model(program, TENSORRT), folder / "model.onnx")
    return TensorrtBackend().load_reference(folder, ["model.onnx"])(*inputs)


@pytest.mark.parametrize("case", CASES)
def test_gathers_and_dense_attentions_are_the_attention_under_the_tables_mask(case: str, tmp_path: Path) -> None:
    program = without_lengths(CASES[case])
    inputs = example_inputs(program.graph, {"B": 3})
    assert agreement.error(reference(program, tmp_path, *inputs), NullEngine(program)(*inputs)) < 1e-6


@pytest.mark.parametrize("case", ["rows of nearly as many keys", "text first, then places across frames"])
def test_lengths_count_tokens_whatever_their_order(case: str, tmp_path: Path) -> None:
    program = CASES[case]
    *tensors, _ = example_inputs(program.graph, {"B": 3})
    inputs = (*tensors, torch.tensor([19, 0, 1], dtype=torch.int32))
    (found,) = reference(program, tmp_path, *inputs)
    assert agreement.error([found], NullEngine(program)(*inputs)) < 1e-6
    assert found[1].abs().max() == 0, "a query whose keys are all cut off gives zeros"


def test_rows_of_nearly_as_many_keys_are_one_attention(tmp_path: Path) -> None:
    attentions = [node for node in onnx_model(NEARLY_ALIKE, TENSORRT).graph if node.op_type == "Softmax"]
    assert len(attentions) == 1


def test_an_attention_reads_copies_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = without_lengths(attention(";".join(["16:0-3", *(f"{i}-{i + 3}" for i in range(1, 13)), "3*12-15"]),
                              queries=128, keys=128, block_q=8, block_k=8))  # fmt: skip
    inputs = example_inputs(program.graph, {"B": 2})
    monkeypatch.setattr(tensorrt_sparse, "COPIES", 3 * 2 * (2 * 32 * 16) * 4)
    assert agreement.error(reference(program, tmp_path, *inputs), NullEngine(program)(*inputs)) < 1e-6
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert operators["Softmax"] == 6, "16 groups, three to an attention"


HEADS = """graph heads {
  input %x: f16[1, 64, 128]
  param %to_q: f16[128, 128]
  param %to_k: f16[128, 128]
  param %to_v: f16[128, 128]
  %p: f16[1, 64, 128] = aten.linear(input=%x, weight=%to_q)
  %s: f16[1, 64, 4, 32] = aten.view(self=%p, size=[1, 64, 4, 32])
  %q: f16[1, 4, 64, 32] = aten.permute(self=%s, dims=[0, 2, 1, 3])
  %r: f16[1, 64, 128] = aten.linear(input=%x, weight=%to_k)
  %t: f16[1, 64, 4, 32] = aten.view(self=%r, size=[1, 64, 4, 32])
  %k: f16[1, 4, 64, 32] = aten.permute(self=%t, dims=[0, 2, 1, 3])
  %m: f16[1, 64, 128] = aten.linear(input=%x, weight=%to_v)
  %n: f16[1, 64, 4, 32] = aten.view(self=%m, size=[1, 64, 4, 32])
  %v: f16[1, 4, 64, 32] = aten.permute(self=%n, dims=[0, 2, 1, 3])
  %y.heads0: i64[2] = intarsia.integers(runs="0:1*1,2:1*1")
  %y.query0: f16[1, 2, 64, 32] = aten.index_select(self=%q, dim=1, index=%y.heads0)
  %y.key0: f16[1, 2, 64, 32] = aten.index_select(self=%k, dim=1, index=%y.heads0)
  %y.value0: f16[1, 2, 64, 32] = aten.index_select(self=%v, dim=1, index=%y.heads0)
  %y.part0: f16[1, 2, 64, 32] = intarsia.block_sparse_attention(query=%y.query0, key=%y.key0, value=%y.value0, lengths=None, blocks="4:0-1;0-2;1-3;2-3", order="0:16*1+4*16", block_q=16, block_k=16, scale=None)
  %y.query1: f16[1, 1, 64, 32] = aten.slice.Tensor(self=%q, dim=1, start=3, end=4)
  %y.key1: f16[1, 1, 64, 32] = aten.slice.Tensor(self=%k, dim=1, start=3, end=4)
  %y.value1: f16[1, 1, 64, 32] = aten.slice.Tensor(self=%v, dim=1, start=3, end=4)
  %y.part1: f16[1, 1, 64, 32] = aten.scaled_dot_product_attention(query=%y.query1, key=%y.key1, value=%y.value1)
  %y.heads2: i64[1] = intarsia.integers(runs="1:1*1")
  %y.query2: f16[1, 1, 64, 32] = aten.index_select(self=%q, dim=1, index=%y.heads2)
  %y.part2: f16[1, 1, 64, 32] = aten.zeros_like(self=%y.query2)
  %y.joined: f16[1, 4, 64, 32] = aten.cat(tensors=[%y.part0, %y.part1, %y.part2], dim=1)
  %y.places: i64[4] = intarsia.integers(runs="0:1*1,3:1*1,1:2*1")
  %y: f16[1, 4, 64, 32] = aten.index_select(self=%y.joined, dim=1, index=%y.places)
  return %y
}"""  # noqa: E501


@pytest.mark.parametrize("target", [A100, RTX4090], ids=["sm_80", "sm_89"])
def test_nvidias_builder_makes_an_engine_of_groups_of_heads(target: Target, tmp_path: Path) -> None:
    backend, graph = TensorrtBackend(), Graph.parse(HEADS)
    assert [str(one) for one in refusals(backend, graph, target)] == []
    generator = torch.Generator().manual_seed(0)
    weights = {p.name: (torch.randn(p.type.shape, generator=generator) / 11).half() for p in graph.params}
    program = materialize(Program(graph, weights))
    built = backend.build(program, target, tmp_path)
    assert json.loads((tmp_path / "build.json").read_text())["engine"]["bytes"] > 0
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert operators["Attention"] == 3, "two sizes of groups, and the dense head"
    assert not {"Scan", "Loop", "If"} & operators.keys()
    inputs = example_inputs(program.graph)
    answer = backend.load_reference(tmp_path, built.files)(*inputs)
    assert agreement.error(answer, NullEngine(program)(*inputs)) < 2e-3


ALONE = """graph alone {
  input %q: f16[1, 1, 33, 32]
  input %k: f16[1, 1, 40, 32]
  input %v: f16[1, 1, 40, 32]
  input %mask: b1[1, 1, 33, 40]
  %y: f16[1, 1, 33, 32] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v, attn_mask=%mask)
  return %y
}"""


def test_nvidias_builder_takes_one_head_of_one_sample_as_two_halves(tmp_path: Path) -> None:
    backend, program = TensorrtBackend(), Program(Graph.parse(ALONE), {})
    built = backend.build(program, RTX4090, tmp_path)
    *tensors, mask = example_inputs(program.graph)
    mask[..., 0] = True
    answer = backend.load_reference(tmp_path, built.files)(*tensors, mask)
    assert agreement.error(answer, NullEngine(program)(*tensors, mask)) < 2e-3


def test_nvidias_builder_takes_masks_and_a_range_of_samples(tmp_path: Path) -> None:
    program = attention("22:0-20;1-20;-", queries=24, keys=44, block_q=8, block_k=2, dtype="f16")
    built = TensorrtBackend(typical="B=2").build(program, RTX4090, tmp_path)
    assert built.info["engine"]["layers"] > 0  # type: ignore[index]
