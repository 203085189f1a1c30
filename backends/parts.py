"""How the programs of a bundle make up its model: one for each phase of the loop, or one after the other in a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from intarsia.backends.base import Engine
from intarsia.backends.by_step import joined
from intarsia.backends.manifest import PHASES, SEGMENTS
from intarsia.backends.phases import StepRange, of_phase, subfolder
from intarsia.backends.segmented import Segment, SegmentedEngine
from intarsia.ir.graph import Graph


class Parts(ABC):
    """What the programs, which have numbers, are to the model."""

    key: ClassVar[str]

    @abstractmethod
    def folder(self, number: int) -> str:
        """Where a bundle keeps what belongs to a program, below its own folder and below each backend's."""

    @abstractmethod
    def suffix(self, number: int) -> str:
        """What tells a program from the others in messages; empty where it is the only one."""

    @abstractmethod
    def join(self, engines: Mapping[int, Engine], whole: Graph, graphs: Mapping[int, Graph]) -> Engine:
        """The engines of all programs as one, which takes the inputs of the graph ``whole``.

        Args:
            engines: By number, as are ``graphs``, from which they were built.
            whole: With phases, any of these graphs, which have the same inputs; with segments, what was cut.
        """


@dataclass(frozen=True)
class PhaseParts(Parts):
    """Programs that steps run by the phase they belong to; numbers are of the first phase that runs them.

    Attributes:
        ranges: The loop's phases; none where one program runs at every step.
    """

    ranges: tuple[StepRange, ...] = ()
    key: ClassVar[str] = PHASES

    def folder(self, number: int) -> str:
        """``phase-1``; the bundle's own for the program of the first phase."""
        return subfolder(number)

    def suffix(self, number: int) -> str:
        """``, phase 1 (steps 4 to 39)``."""
        return of_phase(self.ranges, number)

    def join(self, engines: Mapping[int, Engine], whole: Graph, graphs: Mapping[int, Graph]) -> Engine:
        """The engine that runs the program of a call's step."""
        return joined(engines, self.ranges, whole)


@dataclass(frozen=True)
class SegmentParts(Parts):
    """Programs that every step runs one after the other, numbered in that order.

    Attributes:
        count: How many there are.
    """

    count: int
    key: ClassVar[str] = SEGMENTS

    def folder(self, number: int) -> str:
        """``segment-0``."""
        return f"segment-{number}"

    def suffix(self, number: int) -> str:
        """``, segment 0 of 2``."""
        return f", segment {number} of {self.count}"

    def join(self, engines: Mapping[int, Engine], whole: Graph, graphs: Mapping[int, Graph]) -> SegmentedEngine:
        """The engine that runs one segment after the other."""
        segments = tuple(Segment(graphs[number], engines[number]) for number in range(self.count))
        return SegmentedEngine(segments, whole)
