"""``intarsia calibrate``: data in every form, the plan it writes, and data that is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.calibration_data import Scaling, batches
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import save_weights
from intarsia.ir.target import load_target
from intarsia.passes.apply import apply

from .conftest import Run

GRAPH = Graph.parse("""graph small {
  input %x: f32[1, 3, 8, 8]
  param %w: f32[4, 3, 3, 3]
  %c: f32[1, 4, 6, 6] = aten.conv2d(input=%x, weight=%w, bias=None)
  %r: f32[1, 4, 6, 6] = aten.relu(self=%c)
  return %r
}""")

PLAIN = Scaling((0.0,), (1.0,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures and one array, all of one colour."""
    found = tmp_path / "data"
    found.mkdir()
    for name, level in (("a.png", 51), ("b.jpg", 204)):
        Image.new("RGB", (20, 10), (level, level, level)).save(found / name)
    np.save(found / "c.npy", np.full((3, 8, 8), -2.0))
    (found / "notes.txt").write_text("not data")
    return found


def test_a_folder_is_pictures_and_arrays_in_the_order_of_their_names(folder: Path) -> None:
    found = [float(x.mean()) for (x,) in batches(str(folder), GRAPH, samples=9, scaling=PLAIN)]
    assert found == pytest.approx([0.2, 0.8, -2.0], abs=0.01)
    scaled = [float(x.mean()) for (x,) in batches(str(folder), GRAPH, samples=1, scaling=Scaling())]
    assert scaled == pytest.approx([-0.6])


def test_pictures_take_the_inputs_size_and_each_channel_its_own_scale(folder: Path) -> None:
    scaling = Scaling((0.0, 0.1, 0.2), (1.0, 1.0, 0.5))
    ((x,),) = batches(str(folder), GRAPH, samples=1, scaling=scaling)
    assert x.shape == (1, 3, 8, 8)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.2, 0.1, 0.0], abs=1e-6)


def test_one_file_holds_samples_along_its_first_axis(tmp_path: Path) -> None:
    numbers = np.arange(3 * 192, dtype=np.float64).reshape(3, 3, 8, 8)
    np.save(tmp_path / "x.npy", numbers)
    np.savez(tmp_path / "x.npz", x=numbers, other=numbers)
    for file in ("x.npy", "x.npz"):
        found = list(batches(str(tmp_path / file), GRAPH, samples=2, scaling=PLAIN))
        assert len(found) == 2
        assert np.array_equal(found[1][0][0].numpy(), numbers[1].astype(np.float32))


def test_a_function_yields_tensors_or_tuples_of_them(tmp_path: Path) -> None:
    loader = tmp_path / "loader.py"
    lines = ("import torch", "def data():", "    yield torch.ones(3, 8, 8)", "    yield (torch.ones(1, 3, 8, 8),)")
    loader.write_text("\n".join(lines))
    found = list(batches(f"{loader}:data", GRAPH, samples=5, scaling=PLAIN))
    assert [x.shape for (x,) in found] == [(1, 3, 8, 8)] * 2


def test_the_plan_holds_the_ranges_and_applies(tmp_path: Path, folder: Path, intarsia: Run) -> None:
    (tmp_path / "small.graph").write_text(str(GRAPH))
    weights = {"w": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))}
    save_weights(weights, tmp_path / "small.safetensors")
    plan = tmp_path / "plan.json"
    graph = tmp_path / "small.graph"
    told = intarsia("calibrate", graph, "--data", folder, "--target", "cpu-avx2", "-o", plan, "--json")
    ranges = json.loads(told.stdout)["ranges"]
    assert set(ranges) == {"x", "r"}
    assert ranges["x"] == pytest.approx([-0.6, -0.6 + 0.01 * 1.2 + 0.99 * 0.01 * -1.4], abs=0.05)
    marked = apply(Plan.from_json(plan.read_text()), GRAPH, load_target("cpu-avx2"))
    assert [node.name for node in marked.find("intarsia.calibrated")] == ["x.calibrated", "r.calibrated"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty", None, "holds no .npy, .npz, .png"),
        ("absent", "", "expected a folder, an .npy or .npz file, or loader.py:function"),
        ("x.npy", np.zeros((2, 3, 9, 8)), "sample 0: x is (3, 9, 8); the graph takes f32[1, 3, 8, 8]"),
        ("x.npy", np.zeros(()), "the first axis is samples"),
        ("x.npy", b"not numbers", "cannot be read as arrays"),
        ("x.npz", {"y": np.zeros((2, 3, 8, 8))}, "holds y; the graph's 'x' is missing"),
        ("loader.py:data", "def data():\n    return 3\n", "it returns int; expected an iterable of tensors"),
        ("loader.py:other", "def data():\n    return []\n", "defines no function called other"),
        ("loader.py:data", "def data(:\n", "cannot be imported"),
    ],
)
def test_data_that_is_none_is_told_in_one_line(name: str, content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / name.partition(":")[0]
    if content is None:
        path.mkdir()
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.write_text(str(content))
    with pytest.raises(UsageError) as caught:
        list(batches(str(tmp_path / name), GRAPH, samples=2, scaling=PLAIN))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
