"""From a model and a user's data to a plan that holds the ranges of its activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from intarsia import subject as subjects
from intarsia.calibration_data import Batch, read
from intarsia.calibration_files import Scaling
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
        samples: How many samples were read.
        warnings: A line for each value that has no grid and each layer with dead channels.
    """

    plan: Plan
    ranges: Mapping[str, tuple[float, float]]
    samples: int
    warnings: tuple[str, ...]


def calibrated(
    model: str | Path | subjects.Subject,
    data: str,
    *,
    target: str = "null",
    method: str = "minmax",
    samples: int = 256,
    seed: int = 0,
    scaling: Scaling | None = None,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """The ranges of the model's activations on the data, after batch norms are folded.

    Args:
        data: As ``calibration_data.read`` takes it, with at most ``samples``, the ``seed`` and the ``scaling``.
        target: The machine that the plan names; ranges are the same for all.
        method: As ``search.calibration.find_method`` takes it.

    Raises:
        UsageError: The model or the data is none, or data does not fit the model.
        SpecError: The method is none.
    """
    how, machine = calibration.find_method(method), load_target(target)
    subject = model if isinstance(model, subjects.Subject) else subjects.resolve(model, weights=weights)
    if subject.program.is_meta:
        raise UsageError(f"{subject.name}: calibration runs the network and needs weights; give --weights")
    told = progress or Silent()
    told.start("looking through the data", None)
    batches = read(data, subject.program.graph, limit=samples, seed=seed, scaling=scaling)
    folded = Program(find_pass(FOLD).run(subject.program.graph, machine, {}), subject.program.weights)
    taken: list[int] = []
    found = calibration.calibrate(folded, _counted(batches, taken), how, progress=told, total=batches.total)
    steps = (Step(FOLD), Step(CALIBRATE, found))
    notes = {"data": data, "method": method, "samples": sum(taken), "seed": seed}
    plan = Plan(subject.program.graph.fingerprint, machine.name, (Phase(steps),), notes)
    ranges = {place: range_of(option) for place, option in found.items()}
    return Calibrated(plan, ranges, sum(taken), calibration.warnings(found, folded))


def _counted(batches: Iterable[Batch], taken: list[int]) -> Iterator[Batch]:
    """The batches, and in ``taken`` how many samples each had."""
    for batch in batches:
        taken.append(len(batch[0]))
        yield batch
