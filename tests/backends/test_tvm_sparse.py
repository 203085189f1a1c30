from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.backends import agreement
from intarsia.backends.base import Engine, refusals
from intarsia.backends.conformance import check_backend
from intarsia.backends.tvm import TvmBackend
from intarsia.backends.tvm_sparse import BEYOND, PANEL, Plan
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.apply import run_passes

pytest.importorskip("tvm")


@pytest.fixture(scope="module")
def cpu() -> Target:
    return load_target("cpu-avx2")


def attention(
    blocks: str, *, queries: int, keys: int, block_q: int, block_k: int, order: str = "None", depth: int = 16
) -> Program:
    """One attention of two heads, its keys from ``lengths`` on left out."""
    text = f"""graph sparse {{
      input %q: f32[3, 2, {queries}, {depth}]
      input %k: f32[3, 2, {keys}, {depth}]
      input %v: f32[3, 2, {keys}, {depth}]
      input %lengths: i64[3]
      %y: f32[3, 2, {queries}, {depth}] = intarsia.block_sparse_attention(query=%q, key=%k, value=%v, lengths=%lengths, blocks="{blocks}", order={order}, block_q={block_q}, block_k={block_k}, scale=None)
      return %y
    }}"""  # noqa: E501
    return Program(Graph.parse(text), {})


def without_lengths(program: Program) -> Program:
    text = str(program.graph).replace("input %lengths: i64[3]\n", "\n").replace("lengths=%lengths", "lengths=None")
    return Program(Graph.parse(text), {})


def built(program: Program, target: Target, folder: Path) -> Engine:
    backend = TvmBackend()
    return backend.load(folder, backend.build(program, target, folder).files)


BAND = attention("8:0-1;0-2;1-3;2-4;3-5;4-6;5-7;6-7", queries=128, keys=128, block_q=16, block_k=16, depth=32)
STRIPE = attention("7:4*0,3,5", queries=100, keys=100, block_q=30, block_k=16)
EMPTY_ROWS = attention("5:2-3;-;0,4;-", queries=64, keys=80, block_q=16, block_k=16)
NOTHING = attention("2:2*-", queries=20, keys=20, block_q=10, block_k=10)
SMALL_BLOCKS = attention("11:0-1,10;-;3,5,7;5*9-10;2,4-6", queries=61, keys=33, block_q=7, block_k=3, depth=20)
FRAMES_LAST = attention(
    "4:0-1;0-2;1-3;2-3", queries=52, keys=52, block_q=16, block_k=16, order='"48:4*1,0:12*1+4*12"', depth=8
)
CASES = {
    "a band": BAND,
    "a stripe with ragged ends": STRIPE,
    "rows without keys": EMPTY_ROWS,
    "no row with keys": NOTHING,
    "small blocks, more queries than keys": SMALL_BLOCKS,
    "text first, then places across frames": FRAMES_LAST,
}


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_it_is_the_attention_under_the_tables_mask(case: str, cpu: Target, tmp_path: Path) -> None:
    program = without_lengths(CASES[case])
    inputs = example_inputs(program.graph)
    assert agreement.error(built(program, cpu, tmp_path)(*inputs), program.module()(*inputs)) < 1e-6


def test_lengths_count_tokens_whatever_their_order(cpu: Target, tmp_path: Path) -> None:
    program = FRAMES_LAST
    *tensors, _ = example_inputs(program.graph)
    inputs = (*tensors, torch.tensor([51, 0, 1]))
    (found,) = built(program, cpu, tmp_path)(*inputs)
    assert agreement.error([found], program.module()(*inputs)) < 1e-6
    assert found[1].abs().max() == 0, "a query whose keys are all cut off gives zeros"


def test_it_keeps_the_contract_of_backends_and_overflows_nothing(cpu: Target, tmp_path: Path) -> None:
    program = without_lengths(BAND)
    check_backend(TvmBackend(), program, cpu, tmp_path)
    query, key, value = example_inputs(program.graph)
    inputs = (100 * query, 100 * key, value)
    engine = TvmBackend().load(tmp_path / "moved", ["model.so", "model.json"])
    assert agreement.error(engine(*inputs), program.module()(*inputs)) < 1e-4


