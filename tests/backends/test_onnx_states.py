"""Inputs that an engine keeps: which of them ONNX Runtime may write in place, and that both ways give the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.base import Carried, Stateful
from intarsia.backends.onnx import OnnxBackend, OnnxEngine
from intarsia.backends.onnx_states import KEY
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import Target

onnx = pytest.importorskip("onnx")

TARGET = Target("null", "a machine for tests", "null", "none", {"f32": 1e12}, 1e11, 2**30, 1e-6)

STEP = """graph step {{
  size active in [1, 8]
  input %rows: f32[2, active, 4]
  input %active: i64[active]
  input %cache: f32[2, 8, 4]
{calls}
}}
"""

NEXT = "%next: f32[2, 8, 4] = aten.index_copy(self=%cache, dim=1, index=%active, source=%rows)"

WRITTEN_LAST = """  %twice: f32[2, 8, 4] = aten.add.Tensor(self=%cache, other=%cache)
  %whole: f32[2, 8, 4] = aten.index_copy(self=%twice, dim=1, index=%active, source=%rows)
  %taken: f32[2, active, 4] = aten.index_select(self=%whole, dim=1, index=%active)
  %next: f32[2, 8, 4] = aten.index_copy(self=%cache, dim=1, index=%active, source=%taken)
  return %whole, %next"""

READ_BESIDE = f"""  {NEXT}
  %twice: f32[2, 8, 4] = aten.add.Tensor(self=%cache, other=%next)
  return %twice, %next"""

SEEN_THROUGH_A_VIEW = """  %flat: f32[16, 4] = aten.view(self=%cache, size=[16, 4])
  %sum: f32[4] = aten.sum.dim_IntList(self=%flat, dim=[0])
  %taken: f32[2, active, 4] = aten.add.Tensor(self=%rows, other=%sum)
  %next: f32[2, 8, 4] = aten.index_copy(self=%cache, dim=1, index=%active, source=%taken)
  %top: f32[4] = aten.amax(self=%flat, dim=[0])
  return %top, %next"""

COMPUTED_WHOLE = """  %twice: f32[2, 8, 4] = aten.add.Tensor(self=%cache, other=%cache)
  %next: f32[2, 8, 4] = aten.index_copy(self=%twice, dim=1, index=%active, source=%rows)
  return %twice, %next"""


def step(calls: str) -> Program:
    return Program(Graph.parse(STEP.format(calls=calls)), {})


def engine_of(program: Program, folder: Path) -> OnnxEngine:
    backend = OnnxBackend()
    return backend.load(folder, backend.build(program, TARGET, folder).files)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (f"  {NEXT}\n  return %rows, %next", {"output.1": "cache"}),
        (WRITTEN_LAST, {"output.1": "cache"}),
        (READ_BESIDE, {}),
        (SEEN_THROUGH_A_VIEW, {}),
        (COMPUTED_WHOLE, {}),
        (f"  {NEXT}\n  return %cache, %next", {}),
    ],
    ids=["written only", "read before", "read beside", "seen through a view", "computed whole", "given back"],
)
def test_an_input_is_written_in_place_only_where_all_that_reads_it_comes_before(
    calls: str, expected: dict[str, str], tmp_path: Path
) -> None:
    engine_of(step(calls), tmp_path)
    told = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert told.get(KEY, {}) == expected


@pytest.mark.parametrize("calls", [WRITTEN_LAST, READ_BESIDE, SEEN_THROUGH_A_VIEW, COMPUTED_WHOLE])
def test_what_is_kept_has_the_bits_of_what_is_carried(calls: str, tmp_path: Path) -> None:
    engine = engine_of(step(calls), tmp_path)
    kept = engine.stateful([torch.zeros(2, 8, 4)], inputs=[2], outputs=[1])
    carried = Carried(engine, [torch.zeros(2, 8, 4)], inputs=[2], outputs=[1])
    for _ in range(2):
        for active in ([1, 4, 6], [0, 4], list(range(8))):
            given = rows(len(active)), torch.tensor(active)
            same(kept, carried, given)
        kept.clear()
        carried.clear()
        assert not kept.kept[0].any()


def same(kept: Stateful, carried: Stateful, given: tuple[Tensor, ...]) -> None:
    (found,), (expected,) = kept(*given), carried(*given)
    assert torch.equal(found, expected)
    assert torch.equal(kept.kept[0], carried.kept[0])
    assert kept.kept[0].any()


def rows(count: int) -> Tensor:
    return torch.randn(2, count, 4, generator=torch.Generator().manual_seed(count))


def test_one_buffer_is_written_in_place_and_two_change_places(tmp_path: Path) -> None:
    for name, calls, buffers in (("one", WRITTEN_LAST, 1), ("two", COMPUTED_WHOLE, 2)):
        (tmp_path / name).mkdir()
        kept = engine_of(step(calls), tmp_path / name).stateful([torch.zeros(2, 8, 4)], inputs=[2], outputs=[1])
        places = set()
        for _ in range(4):
            kept(rows(1), torch.tensor([3]))
            places.add(kept.kept[0].data_ptr())
        assert len(places) == buffers


def test_says_which_inputs_an_engine_takes_beside_those_it_keeps(tmp_path: Path) -> None:
    kept = engine_of(step(WRITTEN_LAST), tmp_path).stateful([torch.zeros(2, 8, 4)], inputs=[2], outputs=[1])
    with pytest.raises(UsageError, match=r"the engine takes rows, active; 3 tensors are given"):
        kept(rows(1), torch.tensor([3]), torch.zeros(2, 8, 4))
    with pytest.raises(
        UsageError, match=r"takes %rows as tensor\(float\) \[2, 'active', 4\]; found tensor\(double\) \[2, 1, 4\]"
    ):
        kept(rows(1).double(), torch.tensor([3]))
    with pytest.raises(UsageError, match=r"found tensor\(float\) \[2, 4\]"):
        kept(rows(1)[:, 0], torch.tensor([3]))
    assert "ONNX Runtime" in kept.device
