from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.backends import agreement
from intarsia.backends.tvm import TvmBackend
from intarsia.backends.tvm_tuning import RECORDS
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import load_target

pytest.importorskip("tvm")

TEXT = """graph g {
  input %x: f32[60, 32]
  input %i: i8[60, 32]
  param %w: f32[64, 32]
  param %b: f32[64]
  param %wi: i8[16, 32]
  param %m: i32[16]
  param %s: i32[16]
  %y: f32[60, 64] = aten.linear(input=%x, weight=%w, bias=%b)
  %z: f32[60, 64] = aten.relu(self=%y)
  %yi: i8[60, 16] = intarsia.linear_i8i8(input=%i, weight=%wi, bias=None, multiplier=%m, shift=%s)
  return %z, %yi
}"""


@pytest.fixture(scope="module")
def program() -> Program:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "w": torch.randn(64, 32, generator=generator),
        "b": torch.randn(64, generator=generator),
        "wi": torch.randint(-128, 128, (16, 32), generator=generator).to(torch.int8),
        "m": torch.full((16,), 2**30, dtype=torch.int32),
        "s": torch.full((16,), 40, dtype=torch.int32),
    }
    return Program(Graph.parse(TEXT), weights)


def test_what_was_measured_is_applied_again_without_measuring(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, replayed, database = (tmp_path / name for name in ("tuned", "replayed", "database"))
    for folder in (tuned, replayed):
        folder.mkdir()
    cpu = load_target("cpu-avx2")
    files = TvmBackend(trials=3, database=str(database)).build(program, cpu, tuned).files
    assert set(RECORDS) <= set(files)
    assert len((database / RECORDS[1]).read_text().splitlines()) == 6
    with monkeypatch.context() as patch:
        patch.setattr("intarsia.backends.tvm_tuning.Tuning._seconds", None)
        backend = TvmBackend(database=str(database))
        again = backend.build(program, cpu, replayed).files
    assert again == files
    for name in files:
        assert (tuned / name).read_bytes() == (replayed / name).read_bytes()
    inputs = example_inputs(program.graph)
    assert agreement.error(backend.load(replayed, files)(*inputs), program.module()(*inputs)) < 1e-5


def test_a_database_that_is_not_there_is_told(program: Program, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no database_tuning_record\.json; tune with trials=4 to make one"):
        TvmBackend(database=str(tmp_path)).build(program, load_target("cpu-avx2"), tmp_path)
    with pytest.raises(UsageError, match="trials is -1"):
        TvmBackend(trials=-1).build(program, load_target("cpu-avx2"), tmp_path)