HEADS = """graph heads {
  input %x: f32[2, 60, 64]
  param %to_q: f32[64, 64]
  param %to_out: f32[64, 64]
  %p: f32[2, 60, 64] = aten.linear(input=%x, weight=%to_q)
  %s: f32[2, 60, 4, 16] = aten.view(self=%p, size=[2, 60, 4, 16])
  %q: f32[2, 4, 60, 16] = aten.permute(self=%s, dims=[0, 2, 1, 3])
  %y.heads0: i64[2] = intarsia.integers(runs="0:1*1,2:1*1")
  %y.query0: f32[2, 2, 60, 16] = aten.index_select(self=%q, dim=1, index=%y.heads0)
  %y.part0: f32[2, 2, 60, 16] = intarsia.block_sparse_attention(query=%y.query0, key=%y.query0, value=%y.query0, lengths=None, blocks="4:2*0-1;2*2-3", order="0:20*1+3*20", block_q=16, block_k=16, scale=None)
  %y.query1: f32[2, 1, 60, 16] = aten.slice.Tensor(self=%q, dim=1, start=3, end=4)
  %y.part1: f32[2, 1, 60, 16] = aten.scaled_dot_product_attention(query=%y.query1, key=%y.query1, value=%y.query1)
  %y.heads2: i64[1] = intarsia.integers(runs="1:1*1")
  %y.query2: f32[2, 1, 60, 16] = aten.index_select(self=%q, dim=1, index=%y.heads2)
  %y.part2: f32[2, 1, 60, 16] = aten.zeros_like(self=%y.query2)
  %y.joined: f32[2, 4, 60, 16] = aten.cat(tensors=[%y.part0, %y.part1, %y.part2], dim=1)
  %y.places: i64[4] = intarsia.integers(runs="0:1*1,3:1*1,1:2*1")
  %y: f32[2, 4, 60, 16] = aten.index_select(self=%y.joined, dim=1, index=%y.places)
  %t: f32[2, 60, 4, 16] = aten.permute(self=%y, dims=[0, 2, 1, 3])
  %f: f32[2, 60, 64] = aten.reshape(self=%t, shape=[2, 60, 64])
  %o: f32[2, 60, 64] = aten.linear(input=%f, weight=%to_out)
  %alone: f32[2, 4, 60, 16] = intarsia.block_sparse_attention(query=%q, key=%q, value=%q, lengths=None, blocks="4:4*0,2", order=None, block_q=16, block_k=16, scale=0.3)
  %beside: f32[2, 60, 4, 16] = aten.permute(self=%alone, dims=[0, 2, 1, 3])
  return %o, %beside
}"""  # noqa: E501


def test_groups_of_heads_are_gathered_and_joined(cpu: Target, tmp_path: Path) -> None:
    graph = Graph.parse(HEADS)
    generator = torch.Generator().manual_seed(0)
    weights = {param.name: torch.randn(param.type.shape, generator=generator) / 8 for param in graph.params}
    assert [str(one) for one in refusals(TvmBackend(), graph, cpu)] == []
    program = materialize(Program(run_passes(TvmBackend.passes, graph, cpu), weights))
    inputs = example_inputs(program.graph)
    assert agreement.error(built(program, cpu, tmp_path)(*inputs), program.module()(*inputs)) < 1e-6


def test_a_gpu_is_told_who_has_a_kernel() -> None:
    text = str(attention("2:2*0", queries=32, keys=32, block_q=16, block_k=16, depth=32).graph)
    (refusal,) = refusals(TvmBackend(), Graph.parse(text), load_target("a100"))
    assert str(refusal).endswith("its kernel is for CPUs; for a GPU use backend triton or tensorrt")


@pytest.mark.parametrize("case", CASES)
def test_a_plan_computes_the_tables_pairs_and_no_others(case: str) -> None:
    node = CASES[case].graph.nodes[0]
    queries, keys = (CASES[case].graph.type(name).shape[2] for name in ("q", "k"))
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    plan = Plan.of(node.args, queries, keys)
    computed = torch.zeros(queries, keys, dtype=torch.bool)
    for first, count, begin, length in plan.tasks:
        tokens = plan.rows[first * plan.tile : (first + count) * plan.tile]
        read = plan.places[plan.lists[begin : begin + length]]
        for query in set(tokens.tolist()):
            computed[query, read[read != BEYOND]] = True
    sizes = (node.args["block_q"], node.args["block_k"])
    assert computed.sum() == BlockTable.parse(str(node.args["blocks"])).pairs(queries, keys, *sizes)  # type: ignore[arg-type]


def test_a_quarter_of_the_blocks_is_little_more_than_a_quarter_of_the_work() -> None:
    blocks = ";".join(f"{min(max(row - 8, 0), 48)}-{min(max(row - 8, 0), 48) + 15}" for row in range(64))
    call = {"blocks": f"64:{blocks}", "order": None, "block_q": 64, "block_k": 64}
    plan = Plan.of(call, 4096, 4096)
    pairs = sum(count * plan.tile * length * PANEL for _, count, _, length in plan.tasks.tolist())
    assert 0.25 <= pairs / 4096**2 < 0.26
