"""From a model and a user's data to a plan that holds the ranges of its activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from intarsia import subject as subjects
from intarsia.calibration_data import Scaling, batches
from intarsia.ir.errors import UsageError
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.target import load_target
from intarsia.passes.base import find_pass
from intarsia.passes.calibrate import range_of
from intarsia.search import calibration
from intarsia.search.progress import Progress, Silent

FOLD, CALIBRATE = "fold-batch-norm", "calibrate"


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        plan: Folds batch norms and writes the ranges into the graph.
        ranges: The least and the largest number, by value.
        warnings: A line for each value that has no scale.
    """

    plan: Plan
    ranges: Mapping[str, tuple[float, float]]
    warnings: tuple[str, ...]


def calibrated(
    model: str | Path | subjects.Subject,
    data: str,
    *,
    target: str,
    method: str = "minmax",
    samples: int = 256,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """The ranges of the model's activations on the data, after batch norms are folded.

    Args:
        data: As ``calibration_data.batches`` takes it.
        method: As ``search.calibration.find_method`` takes it.
        mean: Of pictures, as ``std``.

    Raises:
        UsageError: The model, the data or the method is none, or data does not fit the model.
    """
    how, scaling, machine = calibration.find_method(method), Scaling(mean, std), load_target(target)
    subject = model if isinstance(model, subjects.Subject) else subjects.resolve(model, weights=weights)
    if subject.program.is_meta:
        raise UsageError(f"{subject.name}: calibration runs the network and needs weights; give --weights")
    folded = find_pass(FOLD).run(subject.program.graph, machine, {})
    found = calibration.calibrate(
        Program(folded, subject.program.weights),
        batches(data, folded, samples=samples, scaling=scaling),
        how,
        progress=progress or Silent(),
    )
    steps = (Step(FOLD), Step(CALIBRATE, found))
    notes = {"data": data, "method": method, "samples": samples}
    plan = Plan(subject.program.graph.fingerprint, machine.name, (Phase(steps),), notes)
    ranges = {place: range_of(option) for place, option in found.items()}
    return Calibrated(plan, ranges, calibration.warnings(found))


def numbers(option: str, text: str) -> tuple[float, ...]:
    """One or more finite numbers between commas; UsageError with the option if it is not that."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise UsageError(f"{option} {text!r}: expected numbers such as 0.485,0.456,0.406")
    return found
