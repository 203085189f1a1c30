"""What finds out about a candidate: processes that compile, compare and time it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from intarsia.ir.errors import Unsupported
from intarsia.kernels.ahead import ARCHITECTURES
from intarsia.kernels.tiling import Tile
from intarsia.search.tune_problem import Problem
from intarsia.search.tune_worker import TaskFailed, Worker

TIMEOUT = 180.0
"""Seconds after which a task is given up; the slowest compilations take twelve."""

TOLERANCE: Mapping[str, float] = {"f32": 1e-5, "f16": 2e-3, "bf16": 1.5e-2}
"""Largest difference from the reference relative to its largest number; integers have none."""


class Laboratory(Protocol):
    """What tuning asks about candidates."""

    @property
    def clock(self) -> str | None:
        """The device on which candidates are timed; None where they are only ranked."""

    def compiled(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        """What the code uses, and why it is refused, ``refused``, empty if it is not."""

    def error(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        """Relative ``error`` against the reference, and what it was ``checked`` with; ``refused`` as above."""

    def seconds(self, problem: Problem, tiles: Sequence[Tile]) -> tuple[float, ...]:
        """Median seconds with each tile, timed in turn; only with a clock."""


class Workshop:
    """A laboratory for an architecture: compiles for it here, times on a GPU of it if there is one."""

    def __init__(self, architecture: str) -> None:
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise Unsupported(f"{architecture} is no GPU that kernels are compiled for ({known})")
        self._architecture = architecture
        self._compiler = Worker(interpreted=False, timeout=TIMEOUT)
        self._interpreter = Worker(interpreted=True, timeout=TIMEOUT)
        found = self._compiler.ask("device")
        self._device = found["name"] if found and found["architecture"] == architecture else None

    @property
    def clock(self) -> str | None:
        """The GPU's name; None without one, or with one of another architecture."""
        return self._device

    def compiled(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        """Compiled ahead of time; a candidate on which the compiler fails is refused with what it said."""
        try:
            found: dict[str, Any] = self._compiler.ask(
                "compiled", problem=asdict(problem), tile=dict(tile), architecture=self._architecture
            )
        except TaskFailed as failure:
            return {"refused": f"does not compile: {failure}"}
        return found

    def error(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        """On the GPU that times, else in Triton's interpreter."""
        worker = self._compiler if self.clock else self._interpreter
        try:
            found: dict[str, Any] = worker.ask("error", problem=asdict(problem), tile=dict(tile))
        except TaskFailed as failure:
            return {"refused": f"does not run: {failure}"}
        return {**found, "refused": inaccurate(found["error"], problem.dtype)}

    def seconds(self, problem: Problem, tiles: Sequence[Tile]) -> tuple[float, ...]:
        """By CUDA's events; TaskFailed if a launch fails."""
        return tuple(self._compiler.ask("seconds", problem=asdict(problem), tiles=[dict(tile) for tile in tiles]))

    def close(self) -> None:
        """End the processes."""
        self._compiler.close()
        self._interpreter.close()


def inaccurate(error: float, dtype: str) -> str:
    """Why the error is too large; empty if it is not."""
    allowed = TOLERANCE.get(dtype, 0.0)
    return "" if error <= allowed else f"error {error:.2g} is above {allowed:.2g}"
