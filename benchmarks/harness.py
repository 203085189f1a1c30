"""What every benchmark shares: its command line, honest ratios, peak memory, one JSON document and a table."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "intarsia",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "diffusers",
    "transformers",
    "triton",
    "apache-tvm",
    "tensorrt-rtx-cu13",
)

Figures = Mapping[str, float]
"""What was measured, by key; the key's ending is its unit, a key without one is a count or a ratio."""


def main(name: str, meanings: Mapping[str, str], measure: Callable[[bool], Figures]) -> None:
    """Measure, print a table for people, and write JSON where ``--json`` asks for it.

    Args:
        name: The script's name.
        meanings: Every key that ``measure`` gives, in the order of the table, and what it is.
        measure: Gives the figures; its argument says whether to be quick, with fewer repetitions and samples.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and samples")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - is standard output")
    options = parser.parse_args()
    figures = dict(measure(options.quick))
    if figures.keys() != meanings.keys():
        raise SystemExit(f"{name}: measured {sorted(figures)}, announced {sorted(meanings)}")
    print(table({key: figures[key] for key in meanings}, meanings), file=sys.stderr)
    text = json.dumps(document(name, figures), indent=2) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
    elif options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(text)


def document(name: str, figures: Figures) -> dict[str, object]:
    """The figures with what they were measured on, with what, and when."""
    return {
        "name": name,
        "device": device(),
        "versions": {"python": platform.python_version(), **versions()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "figures": dict(figures),
    }


def table(figures: Figures, meanings: Mapping[str, str]) -> str:
    """One line for each figure: key, value in four digits, what it is."""
    width = max(map(len, figures))
    return "\n".join(f"{key:{width}}  {value:>14,.5g}  {meanings[key]}" for key, value in figures.items())


@dataclass(frozen=True)
class Pair:
    """Two things timed in turns.

    Attributes:
        ratio: Seconds of the first over seconds of the second, the median over the rounds.
        first: Median seconds of the first.
        second: Median seconds of the second.
    """

    ratio: float
    first: float
    second: float


def paired(first: Callable[[], object], second: Callable[[], object], *, rounds: int, warmup: int = 3) -> Pair:
    """Time A B A B ..., so that whatever slows the machine slows both; the ratio is taken round by round."""
    seconds = in_turns({"first": first, "second": second}, rounds=rounds, warmup=warmup)
    return Pair(
        ratio(seconds, "first", "second"), statistics.median(seconds["first"]), statistics.median(seconds["second"])
    )


def in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3
) -> Mapping[str, Sequence[float]]:
    """Seconds of each call, round by round: A B C A B C ..., so that whatever slows the machine slows all."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_seconds(call))
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """Seconds of the first over seconds of the second, the median over the rounds of ``in_turns``."""
    return statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))


def median_seconds(call: Callable[[], object], *, rounds: int) -> float:
    """Median seconds of one call."""
    return statistics.median(_seconds(call) for _ in range(rounds))


def _seconds(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def require_gpu(name: str) -> None:
    """Leave with one line and exit code 6 unless torch can use a GPU."""
    import torch

    if not torch.cuda.is_available():
        print(f"{name}: needs a CUDA device, and torch sees none", file=sys.stderr)
        raise SystemExit(6)


def launched(call: Callable[[], object], *, times: int) -> Callable[[], None]:
    """So many calls that only start work on the GPU, one after another, and the wait for the last."""
    import torch

    def calls() -> None:
        for _ in range(times):
            call()
        torch.cuda.synchronize()

    return calls


def peak_flops() -> float:
    """FLOP/s of the largest bf16 matrix product that nothing but tensor cores limits: 8,192 cubed, by cuBLAS."""
    import torch

    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = launched(lambda: one @ other, times=20)
    product()
    return 20 * 2 * 8192**3 / median_seconds(product, rounds=9)


@dataclass(frozen=True)
class Alone:
    """What a function gave in a process of its own, how long it took, and the most memory that the process held."""

    result: Any
    seconds: float
    peak_bytes: int


def alone(function: Callable[..., Any], *args: object) -> Alone:
    """Run a module-level function in a fresh process; its imports count, the interpreter's start does not."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, function, args).result()


def _alone(function: Callable[..., Any], args: tuple[object, ...]) -> Alone:
    start = time.perf_counter()
    result = function(*args)
    return Alone(result, time.perf_counter() - start, _peak_bytes())


def _peak_bytes() -> int:
    """Linux's own count where there is one: getrusage keeps the parent's peak across fork and exec."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device() -> str:
    """Processor and cores, and the GPU if torch can use one."""
    import torch

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
