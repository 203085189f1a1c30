"""NVIDIA's builder in a process of its own, by the script that the bundle holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intarsia.backends import tensorrt_build as script
from intarsia.ir.errors import Unsupported

SCRIPT = "build.py"
_KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT")


def installed() -> Any:
    """The builder's package; None if there is none."""
    try:
        return script.library()
    except ImportError:
        return None


def run_script(folder: Path, name: str, arguments: Sequence[str]) -> None:
    """Build, or only parse, what lies in ``folder``; the model is called ``name`` in messages.

    In a process of its own, because on some models NVIDIA's builder crashes; in a place whose path is always as long
    and with little environment, so that addresses are alike, on which bytes of the plan depend.

    Raises:
        Unsupported: The parser or the builder does not take the model, one reason a line, or crashes.
    """
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    with tempfile.TemporaryDirectory() as place:
        there = Path(place)
        for file in folder.iterdir():
            (there / file.name).symlink_to(file.absolute())
        command = [sys.executable, SCRIPT, *arguments]
        done = subprocess.run(command, cwd=place, env=kept, capture_output=True, text=True, check=False)
        for plan in there.glob("*.plan"):
            shutil.copyfile(plan, folder / plan.name)
    if done.returncode:
        reasons = done.stderr.strip().splitlines() if done.returncode == Unsupported.exit_code else []
        crash = f"its builder ended with code {done.returncode}, a fault of its own; try tensorrt(engine=False)"
        raise Unsupported(f"TensorRT does not take {name}:", reasons or [crash])


def is_rtx_plan(plan: bytes) -> bool:
    """Whether the header is that of TensorRT-RTX 1.x: ``vtrt``, and the file's length in bytes 16 to 23."""
    return plan[:4] == b"vtrt" and int.from_bytes(plan[16:24], "little") == len(plan)
