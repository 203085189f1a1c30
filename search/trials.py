"""Whole answers: what a plan's graph gives on validation noise, measured once and remembered."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress
from intarsia.search.quality import Quality, measure
from intarsia.search.workload import Workload


class Spent(Exception):
    """The time that a search was given is over."""


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock, in seconds; without end unless given."""

    moment: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """The moment that many seconds from now."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    def check(self) -> None:
        """Raise Spent once the moment has come."""
        if time.monotonic() >= self.moment:
            raise Spent


@dataclass(frozen=True)
class Trial:
    """A selection of options that was measured on validation noise.

    Attributes:
        selection: The number of the option taken at each place.
        error: The sum of the sensitivities of these options.
        quality: What was measured.
        margin: By how many dB the mean less one standard error meets the goal; negative where it is missed.
        seconds: Time that one call is predicted to take.
        bytes: Memory that the weights are predicted to take.
    """

    selection: tuple[int, ...]
    error: float
    quality: Quality
    margin: float
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, numbers to six digits."""
        return {
            "changed": sum(number > 0 for number in self.selection),
            "error": digits(self.error),
            "margin": digits(self.margin),
            "seconds": digits(self.seconds),
            "bytes": self.bytes,
            "quality": {name: digits(metric.mean) for name, metric in self.quality.metrics.items()},
        }


def digits(value: float) -> float:
    """The number to six digits, as a person reads it."""
    return float(f"{value:.6g}")


@dataclass
class Judge:
    """Measures graphs with the program's weights against the program itself; the journal spares what it knows."""

    program: Program
    workload: Workload
    journal: Journal
    progress: Progress
    deadline: Deadline

    def quality(self, graph: Graph) -> Quality:
        """Quality of a changed graph's whole answers; Spent if the deadline comes first."""
        key = f"quality/{graph.fingerprint}"
        known = self.journal.get(key)
        if isinstance(known, dict):
            return Quality.from_json(cast("Mapping[str, Mapping[str, object]]", known))
        reference = self._reference
        same = graph.fingerprint == self.program.graph.fingerprint
        found = measure(reference if same else self._outputs(Program(graph, self.program.weights)), reference)
        self.journal.put(key, found.to_json())
        return found

    @cached_property
    def _reference(self) -> Tensor:
        return self._outputs(self.program)

    def _outputs(self, program: Program) -> Tensor:
        module = materialize(program).module()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.deadline.check()
            with torch.no_grad():
                return tuple(module(*inputs))

        return self.workload.outputs(run, "validation", self.progress)
