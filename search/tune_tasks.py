"""What is done with a candidate in a process of its own: compiled, compared with the reference, timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from intarsia import kernels
from intarsia.kernels import launch
from intarsia.kernels.ahead import compile_launch, does_not_fit
from intarsia.kernels.tiling import Draw, Shape, Tile, require_tiling
from intarsia.search.tune_problem import Problem

LAUNCHES = 10
"""Launches that are recorded as one CUDA graph and timed together, so that Python is not timed with them."""

ROUNDS = 15
"""Times that each candidate of a measurement is timed, in turn with the others."""


def device() -> dict[str, str] | None:
    """Name and architecture of the first GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return {"name": torch.cuda.get_device_name(0), "architecture": launch.architecture_of(torch.device("cuda", 0))}


def compiled(problem: Problem, tile: Tile, architecture: str) -> dict[str, Any]:
    """What the code uses; with ``refused`` if it spills or cannot run."""
    made = compile_launch(problem.launch(architecture, tile), architecture)
    facts = {"registers": made.registers, "spills": made.spills, "shared_bytes": made.shared_bytes}
    threads = made.warps * made.threads_per_warp
    reason = does_not_fit(architecture, shared_bytes=made.shared_bytes, registers=made.registers, threads=threads)
    if reason is None and made.spills:
        reason = f"spills {made.spills} {'registers' if architecture.startswith('gfx') else 'bytes'} of a thread"
    return {**facts, "refused": reason or ""}


def error(problem: Problem, tile: Tile) -> dict[str, Any]:
    """The largest difference from the reference, relative to the largest number, and what it was checked with.

    On a GPU at a small ragged shape, and from the default tile's answer at the problem's own; elsewhere at the small
    shape in Triton's interpreter, which multiplies bf16 wrongly, so that f16 stands for it.
    """
    kernels.register()
    tiling = require_tiling(problem.op)
    small = tiling.small(tile, problem.shape)
    if not torch.cuda.is_available():
        dtype = "f16" if problem.dtype == "bf16" else problem.dtype
        return {"error": _difference(problem.op, small, tile, Draw(dtype, "cpu")), "checked": _checked(small, dtype)}
    draw = Draw(problem.dtype, "cuda")
    found = _difference(problem.op, small, tile, draw)
    arguments = tiling.example(problem.shape, draw)
    whole = _relative(launch.run(problem.op, arguments, tile), launch.run(problem.op, arguments))
    return {"error": max(found, whole), "checked": f"{torch.cuda.get_device_name(0)}, small and whole shape"}


def seconds(problem: Problem, tiles: Sequence[Tile]) -> list[float]:
    """Median seconds of one launch with each tile on the GPU, timed in turn."""
    kernels.register()
    arguments = require_tiling(problem.op).example(problem.shape, Draw(problem.dtype, "cuda"))
    recordings = [_recorded(problem, tile, arguments) for tile in tiles]
    times: list[list[float]] = [[] for _ in tiles]
    for _ in range(ROUNDS):
        for recording, taken in zip(recordings, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            recording.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000 / LAUNCHES)
    return [median(taken) for taken in times]


def _recorded(problem: Problem, tile: Tile, arguments: Mapping[str, Any]) -> torch.cuda.CUDAGraph:
    """``LAUNCHES`` launches, compiled and run once before they are recorded."""
    place = torch.device("cuda", 0)
    how = problem.launch(launch.architecture_of(place), tile)
    operands = launch.prepare(how, {name: one for name, one in arguments.items() if isinstance(one, Tensor)})
    tensors = {**operands, **launch.allocate(how, {}, place)}
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        launch.start(how, tensors, {})
    torch.cuda.current_stream().wait_stream(aside)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        for _ in range(LAUNCHES):
            launch.start(how, tensors, {})
    recording.replay()
    return recording


def _difference(op: str, shape: Shape, tile: Tile, draw: Draw) -> float:
    arguments = require_tiling(op).example(shape, draw)
    return _relative(launch.run(op, arguments, tile), kernels.operators()[op].REFERENCES[op](**arguments))


def _relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype or not found.isfinite().all():
        return float("inf")
    largest = float(expected.double().abs().max()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / largest


def _checked(shape: Shape, dtype: str) -> str:
    extents = " ".join(f"{name}={extent}" for name, extent in shape.items())
    return f"Triton's interpreter, {dtype}, {extents}"
