"""Sparse attention in Triton engines without a GPU: compiled, checked, run on its reference, launched on paper."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton")

from intarsia.backends.bundle import Bundle
from intarsia.backends.packing import Build, write_bundle
from intarsia.backends.triton import TritonBackend
from intarsia.backends.triton_engine import steps
from intarsia.backends.triton_files import read_manual
from intarsia.backends.verify import verify_bundle
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, load_program, materialize
from intarsia.ir.target import load_target
from intarsia.kernels.block_sparse_attention.tables import block_tables
from intarsia.passes.apply import run_passes

BAND, FRAMES_LAST = "4:0-1;0-2;1-3;-", "0:15*1+4*15"

SPARSE = f"""graph sparse {{
  size B in [1, 4]
  input %x: f32[B, 60, 192]
  param %w: f32[192, 192]
  %rows: f32[B, 60, 192] = aten.linear(input=%x, weight=%w, bias=None)
  %split: f32[B, 60, 6, 32] = aten.unflatten.int(self=%rows, dim=2, sizes=[6, 32])
  %heads: f32[B, 6, 60, 32] = aten.permute(self=%split, dims=[0, 2, 1, 3])
  %q: f32[B, 2, 60, 32] = aten.slice.Tensor(self=%heads, dim=1, start=0, end=2)
  %k: f32[B, 2, 60, 32] = aten.slice.Tensor(self=%heads, dim=1, start=2, end=4)
  %v: f32[B, 2, 60, 32] = aten.slice.Tensor(self=%heads, dim=1, start=4, end=6)
  %y: f32[B, 2, 60, 32] = intarsia.block_sparse_attention(query=%q, key=%k, value=%v, lengths=None, \
blocks="{BAND}", order="{FRAMES_LAST}", block_q=16, block_k=16, scale=None)
  %z: f32[B, 2, 60, 32] = intarsia.block_sparse_attention(query=%q, key=%k, value=%y, lengths=None, \
blocks="{BAND}", order="{FRAMES_LAST}", block_q=16, block_k=16, scale=None)
  return %z
}}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    graph = Graph.parse(SPARSE)
    return Program(graph, {"w": torch.randn(192, 192, generator=torch.Generator().manual_seed(0)) / 8})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Bundle:
    gpu, folder = load_target("h100"), tmp_path_factory.mktemp("triton") / "out"
    prepared = materialize(Program(run_passes(TritonBackend.passes, program.graph, gpu), program.weights))
    builds = [Build(TritonBackend(), prepared)]
    return write_bundle(folder, program=program, plan=None, builds=builds, target=gpu, command="intarsia export")


def test_calls_with_one_table_share_code_and_arrays(bundle: Bundle) -> None:
    claims = bundle.manifest["engines"]["triton"]
    assert claims["check"] == "1 kernels for sm_90, 0 spilling; they take 2 of 8 calls"
    assert claims["info"]["calls"] == {"intarsia.block_sparse_attention_tables": 2, "through PyTorch": 6}
    graph = load_program(bundle.folder / "engine/triton/model.graph").graph
    assert [param.name for param in graph.params] == ["w", "y.rows", "y.columns", "y.reach", "y.tokens"]


def test_its_reference_answers_as_the_graph_with_texts(bundle: Bundle, program: Program) -> None:
    assert verify_bundle(bundle.folder, reference=True).passed
    reference = TritonBackend().load_reference(bundle.folder / "engine/triton", [])
    inputs = example_inputs(program.graph, {"B": 3})
    torch.testing.assert_close(reference(*inputs), program.module()(*inputs))


class OnPaper:
    """Keeps what a compiled kernel is launched with."""

    def launch(self, grid: Sequence[int], arguments: Sequence[int], *, stream: int) -> None:
        self.grid, self.arguments = list(grid), list(arguments)


def numbers(address: int, count: int) -> NDArray[np.int32]:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


def test_a_kernel_is_given_the_tables_and_the_heads_where_they_lie(bundle: Bundle) -> None:
    folder = bundle.folder / "engine/triton"
    manual, engine, paper = read_manual(folder), load_program(folder / "model.graph"), OnPaper()
    functions = dict.fromkeys(manual.calls["sm_90"].values(), paper)
    run = steps(engine.graph, manual, "sm_90", functions, torch.device("cpu"))  # type: ignore[arg-type]
    aligned = {name: tensor.clone() for name, tensor in engine.weights.items()}
    table = {**aligned, "x": torch.randn(3, 60, 192)}
    for step in run[:6]:
        step(table, {"B": 3})
    query = table["q"]
    run[6](table, {"B": 3})
    given = dict(zip(manual.launches[manual.calls["sm_90"]["y"]].arguments, paper.arguments, strict=True))
    assert paper.grid == [4, 6, 1]
    assert given["query"] == query.data_ptr()
    assert (given["stride(query, 1)"], given["stride(query, 2)"]) == (32, 192)
    tables = block_tables(BAND, FRAMES_LAST, 60, 16)
    for name, array in tables._asdict().items():
        assert np.array_equal(numbers(given[name], array.numel()), array.numpy().reshape(-1))
    assert table["y"].transpose(1, 2).is_contiguous()


def test_a_head_that_no_kernel_takes_is_refused_before_anything_is_built() -> None:
    graph, gpu = Graph.parse(SPARSE.replace("32]", "24]").replace("192", "144")), load_target("h100")
    reasons = [TritonBackend().why_not(node, graph, gpu) for node in graph.nodes]
    said = "a head has 24 channels; on a GPU intarsia.block_sparse_attention takes 32, 64, 128"
    assert reasons == [None] * 6 + [said] * 2


def test_two_builds_give_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.folder / "engine/triton"
    built = TritonBackend().build(load_program(folder / "model.graph"), load_target("h100"), tmp_path)
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in built.files)
