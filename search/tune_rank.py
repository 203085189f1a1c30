"""How long a launch takes by its tile, from first principles: a ranking of candidates, not a measurement."""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.ir.target import Target
from intarsia.kernels.ahead import REGISTERS, SHARED_BYTES
from intarsia.kernels.tiling import Footprint, Tile, blocks
from intarsia.search.roofline import peak
from intarsia.search.tune_problem import Problem

MULTIPROCESSORS: Mapping[str, int] = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Of A100, L40S, H100 SXM and H200 SXM, B200 (NVIDIA's white papers and data sheets), MI300X (AMD's data sheet)."""

L2_OVER_MEMORY = 4.6
"""Bytes from the second-level cache for one of memory. A100 white paper: 5,120 B a clock at 1.41 GHz; 1,555 GB/s."""

LATENCY = 0.3e-6
"""Seconds until a number from memory is there: some 480 clocks on H100 (Luo et al., arXiv 2402.13499) at 1.6 GHz."""

THREADS = 2048
"""Threads that a multiprocessor holds at most. CUDA C++ programming guide, compute capabilities 8.0 and 9.0."""

KEPT = 200
"""Numbers of a thread's 255 registers that may hold sums; what is left holds operands and addresses. An estimate."""


def predicted(problem: Problem, tile: Tile, target: Target) -> float:
    """Seconds: launch + the longest of computing, moving and waiting on the multiprocessor with the most programs.

    Programs are spread evenly; what is computed or read beyond the edge of a tensor counts. Tiles are read through the
    second-level cache, rows from memory. A step of a loop waits for memory unless as many stages are under way.
    """
    foot = problem.footprint(tile)
    units = MULTIPROCESSORS[target.architecture]
    programs = blocks(foot.programs, units)
    together = min(programs, _resident(foot, tile, target.architecture))
    bandwidth = target.bandwidth * (L2_OVER_MEMORY if foot.steps > 1 else 1.0)
    computing = programs * foot.flops * units / peak(target, foot.dtype)
    moving = programs * foot.bytes * units / bandwidth
    waiting = blocks(programs, together) * foot.steps * LATENCY / tile.get("stages", 1)
    return target.launch + max(computing, moving, waiting)


def ranked(problem: Problem, target: Target) -> list[dict[str, int]]:
    """All tiles of the problem: the default, then the others, those first that are likely to fit and then fast."""
    default, *others = problem.space(target.architecture).tiles()

    def order(tile: Tile) -> tuple[bool, float]:
        return _unlikely(problem.footprint(tile), tile, target.architecture), predicted(problem, tile, target)

    return [default, *sorted(others, key=order)]


def _resident(foot: Footprint, tile: Tile, architecture: str) -> int:
    """Programs that a multiprocessor runs at a time."""
    by_memory = SHARED_BYTES[architecture] // foot.shared if foot.shared else THREADS
    by_registers = KEPT * REGISTERS // 256 // foot.kept if foot.kept else THREADS
    return max(1, min(by_memory, by_registers, THREADS // (32 * tile["warps"])))


def _unlikely(foot: Footprint, tile: Tile, architecture: str) -> bool:
    """Whether shared memory or registers will hardly do; the compiler has the last word."""
    return foot.shared > SHARED_BYTES[architecture] or foot.kept > KEPT * 32 * tile["warps"]
