"""What bits of a layer cost, measured: the change of the network's answer with its weights and its input on grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from intarsia.ir.errors import QualityError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.search.bit_data import Data
from intarsia.search.bit_sensitivity import Perturbations
from intarsia.search.estimate import Estimate
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.sensitivity import Batch, Difference, difference, run_again, values_of

Group = tuple[str, ...]
"""Layers, by name, that have the same bits."""


def errors_on_grids(
    base: Program,
    options: Mapping[Group, Sequence[str]],
    change: Callable[[Group, str], Graph],
    data: Data,
    *,
    journal: Journal,
    guide: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    phase: str = "layers on grids",
) -> Perturbations:
    """How far each option of each group alone moves the first output, by layer: a group's, in equal parts.

    Of scores of classes (N, C) the Kullback-Leibler divergence from the unchanged answer; of numbers, where
    ``data.squared``, the squared change relative to the mean squared norm of the call's samples. A sample of an
    estimate is a sample of the data, or a call where the first axis does not run over samples.

    Args:
        base: The calibrated network, its weights computed.
        change: The graph with the option at the group, everything else in float.
        data: Labels are not looked at.
        journal: What was measured before, and where measurements go; a call of an option is one entry.
        guide: What is kept of the rows of an output, a linear function.
        phase: What progress calls this.

    Raises:
        QualityError: The answer is not finite.
    """
    told = progress or Silent()
    asked = [(group, option) for group, offered in options.items() for option in offered]
    found: dict[tuple[Group, str], list[float]] = {key: [] for key in asked}
    differences: dict[tuple[Group, str], Difference] = {}
    told.start(phase, len(asked) * len(data.batches))
    measuring = _Measuring(base, data.squared, guide, journal)
    for number, batch in enumerate(data.batches):
        call = measuring.call(batch)
        for group, option in asked:
            if number == 0:  # here, so that progress is shown while changed graphs are made
                differences[group, option] = difference(base.graph, change(group, option))
            found[group, option] += call(differences[group, option], f"%{group[0]} at {option}, batch {number}")
            told.advance(note=f"{group[0]} {option}")
    told.finish()
    return {
        layer: {option: Estimate(tuple(found[group, option])).times(1 / len(group)) for option in offered}
        for group, offered in options.items()
        for layer in group
    }


def distances(output: Tensor, unchanged: Tensor, *, classes: bool) -> Tensor:
    """How far each sample (N) of an output is from the unchanged one's, in f64; see ``errors_on_grids``."""
    ours, theirs = output.double(), unchanged.double()
    if classes:
        return kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), reduction="none", log_target=True).sum(-1)
    norms = theirs.flatten(1).square().sum(1)
    return (ours - theirs).flatten(1).square().sum(1) / norms.mean().clamp(min=1e-300)


@dataclass(frozen=True)
class _Measuring:
    base: Program
    squared: bool
    guide: Callable[[Tensor], Tensor] | None
    journal: Journal

    def call(self, batch: Batch) -> Callable[[Difference, str], list[float]]:
        """What gives the samples of one call of a changed graph; the base runs when it is first needed."""
        identity = f"{self.base.graph.fingerprint} {self.base.fingerprint()} {self.guide is not None}"
        inputs = Data([batch], squared=self.squared).fingerprint
        start = f"grids/{sha256(f'{identity} {inputs}'.encode()).hexdigest()[:16]}"
        held: list[Mapping[str, object]] = []

        def samples(changed: Difference, where: str) -> list[float]:
            key = f"{start}/{changed.fingerprint}"
            known = self.journal.get(key)
            if isinstance(known, list):
                return [float(sample) for sample in known]
            if not held:
                held.append(values_of(self.base, batch))
            found = self._samples(changed, held[0])
            if not all(map(math.isfinite, found)):
                raise QualityError(f"sensitivity of {where}: the answer is not finite")
            self.journal.put(key, found)
            return found

        return samples

    def _samples(self, changed: Difference, values: Mapping[str, object]) -> list[float]:
        after, before = run_again(changed, values)[changed.outputs[0]], values[self.base.graph.outputs[0]]
        assert isinstance(after, Tensor)
        assert isinstance(before, Tensor)
        rows = [self.guide(output) if self.guide else output for output in (after, before)]
        after, before = rows if rows[0].ndim > 1 else [row.reshape(1, -1) for row in rows]
        found: list[float] = distances(after, before, classes=not self.squared).tolist()
        return found
