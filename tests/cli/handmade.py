"""A bundle folder made by hand: the files that the report reads, and nothing that runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

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


def write_bundle(folder: Path, *, blocks: int = 6, frames: bool = True) -> Path:
    """Write manifest, plan, measurements, configuration and frames of an imaginary wan-mini."""
    (folder / "engine" / "onnx").mkdir(parents=True)
    (folder / "engine" / "onnx" / "model.onnx").write_bytes(bytes(1000))
    plan = {
        "version": 1,
        "graph": "0123456789ab",
        "target": "cpu-avx2",
        "phases": [{"first": 0, "last": None, "steps": [{"run": RUN, "chosen": chosen(blocks)}]}],
        "notes": {
            "goal": "psnr>=35",
            "complete": True,
            "error": 0.0021,
            "places": [
                {"step": 0, "place": place, "options": options(index)} for index, place in enumerate(chosen(blocks))
            ],
            "refused": [{"step": 0, "place": "proj_out", "why": "16 rows are fewer than min_rows=32"}],
            "tried": tried(),
        },
    }
    _write(folder / "plan.json", plan)
    _write(folder / "config.json", {"model": "wan-mini", "target": "cpu-avx2", "quality": "psnr>=35", "seed": 0})
    _write(folder / "measurements.json", {"measured": measured(), "report.html": None, "seal": "0"})
    if frames:
        from PIL import Image

        picture = Image.new("RGB", (272, 68))
        for x in range(272):
            for y in range(68):
                shade = int(127 + 120 * math.sin(x / 9 + (y // 34) / 8) * math.cos((y % 34) / 9))
                picture.putpixel((x, y), (shade, shade // 2, 255 - shade))
        picture.save(folder / "frames.png")
    _write(folder / "manifest.json", manifest())
    return folder


def chosen(blocks: int) -> dict[str, str]:
    """An option for every layer of an imaginary transformer."""
    places = [f"blocks.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    found = {place: OPTIONS[(index * 7 + index // 8) % 5] for index, place in enumerate(places)}
    return {"condition_embedder.time_proj": "i8", **found}


def options(index: int) -> list[dict[str, object]]:
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


def tried() -> list[dict[str, object]]:
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


def metric(mean: float, spread: float, floor: float) -> dict[str, object]:
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


def measured() -> dict[str, object]:
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


def manifest() -> dict[str, object]:
    """What the bundle claims."""
    entry = {"bytes": 1000, "sha256": "ab" * 32}
    return {
        "schema": 1,
        "command": "intarsia optimize wan-mini --target cpu-avx2 --quality 'psnr>=35' --backend onnx --seed 0 -o out",
        "backend": {"name": "onnx", "files": ["model.onnx"], "info": {"opset": 23}},
        "target": {"name": "cpu-avx2", "summary": "x86-64 server, two cores with AVX2"},
        "fingerprints": {"graph": "0123456789ab", "weights": "ba9876543210", "plan": "aabbccddeeff"},
        "predicted": {"seconds": 0.0094, "bytes": 1_990_000, "baseline_seconds": 0.0221, "baseline_bytes": 7_140_000},
        "quality": {
            "goal": "psnr>=35",
            "split": "held-out",
            "metrics": {
                "psnr": metric(37.21, 1.4, 13.2),
                "ssim": metric(0.9862, 0.006, 0.41),
                "motion_psnr": metric(33.4, 1.1, 17.9),
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
