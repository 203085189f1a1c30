from __future__ import annotations

import errno
import importlib.util
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.bundle import Bundle
from intarsia.backends.null import NullEngine
from intarsia.backends.phases import StepRange
from intarsia.backends.runner import bench, bench_loop, denoiser, write_video
from intarsia.ir.errors import MissingEnvironment, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs

DENOISER = """graph denoiser {{
  {size}
  input %hidden_states: bf16[{rows}, 3]
  input %timestep: f32[{rows}]
  %column: f32[{rows}, 1] = aten.unsqueeze(self=%timestep, dim=1)
  %velocity: f32[{rows}, 3] = aten.mul.Tensor(self=%hidden_states, other=%column)
  return %velocity
}}
"""


def engine(rows: str) -> tuple[NullEngine, Graph, list[int]]:
    graph = Graph.parse(DENOISER.format(rows=rows, size="size N in [1, inf]" if rows == "N" else ""))
    run, seen = NullEngine(Program(graph, {})), []

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        seen.append(len(inputs[0]))
        return run(*inputs)

    return call, graph, seen  # type: ignore[return-value]


@pytest.mark.parametrize(("rows", "calls"), [("2", [2, 2, 2]), ("N", [5]), ("8", [8]), ("1", [1] * 5)])
def test_an_engine_of_a_fixed_batch_is_called_as_often_as_the_rows_need(rows: str, calls: list[int]) -> None:
    call, graph, seen = engine(rows)
    states, steps = torch.arange(15.0).reshape(5, 3), torch.arange(5.0)
    velocity = denoiser(call, graph)(timestep=steps, hidden_states=states)
    assert torch.equal(velocity, states * steps[:, None])
    assert seen == calls


def test_a_sampler_for_another_model_is_told_the_inputs() -> None:
    call, graph, _ = engine("2")
    with pytest.raises(UsageError, match="denoiser takes hidden_states, timestep; the sampler gives noise"):
        denoiser(call, graph)(noise=torch.zeros(2, 3))


def test_bench_gives_median_and_quartiles(bundle: Bundle) -> None:
    timing = bench(bundle.engine(), example_inputs(bundle.graph), repeats=5, warmup=1)
    assert 0 < timing.low <= timing.seconds <= timing.high
    assert timing.repeats == 5
    assert "PyTorch" in timing.device
    assert bench(bundle.engine(), example_inputs(bundle.graph), repeats=1).seconds > 0


def test_a_video_becomes_a_gif_with_its_frames_enlarged(tmp_path: Path) -> None:
    from PIL import Image

    video = torch.full((3, 4, 32, 48), -1.0)
    video[0, 1], video[1, 2], video[2, 3] = 1.0, 1.0, 1.0
    write_video(video, tmp_path / "video.gif", frames_per_second=5)
    with Image.open(tmp_path / "video.gif") as picture:
        assert picture.n_frames == 4
        assert picture.size == (192, 128)
        assert picture.info["duration"] == 200
        picture.seek(1)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_other_suffixes_and_missing_encoders_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = torch.zeros(3, 2, 8, 8)
    with pytest.raises(UsageError, match=r"videos are written as .gif or .mp4"):
        write_video(video, tmp_path / "video.avi")
    monkeypatch.setattr("intarsia.backends.runner.find_spec", lambda name: None)
    with pytest.raises(MissingEnvironment, match=r"imageio\[ffmpeg\]"):
        write_video(video, tmp_path / "video.mp4")


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="imageio[ffmpeg] is not installed")
def test_a_video_becomes_an_mp4(tmp_path: Path) -> None:
    write_video(torch.zeros(3, 4, 32, 32), tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_a_video_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    def save(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(MissingEnvironment, match="no room on the disk"):
        write_video(torch.zeros(3, 2, 8, 8), tmp_path / "deep" / "video.gif")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_loop_is_timed_phase_by_phase_and_a_shared_program_once() -> None:
    phases = (
        StepRange(0, 0, 0, (1000.0, 1000.0)),
        StepRange(1, 3, 1, (900.0, 500.0)),
        StepRange(4, 4, 0, (100.0, 100.0)),
    )
    told: list[float] = []

    class Stepping(Engine):
        def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            told.append(float(inputs[0]))
            time.sleep(0.02 if inputs[0] == 1000 else 0.001)
            return inputs

        @property
        def device(self) -> str:
            return "a clock"

    graph = Graph.parse("graph g {\n input %timestep: f32[1]\n %y: f32[1] = aten.relu(self=%timestep)\n return %y\n}")
    timing = bench_loop(Stepping(), (torch.zeros(1),), graph=graph, phases=phases, repeats=2)
    facts = timing.to_json()
    seconds = [one["seconds"] for one in facts["phases"]]  # type: ignore[attr-defined]
    assert sorted(set(told)) == [900.0, 1000.0]
    assert seconds[0] == seconds[2] >= 0.02
    assert facts["loop_seconds"] == pytest.approx(2 * seconds[0] + 3 * seconds[1])
    assert facts["seconds"] == pytest.approx(facts["loop_seconds"] / 5)  # type: ignore[operator]
