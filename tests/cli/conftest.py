"""A small network on disk, a bundle made by hand, and the command line in this process or in one of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from intarsia.cli import app
from intarsia.ir.graph import Graph
from intarsia.ir.program import save_weights

TINY = """\
graph tiny {
  input %x: f32[4, 64]
  param %blocks.0.weight: f32[64, 64]
  param %blocks.0.bias: f32[64]
  param %blocks.1.weight: f32[64, 64]
  param %blocks.1.bias: f32[64]
  %blocks.0.linear: f32[4, 64] = aten.linear(input=%x, weight=%blocks.0.weight, bias=%blocks.0.bias)
  %relu: f32[4, 64] = aten.relu(self=%blocks.0.linear)
  %blocks.1.linear: f32[4, 64] = aten.linear(input=%relu, weight=%blocks.1.weight, bias=%blocks.1.bias)
  return %blocks.1.linear
}
"""

Run = Callable[..., Result]

OPTIONS = ("keep", "i8", "i4(group=32)", "i4(group=64)", "i4(group=128)")
KINDS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "ffn.net.0.proj",
    "ffn.net.2",
)
RUN = "quantize-linear"


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a folder of its own, with a cache of its own."""
    monkeypatch.setenv("INTARSIA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("INTARSIA_DEBUG", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def tiny() -> Path:
    """Two layers of 64 features, as a graph with weights."""
    path = Path("tiny.graph")
    path.write_text(TINY)
    generator = torch.Generator().manual_seed(0)
    weights = {value.name: torch.randn(value.type.shape, generator=generator) / 8 for value in Graph.parse(TINY).params}  # type: ignore[union-attr]
    save_weights(weights, path.with_suffix(".safetensors"))
    return path


@pytest.fixture
def intarsia() -> Run:
    """``intarsia("list", "targets")``: the verb in this process, with exit code, stdout and stderr."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def optimized(tiny: Path, intarsia: Run) -> Path:
    """A bundle of the small network."""
    result = intarsia("optimize", tiny, "--target", "null", "--quality", "psnr>=30", "--backend", "null", "-o", "out")
    assert result.exit_code == 0, result.stderr
    return Path("out")


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """``start("verify", "out", before="...")``: the verb in a process of its own, after some Python."""
    return _start


@pytest.fixture
def handmade(tmp_path: Path) -> Callable[..., Path]:
    """``handmade(blocks=6, frames=True)``: a bundle's files as a report reads them, of an imaginary wan-mini."""
    return lambda **wishes: _write_bundle(tmp_path / "handmade", **wishes)


def _start(*words: str, before: str = "") -> subprocess.Popen[str]:
    """The verb in a process of its own; ``before`` is Python that runs ahead of it."""
    program = f"{before}\nfrom intarsia.cli import main\nmain()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", program, *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def _write_bundle(folder: Path, *, blocks: int = 6, frames: bool = True) -> Path:
    """Write manifest, plan, measurements, configuration and frames of an imaginary wan-mini."""
    (folder / "engine" / "onnx").mkdir(parents=True)
    (folder / "engine" / "onnx" / "model.onnx").write_bytes(bytes(1000))
    plan = {
        "version": 1,
        "graph": "0123456789ab",
        "target": "cpu-avx2",
        "phases": [{"first": 0, "last": None, "steps": [{"run": RUN, "chosen": _chosen(blocks)}]}],
        "notes": {
            "goal": "psnr>=35",
            "complete": True,
            "error": 0.0021,
            "places": [
                {"step": 0, "place": place, "options": _options(index)} for index, place in enumerate(_chosen(blocks))
            ],
            "refused": [{"step": 0, "place": "proj_out", "why": "16 rows are fewer than min_rows=32"}],
            "tried": _tried(),
        },
    }
    _write(folder / "plan.json", plan)
    _write(folder / "config.json", {"model": "wan-mini", "target": "cpu-avx2", "quality": "psnr>=35", "seed": 0})
    _write(folder / "measurements.json", {"measured": _measured(), "report.html": None, "seal": "0"})
    if frames:
        from PIL import Image

        picture = Image.new("RGB", (272, 68))
        for x in range(272):
            for y in range(68):
                shade = int(127 + 120 * math.sin(x / 9 + (y // 34) / 8) * math.cos((y % 34) / 9))
                picture.putpixel((x, y), (shade, shade // 2, 255 - shade))
        picture.save(folder / "frames.png")
    _write(folder / "manifest.json", _manifest())
    return folder


def _chosen(blocks: int) -> dict[str, str]:
    """An option for every layer of an imaginary transformer."""
    places = [f"blocks.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    found = {place: OPTIONS[(index * 7 + index // 8) % 5] for index, place in enumerate(places)}
    return {"condition_embedder.time_proj": "i8", **found}


def _options(index: int) -> list[dict[str, object]]:
    """Error, and change of bytes and seconds, of each option of a place."""
    saved = (0.0, 0.74, 0.84, 0.86, 0.87)
    return [
        {
            "option": option,
            "error": 0.0 if not level else 1e-5 * 4**level * (1 + index % 3),
            "bytes": round(-65536 * saved[level]),
            "seconds": -2e-5 * saved[level],
        }
        for level, option in enumerate(OPTIONS)
    ]


def _tried() -> list[dict[str, object]]:
    """Plans that were measured end to end."""
    return [
        {
            "changed": 50 - step,
            "error": 0.0021 * 2.0 ** (3 - step),
            "margin": 2.6 * step - 7.5,
            "seconds": 1e-3,
            "bytes": round(9e5 + 3e5 * step),
            "quality": {"psnr": 28 + 2.6 * step},
        }
        for step in range(7)
    ]


def _metric(mean: float, spread: float, floor: float) -> dict[str, object]:
    """A metric over eight samples."""
    samples = [mean + spread * math.sin(3 * index) for index in range(8)]
    return {
        "mean": mean,
        "low": mean - spread / 3,
        "high": mean + spread / 3,
        "worst": min(samples),
        "floor": floor,
        "samples": samples,
    }


def _measured() -> dict[str, object]:
    """What a clock said."""
    return {
        "engine": {
            "seconds": 0.0151,
            "low": 0.0149,
            "high": 0.0157,
            "repeats": 20,
            "device": "CPU, 2 threads, ONNX Runtime 1.31.1",
        },
        "eager": {
            "seconds": 0.0312,
            "low": 0.0309,
            "high": 0.0332,
            "repeats": 20,
            "device": "CPU, 2 threads, PyTorch 2.13",
        },
    }


def _manifest() -> dict[str, object]:
    """What the bundle claims."""
    entry = {"bytes": 1000, "sha256": "ab" * 32}
    return {
        "schema": 2,
        "command": "intarsia optimize wan-mini --target cpu-avx2 --quality 'psnr>=35' --backend onnx --seed 0 -o out",
        "engines": {
            "onnx": {
                "backend": "onnx",
                "check": "1 file",
                "files": ["model.onnx"],
                "info": {"opset": 23},
                "sample": "its own",
            }
        },
        "target": {"name": "cpu-avx2", "summary": "x86-64 server, two cores with AVX2"},
        "fingerprints": {"graph": "0123456789ab", "weights": "ba9876543210", "plan": "aabbccddeeff"},
        "predicted": {"seconds": 0.0094, "bytes": 1_990_000, "baseline_seconds": 0.0221, "baseline_bytes": 7_140_000},
        "quality": {
            "goal": "psnr>=35",
            "split": "held-out",
            "metrics": {
                "psnr": _metric(37.21, 1.4, 13.2),
                "ssim": _metric(0.9862, 0.006, 0.41),
                "motion_psnr": _metric(33.4, 1.1, 17.9),
            },
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        "files": {
            "engine/onnx/model.onnx": {"bytes": 2_110_000, "sha256": "cd" * 32},
            "plan.json": entry,
            "frames.png": entry,
        },
        "seal": "0",
    }


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2))
