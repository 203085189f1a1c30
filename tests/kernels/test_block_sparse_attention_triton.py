"""Block-sparse attention in Triton: against the mask oracle in the interpreter, its tables, its code, its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intarsia import kernels
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.kernels.ahead import ARCHITECTURES, compile_launch
from intarsia.kernels.block_sparse_attention.tables import NEVER, block_tables
from intarsia.kernels.launch import Launch, launch_of

pytest.importorskip("triton")

TOLERANCE = {"torch.float32": 2e-6, "torch.float16": 2e-3}
"""Relative to the largest output: f32 sums in another order, f16 shares are rounded before they weigh values."""


def test_every_mode_agrees_with_the_mask_oracle_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "interpret_sparse.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 23
    assert {case: error for case, error in errors.items() if not error <= TOLERANCE[case.split()[0]]} == {}


def test_the_longest_rows_come_first_and_say_where_their_blocks_are() -> None:
    tables = block_tables("4:1;2*0-3;-;0,2", None, 128, 32)
    assert tables.rows.tolist() == [[1, 0, 4], [2, 4, 8], [4, 8, 10], [0, 10, 11], [3, 11, 11]]
    assert tables.columns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 2, 1]
    assert tables.tokens.tolist() == []
    assert {array.dtype for array in tables} == {torch.int32}


def test_a_block_reaches_as_far_as_its_last_token_unless_it_is_cut_short() -> None:
    assert block_tables("4:0-3", None, 128, 32).reach.tolist() == [31, 63, 95, 127]
    assert block_tables("4:0-3", None, 127, 32).reach.tolist() == [31, 63, 95, NEVER]
    assert block_tables("2:0-1", "4:4*1,0:4*1", 8, 4).reach.tolist() == [7, 3]


def test_without_blocks_there_is_nothing_to_compute() -> None:
    tables = block_tables("2:3*-", None, 20, 10)
    assert tables.rows.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert tables.columns.shape == (0,)


def call(
    *,
    block_q: int = 128,
    block_k: int = 128,
    channels: int = 128,
    rows: int = 8,
    tokens: str = "None",
    dtype: str = "bf16",
    order: str = "i32",
) -> Graph:
    tables = f"rows=%rows, columns=%columns, reach=%reach, tokens={tokens}, block_q={block_q}, block_k={block_k}"
    operands = f"query=%q, key=%q, value=%q, lengths=None, {tables}, scale=None"
    return Graph.parse(f"""graph g {{
  size B in [1, 2]
  input %q: {dtype}[B, 12, 1000, {channels}]
  param %rows: i32[{rows}, 3]
  param %columns: i32[20]
  param %reach: i32[{-(-1000 // block_k)}]
  param %tokens: {order}[1000]
  %y: {dtype}[B, 12, 1000, {channels}] = intarsia.block_sparse_attention_tables({operands})
  return %y
}}
""")


def launched(graph: Graph, architecture: str = "sm_90") -> Launch:
    found = launch_of(graph.nodes[0], graph, architecture)
    assert found is not None
    return found


def test_a_launch_reads_tables_of_32_bits_and_writes_tokens_before_heads() -> None:
    found = launched(call(tokens="%tokens"))
    operands = ("query", "key", "value", "rows", "columns", "reach", "tokens", "output")
    assert found.arguments[:8] == operands
    assert found.types[:8] == (*("*bf16",) * 3, *("*i32",) * 4, "*bf16")
    assert found.grid == ("8", "12*(B)", "1")
    assert found.constants["lengths_ptr"] is None
    assert found.layouts == {"output": (0, 2, 1, 3)}


@pytest.mark.parametrize(
    ("block_q", "block_k", "tile", "programs"),
    [
        (128, 128, (128, 64), 8),
        (256, 64, (128, 64), 8),
        (64, 32, (64, 32), 16),
        (48, 80, (16, 16), 63),
        (16, 64, (16, 16), 63),
    ],
)
def test_a_tile_divides_the_blocks_of_the_table(
    block_q: int, block_k: int, tile: tuple[int, int], programs: int
) -> None:
    found = launched(call(block_q=block_q, block_k=block_k, rows=-(-1000 // block_q)))
    assert (found.constants["tile_q"], found.constants["tile_k"]) == tile
    assert found.grid[0] == str(programs)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize(
    ("architecture", "channels", "block", "tokens"),
    [
        ("sm_80", 128, 128, "None"),
        ("sm_80", 128, 64, "%tokens"),
        ("sm_80", 64, 128, "%tokens"),
        ("sm_90", 128, 128, "None"),
        ("sm_90", 64, 128, "%tokens"),
        ("sm_90", 32, 16, "None"),
        ("gfx942", 128, 128, "None"),
        ("gfx942", 64, 64, "%tokens"),
    ],
)
def test_no_tile_spills_a_register(  # noqa: PLR0917
    architecture: str, channels: int, block: int, tokens: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    graph = call(block_q=block, block_k=block, channels=channels, rows=-(-1000 // block), tokens=tokens)
    code = compile_launch(launched(graph, architecture), architecture)
    assert code.spills == 0
    matrix = ARCHITECTURES[architecture].matrix if block >= 64 else "mma.sync"
    assert code.instructions[matrix] > 0


def test_full_precision_spills_nothing_and_uses_no_tensor_core(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    code = compile_launch(launched(call(dtype="f32", tokens="%tokens"), "sm_90"), "sm_90")
    assert (code.spills, dict(code.instructions)) == (0, {})


def test_keys_are_fetched_while_others_are_multiplied(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to shared memory that nobody waits for: the number of a block is read a step before its keys."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    code = compile_launch(launched(call(), "sm_90"), "sm_90").assembly
    assert "cp.async.wait_group" in code
    assert code.count("cp.async.cg.shared.global") >= 16


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (call(channels=96), "a head has 96 channels; on a GPU {op} takes 32, 64, 128"),
        (call(block_q=40, rows=25), "blocks are 40 queries x 128 keys; on a GPU {op} takes multiples of 16"),
        (call(rows=7), "rows are 7 blocks of 128; query has 1000 tokens"),
        (call(tokens="%tokens", order="i64"), "tokens is i64; {op} takes i32"),
    ],
    ids=["channels", "blocks", "rows", "wide order"],
)
def test_what_the_kernel_does_not_take_is_refused(faulty: Graph, reason: str) -> None:
    said = reason.format(op="intarsia.block_sparse_attention_tables")
    with pytest.raises(Unsupported) as refused:
        launched(faulty)
    assert str(refused.value).endswith(f"has no kernel for sm_90: {said}")


def test_work_is_what_the_blocks_of_the_table_are() -> None:
    graph = call()
    work = kernels.work(graph.nodes[0], graph, {"B": 2})
    assert work is not None
    assert work.flops == 4 * 20 * 128 * 128 * 2 * 12 * 128
