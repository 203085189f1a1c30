"""A denoising loop from a file: what ``FlowMatchEuler.to_json`` writes, or a scheduler's configuration of diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia.ir.errors import UsageError
from intarsia.models.sampler import FlowMatchEuler

EULER = "FlowMatchEulerDiscreteScheduler"

HISTORIES = ("UniPC", "DPMSolverMultistep", "DEISMultistep", "LMSDiscrete", "PNDM", "IPNDM", "SASolver", "CosineDPM")
"""How the names of solvers begin that go on from velocities of earlier steps."""

SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""What asks diffusers for other noise levels than those that a shift gives."""


def read_sampler(path: Path, default: FlowMatchEuler) -> FlowMatchEuler:
    """The loop that a file describes.

    A scheduler's configuration gives the shift; the number of steps and the guidance, which a pipeline is called with,
    are those of ``default``.

    Raises:
        UsageError: The file cannot be read, or its solver is not Euler's method on a fixed schedule. A solver with a
            history needs every step computed anew at one spacing, and skipped steps and tokens break that.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--sampler {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--sampler {path}: not JSON: {error}") from error
    if not isinstance(found, dict) or "_class_name" not in found:
        try:
            return FlowMatchEuler.from_json(json.dumps(found))
        except UsageError as error:
            raise UsageError(f"--sampler {path}: {error}, or give diffusers' scheduler_config.json") from error
    return replace(default, shift=_shift(path, found))


def _shift(path: Path, config: dict[str, Any]) -> float:
    name = str(config["_class_name"])
    if name.startswith(HISTORIES):
        raise UsageError(
            f"--sampler {path}: {name} goes on from velocities of earlier steps, which skipped steps and tokens leave "
            f"stale; Euler's method is needed: take {EULER} with the same shift"
        )
    if name != EULER:
        raise UsageError(f"--sampler {path}: {name} is not {EULER}, whose loop is the one that is built")
    if config.get("use_dynamic_shifting"):
        raise UsageError(
            f"--sampler {path}: use_dynamic_shifting makes the shift depend on the video's size; give it as shift"
        )
    if other := next((key for key in SCHEDULES if config.get(key)), None):
        raise UsageError(f"--sampler {path}: {other} is another schedule of noise levels than shift's; leave it out")
    shift = config.get("shift", 1.0)
    if not isinstance(shift, int | float) or isinstance(shift, bool):
        raise UsageError(f"--sampler {path}: shift is {shift!r}, not a number")
    return float(shift)
