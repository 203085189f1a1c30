"""``intarsia calibrate``: data in every form, the plan it writes, and data that is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from intarsia.calibration_data import read
from intarsia.calibration_files import Scaling
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, save_weights
from intarsia.ir.target import load_target
from intarsia.passes.apply import apply

from .conftest import Run

GRAPH = Graph.parse("""graph small {
  input %x: f32[1, 3, 8, 8]
  param %w: f32[4, 3, 3, 3]
  param %m: f32[4]
  param %v: f32[4]
  %c: f32[1, 4, 6, 6] = aten.conv2d(input=%x, weight=%w, bias=None)
  %n: f32[1, 4, 6, 6] = aten.batch_norm(input=%c, weight=None, bias=None, running_mean=%m, running_var=%v, training=False, momentum=0.1, eps=0.001, cudnn_enabled=True)
  %r: f32[1, 4, 6, 6] = aten.relu(self=%n)
  return %r
}""")  # noqa: E501

DENOISER = Graph.parse("""graph denoiser {
  size N in [1, inf]
  size T in [2, 8]
  input %x: f32[N, T, 4]
  input %step: i64[N]
  param %w: f32[4, 4]
  %y: f32[N, T, 4] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}""")

PLAIN = Scaling((0.0,), (1.0,))

Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them in a folder of its class, and an array, each of one colour."""
    found = tmp_path / "data"
    (found / "cats").mkdir(parents=True)
    for name, level in (("a.png", 51), ("cats/b.bmp", 204), (".thumbnail.png", 255)):
        Image.new("RGB", (20, 10), (level, level, level)).save(found / name)
    np.save(found / "z.npy", np.full((3, 8, 8), -2.0))
    (found / "notes.txt").write_text("not data")
    return found


@pytest.fixture
def small() -> Path:
    """The network on disk: channel 2 is dead, and the norm shifts what the others give."""
    path = Path("small.graph")
    path.write_text(str(GRAPH))
    weights = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weights[2] = 0.0
    save_weights(
        {"w": weights, "m": torch.full((4,), -3.0), "v": torch.full((4,), 0.25)}, path.with_suffix(".safetensors")
    )
    return path


def means(data: object, scaling: Scaling | None = PLAIN, **wishes: int) -> list[float]:
    return [float(x.mean()) for (x,) in read(str(data), GRAPH, limit=9, scaling=scaling, **wishes)]


def test_a_folder_is_pictures_and_arrays_in_the_order_of_their_paths(folder: Path) -> None:
    assert means(folder) == pytest.approx([0.2, 0.8, -2.0])
    assert means(folder, Scaling((0.5,), (0.5,))) == pytest.approx([-0.6, 0.6, -2.0])


def test_channels_have_their_own_scale(folder: Path) -> None:
    (x,) = next(iter(read(str(folder), GRAPH, limit=9, scaling=Scaling((0.0, 0.1, 0.2), (1.0, 1.0, 0.5)))))
    assert x.shape == (1, 3, 8, 8)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.2, 0.1, 0.0], abs=1e-6)


def test_a_picture_of_the_inputs_size_is_taken_as_it_is_and_the_middle_of_a_larger_one(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    wide = np.full((16, 64), 255, dtype=np.uint8)
    wide[:, 20:44] = 102
    Image.fromarray(wide).save(tmp_path / "b.png")
    exact, middle = (x for (x,) in read(str(tmp_path), GRAPH, limit=2, scaling=PLAIN))
    assert torch.equal((exact[0, 1] * 255).round(), torch.from_numpy(levels).float())
    assert middle.unique().tolist() == pytest.approx([0.4])


def test_of_more_samples_so_many_are_drawn_as_are_asked_for_and_alike_for_one_seed(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100.0)[:, None, None, None] * np.ones((1, 3, 8, 8)))

    def drawn(seed: int) -> list[float]:
        return [float(x.mean()) for (x,) in read(str(tmp_path / "x.npy"), GRAPH, limit=10, seed=seed)]

    assert len(set(drawn(0))) == 10
    assert drawn(0) == sorted(drawn(0)) == drawn(0) != drawn(1)


def test_one_file_holds_samples_along_its_first_axis(tmp_path: Path) -> None:
    numbers = np.arange(3 * 192, dtype=">f8").reshape(3, 3, 8, 8)
    np.save(tmp_path / "x.npy", numbers)
    np.savez(tmp_path / "x.npz", x=numbers, other=numbers)
    np.savez(tmp_path / "alone.npz", numbers)
    for file in ("x.npy", "x.npz", "alone.npz"):
        batches = read(str(tmp_path / file), GRAPH, limit=9)
        found = [x for (x,) in batches]
        assert len(found) == batches.total == 3
        assert np.array_equal(found[1][0].numpy(), numbers[1].astype(np.float32))


