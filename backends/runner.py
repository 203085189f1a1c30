"""Run an engine: as the velocity function of a sampler, against the clock, and into a video file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.by_step import at_step
from intarsia.backends.phases import StepRange
from intarsia.backends.writing import new_file
from intarsia.ir.errors import MissingEnvironment, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES

SMALLEST_SIDE = 128
"""Pixels below which a video is enlarged by a whole factor, so that a person sees it."""


def denoiser(engine: Callable[..., tuple[Tensor, ...]], graph: Graph) -> Callable[..., Tensor]:
    """The engine as a sampler calls it: tensors (N, ...) by the names of the graph's inputs in, its first output out.

    An engine of a fixed batch is called as often as N rows need, the last call filled up with copies of the last row.
    Tensors are cast to the inputs' element types. UsageError if the names are not the graph's.
    """
    return denoiser_together(lambda calls: [engine(*inputs)[0] for inputs in calls], graph)


def denoiser_together(
    engine: Callable[[Sequence[tuple[Tensor, ...]]], Sequence[Tensor]], graph: Graph
) -> Callable[..., Tensor]:
    """``denoiser`` of something that is given the inputs of all calls of a step at once."""
    rows = graph.type(graph.inputs[0].name).shape[0]

    def denoise(**tensors: Tensor) -> Tensor:
        inputs = _ordered(graph, tensors)
        count = len(inputs[0])
        step = rows if isinstance(rows, int) else count
        calls = [tuple(_rows(tensor, first, step) for tensor in inputs) for first in range(0, count, step)]
        return torch.cat(list(engine(calls)))[:count]

    return denoise


def _ordered(graph: Graph, tensors: dict[str, Tensor]) -> list[Tensor]:
    names = [value.name for value in graph.inputs]
    if sorted(names) != sorted(tensors):
        raise UsageError(f"{graph.name} takes {', '.join(names)}; the sampler gives {', '.join(tensors)}")
    return [tensors[name].to(DTYPES[graph.type(name).dtype]) for name in names]


def _rows(tensor: Tensor, first: int, step: int) -> Tensor:
    part = tensor[first : first + step]
    missing = step - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part.contiguous()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the quartiles around it."""

    seconds: float
    low: float
    high: float
    repeats: int
    device: str


def bench(engine: Engine, inputs: Sequence[Tensor], *, repeats: int = 20, warmup: int = 3) -> Timing:
    """How long a call takes, from the ``repeats`` that follow ``warmup`` calls."""
    for _ in range(warmup):
        engine(*inputs)
    seconds = sorted(_seconds(engine, inputs) for _ in range(repeats))
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if repeats > 1 else seconds * 3
    return Timing(median, low, high, repeats, engine.device)


@dataclass(frozen=True)
class SegmentTiming:
    """Seconds of a segment of a step; ``once`` where it runs once for each prompt."""

    timing: Timing
    once: bool


@dataclass(frozen=True)
class LoopTiming:
    """Seconds of the calls of one phase after the other.

    Attributes:
        phases: The loop's phases; none where every call is alike.
        calls: What a call of each phase takes; of the only kind of call where there are no phases.
        segments: What each segment of a step takes; none where the engine is of one piece.
    """

    phases: tuple[StepRange, ...]
    calls: tuple[Timing, ...]
    segments: tuple[SegmentTiming, ...] = ()

    @property
    def call(self) -> Timing:
        """One call: median and quartiles, each the mean over all calls of the loop."""
        if not self.phases:
            return self.calls[0]
        steps = sum(one.steps for one in self.phases)
        mean = {
            name: sum(one.steps * getattr(call, name) for one, call in zip(self.phases, self.calls, strict=True))
            / steps
            for name in ("seconds", "low", "high")
        }
        return replace(self.calls[0], **mean)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values: those of one call, of segments, of phases, and the seconds of the whole loop."""
        segments = [{**_spread(one.timing), "once": one.once} for one in self.segments]
        found: dict[str, object] = {**asdict(self.call), **({"segments": segments} if segments else {})}
        if not self.phases:
            return found
        each = [
            {"first": one.first, "last": one.last, **_spread(call)}
            for one, call in zip(self.phases, self.calls, strict=True)
        ]
        loop = sum(one.steps * call.seconds for one, call in zip(self.phases, self.calls, strict=True))
        return {**found, "phases": each, "loop_seconds": loop}


def _spread(timing: Timing) -> dict[str, float]:
    return {"seconds": timing.seconds, "low": timing.low, "high": timing.high}


def bench_loop(
    engine: Engine, inputs: Sequence[Tensor], *, graph: Graph, phases: Sequence[StepRange] = (), repeats: int = 20
) -> LoopTiming:
    """How long a call of each phase takes; phases that run the same program are timed once.

    Without phases, one call with ``inputs``, which are in the graph's order.
    """
    if not phases:
        return LoopTiming((), (bench(engine, inputs, repeats=repeats),))
    timed = {
        program: bench(engine, at_step(inputs, graph, phases[program]), repeats=repeats)
        for program in dict.fromkeys(one.program for one in phases)
    }
    return LoopTiming(tuple(phases), tuple(timed[one.program] for one in phases))


def _seconds(engine: Engine, inputs: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    engine(*inputs)
    return time.perf_counter() - start


def write_video(video: Tensor, path: Path, *, frames_per_second: float = 8.0) -> None:
    """Write a video (3, F, H, W) in [-1, 1] as .gif, or as .mp4 where imageio's ffmpeg is installed.

    Raises:
        UsageError: Another suffix, or the folder cannot be written.
        MissingEnvironment: .mp4 without imageio[ffmpeg], or the disk is full.
    """
    writers = {".gif": _write_gif, ".mp4": _write_mp4}
    if path.suffix not in writers:
        raise UsageError(f"{path}: videos are written as {' or '.join(writers)}")
    with new_file(path) as draft:
        writers[path.suffix](_frames(video), draft, frames_per_second)


def _frames(video: Tensor) -> Tensor:
    """Pixels (F, H, W, 3), uint8, enlarged by a whole factor if they are few."""
    levels = ((video.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    factor = max(1, -(-SMALLEST_SIDE // min(levels.shape[1:3])))
    return levels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _write_gif(frames: Tensor, path: Path, frames_per_second: float) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame.numpy()) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / frames_per_second), loop=0)


def _write_mp4(frames: Tensor, path: Path, frames_per_second: float) -> None:
    if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        raise MissingEnvironment(f"{path.parent}: .mp4 needs pip install 'imageio[ffmpeg]'; or write a .gif")
    import imageio.v3 as imageio

    imageio.imwrite(path, frames.numpy(), plugin="FFMPEG", fps=frames_per_second, macro_block_size=2)