def test_several_inputs_come_by_name_and_as_many_samples_a_call_as_the_graph_takes(tmp_path: Path) -> None:
    x, step = np.random.default_rng(0).standard_normal((21, 3, 4)), np.arange(21)
    np.savez(tmp_path / "data.npz", step=step, x=x)
    batches = read(str(tmp_path / "data.npz"), DENOISER, limit=99)
    assert [one.shape for call in batches for one in call] == [(16, 3, 4), (16,), (5, 3, 4), (5,)]
    pairs = Graph.parse(str(DENOISER).replace("N, ", "2, ").replace("[N]", "[2]").replace("  size N in [1, inf]\n", ""))
    found = list(read(str(tmp_path / "data.npz"), pairs, limit=99))
    assert len(found) == 10
    assert torch.cat([steps for _, steps in found]).tolist() == list(range(20))


def test_a_function_yields_the_inputs_of_calls(tmp_path: Path) -> None:
    loader = tmp_path / "loader.py"
    lines = ("import torch", "def data():", "    while True:", "        yield torch.rand(3, 8, 8)")
    loader.write_text("\n".join([*lines, "        yield (torch.rand(1, 3, 8, 8).double(),)"]))
    found = list(read(f"{loader}:data", GRAPH, limit=5))
    assert [(x.shape, x.dtype) for (x,) in found] == [((1, 3, 8, 8), torch.float32)] * 5


def test_the_plan_holds_the_ranges_behind_the_norm_and_applies(folder: Path, small: Path, intarsia: Run) -> None:
    words = ("calibrate", small, "--data", folder, "--mean", "0.5", "--std", "0.5", "--method", "minmax(widest=True)")
    told = intarsia(*words, "-o", "plan.json", "--json")
    assert told.exit_code == 0, told.stderr
    facts = json.loads(told.stdout)
    assert facts["samples"] == 3
    assert facts["ranges"]["x"] == pytest.approx([-2.0, 0.6])
    plan = Plan.load(Path("plan.json"))
    assert [step.run for step in plan.phases[0].steps] == ["fold-batch-norm", "calibrate"]
    marked = apply(plan, GRAPH, load_target("cpu-avx2"))
    assert [node.name for node in marked.find("intarsia.calibrated")] == ["x.calibrated", "r.calibrated"]

    from safetensors.torch import load_file

    weights = load_file(small.with_suffix(".safetensors"))
    calls = read(str(folder), GRAPH, limit=3, scaling=Scaling((0.5,), (0.5,)))
    given = [Program(GRAPH, weights).module()(*call)[0] for call in calls]
    assert facts["ranges"]["r"][1] == pytest.approx(max(float(r.max()) for r in given), rel=1e-5)
    assert f"reproduce: intarsia calibrate small.graph --data {folder}" in told.stderr


def test_a_person_gets_a_table_and_dead_channels_are_warned_of(folder: Path, small: Path, intarsia: Run) -> None:
    told = intarsia("calibrate", small, "--data", folder, "--mean", "0", "--std", "1", "-o", "plan.json")
    assert told.stdout.splitlines()[0].split() == ["value", "lowest", "highest"]
    assert told.stdout.splitlines()[-1] == "plan.json: 2 ranges, from 3 samples"
    assert "warning: %n: the weights of 1 of 4 channels are all zero: dead channels 2\n" in told.stderr


def array(*shape: int, fill: float | None = None, kind: str = "f4") -> np.ndarray:
    numbers = np.random.default_rng(0).standard_normal(shape) if fill is None else np.full(shape, fill)
    return numbers.astype(kind)


def picture(path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(path)


LOADER = "import torch\ndef data():\n    yield torch.rand(3, 8, 8)\n    "


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty/", None, "holds no .npy, .npz, .png"),
        ("absent", None, "there is no such file or folder"),
        ("notes.txt", "not data", "expected a folder, an .npy or .npz file, or loader.py:function"),
        ("x.npy", array(2, 3, 9, 8), "x.npy, sample 0: x is (3, 9, 8); the graph takes f32[1, 3, 8, 8]"),
        ("x.npy", array(2, 192), "x is (2, 192); the graph takes f32[1, 3, 8, 8]"),
        ("x.npy", array(), "the first axis is samples, at least one"),
        ("x.npy", array(0, 3, 8, 8), "the first axis is samples, at least one"),
        ("x.npy", b"not numbers", "x.npy: cannot be read as arrays"),
        ("x.npy", np.array([{}]), "x.npy: cannot be read as arrays"),
        ("x.npy", np.full((1, 3, 8, 8), "a"), "x.npy, sample 0, x: holds <U1, no numbers"),
        (
            "x.npy",
            array(1, 3, 8, 8, kind="u1"),
            "x holds uint8; the graph takes f32[1, 3, 8, 8], as the network reads it",
        ),
        ("x.npy", array(1, 3, 8, 8, fill=np.nan), "x.npy, sample 0: x holds NaN; leave that sample out, or mend it"),
        ("x.npy", array(4, 3, 8, 8, fill=0.5), "every number of it is 0.5; give samples like those of its use"),
        ("x.npz", {"y": array(2, 3, 8, 8), "z": array(2)}, "holds y, z; the graph takes x: x is missing"),
        ("folder/a.png", b"\x89PNG no picture", "a.png: cannot be read as a picture"),
        ("folder/a.png", "I;16", "a.png: has more than 8 bits a channel"),
        ("loader.py:data", "def data():\n    return 3\n", "it returns int; expected an iterable of tensors"),
        ("loader.py:other", "def data():\n    return []\n", "defines no function called other"),
        ("loader.py:data", "def data(:\n", "cannot be imported"),
        ("loader.py:data", f"{LOADER}raise KeyError('cat')\n", "loader.py:data: it raised KeyError: 'cat'"),
        ("loader.py:data", f"{LOADER}yield 'cat'\n", "item 1: is str; expected a tensor, or a tuple of tensors"),
        ("loader.py:data", f"{LOADER}yield (torch.rand(3, 8, 8),) * 2\n", "item 1: has 2 tensors; the graph takes 1"),
        ("loader.py:data", f"{LOADER}yield torch.rand(2, 3, 8, 8)\n", "item 1: x is (2, 3, 8, 8); the graph takes"),
    ],
)
def test_data_that_is_none_is_told_in_one_line(name: str, content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / name.partition(":")[0]
    path.parent.mkdir(exist_ok=True)
    writers: dict[type, Callable[..., object]] = {
        np.ndarray: lambda: np.save(path, content, allow_pickle=True),  # type: ignore[arg-type]
        dict: lambda: np.savez(path, **content),  # type: ignore[arg-type]
        bytes: lambda: path.write_bytes(content),  # type: ignore[arg-type]
        str: lambda: picture(path, str(content)) if path.suffix == ".png" else path.write_text(str(content)),
        type(None): lambda: path.mkdir() if name.endswith("/") else None,
    }
    writers[type(content)]()
    data = path.parent if path.parent.name == "folder" else f"{tmp_path}/{name}"
    with pytest.raises(UsageError) as caught:
        list(read(str(data), GRAPH, limit=4, scaling=PLAIN))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"x": (3, 9, 4), "step": (3,)}, "T is 9; the graph takes T in [2, 8]"),
        ({"x": (3, 4, 4), "step": (2,)}, "its arrays are (3, 4, 4), (2,); the first axis is samples"),
        ({"x": (3, 4, 4), "t": (3,)}, "holds x, t; the graph takes x, step: step is missing"),
    ],
)
def test_arrays_that_do_not_fit_together_are_told_in_one_line(
    shapes: dict[str, tuple[int, ...]], said: str, tmp_path: Path
) -> None:
    kinds = {"x": "f4", "t": "f4", "step": "i8"}
    np.savez(tmp_path / "x.npz", **{name: array(*shape, kind=kinds[name]) for name, shape in shapes.items()})
    with pytest.raises(UsageError) as caught:
        list(read(str(tmp_path / "x.npz"), DENOISER, limit=4))
    assert said in str(caught.value)


def test_one_array_for_two_inputs_is_told_in_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array(3, 4, 4))
    with pytest.raises(UsageError) as caught:
        read(str(tmp_path / "x.npy"), DENOISER, limit=4)
    assert "x.npy: holds one array; the graph takes x, step: use .npz with arrays of these names" in str(caught.value)


def test_pictures_need_a_scale_and_a_network_that_reads_them(folder: Path) -> None:
    for graph, scaling, said in (
        (GRAPH, None, "a.png: say how the network reads pictures: --mean 0.5 --std 0.5 for numbers from -1 to 1"),
        (GRAPH, Scaling((0.0, 0.0), (1.0,)), "--mean and --std have 2 and 1 numbers; 1 or 3"),
        (DENOISER, PLAIN, "a.png: the graph takes f32[N, T, 4], i64[N]; pictures are for one input"),
    ):
        (folder / "z.npy").unlink(missing_ok=True)
        with pytest.raises(UsageError) as caught:
            list(read(str(folder), graph, limit=9, scaling=scaling))
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mean", "0.5"], "--std is missing"),
        (["--mean", "half", "--std", "1"], "--mean 'half': expected numbers such as 0.485,0.456,0.406"),
        (["--mean", "0", "--std", "0"], "--std 0.0: every number is above 0"),
        (["--method", "max"], "method 'max' is unknown. Known: minmax, percentile, mse"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_wrong_options_end_with_code_2_and_no_plan(words: list[str], said: str, small: Path, intarsia: Run) -> None:
    told = intarsia("calibrate", small, "--data", "data", "-o", "plan.json", *words)
    assert (told.exit_code, told.stdout) == (2, "")
    assert said in told.stderr
    assert not Path("plan.json").exists()
