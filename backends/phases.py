"""Phases of a denoising loop: ranges of its steps, each with the program that it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from intarsia.ir.errors import PlanError
from intarsia.ir.plan import Phase


@dataclass(frozen=True)
class StepRange:
    """One phase: steps ``first`` to ``last`` of the loop, both included.

    Attributes:
        program: Number of the earliest phase that runs the same program; its own where none does.
        timesteps: What the network is told at the first and at the last of these steps.
    """

    first: int
    last: int
    program: int
    timesteps: tuple[float, float]

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return self.last - self.first + 1

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {**asdict(self), "timesteps": list(self.timesteps)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepRange:
        """What ``to_json`` gave."""
        first, last = data["timesteps"]
        return cls(data["first"], data["last"], data["program"], (float(first), float(last)))


def step_ranges(
    phases: Sequence[Phase], timesteps: Sequence[float], *, programs: Sequence[int] | None = None
) -> tuple[StepRange, ...]:
    """The phases of a plan over a loop whose steps have these ``timesteps``; ``programs`` as of ``StepRange``.

    Raises:
        PlanError: The phases end before the loop's last step, or behind it.
    """
    steps = len(timesteps)
    ends = [steps - 1 if phase.last is None else phase.last for phase in phases]
    for number, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        if phase.first >= steps or end >= steps:
            asked = f"steps {phase.first} to {'the last' if phase.last is None else end}"
            raise PlanError(
                f"plan: phase {number} is {asked}; the sampler's are 0 to {steps - 1}, so end it there or leave it out"
            )
    if ends[-1] != steps - 1:
        raise PlanError(
            f"plan: the last phase ends at step {ends[-1]}; the sampler goes on to {steps - 1}, "
            "so end it there or give last as null"
        )
    return tuple(
        StepRange(phase.first, end, number if programs is None else programs[number], _ends(timesteps, phase, end))
        for number, (phase, end) in enumerate(zip(phases, ends, strict=True))
    )


def _ends(timesteps: Sequence[float], phase: Phase, end: int) -> tuple[float, float]:
    return (float(timesteps[phase.first]), float(timesteps[end]))


def same_ranges(some: Sequence[StepRange], others: Sequence[StepRange]) -> bool:
    """Whether the phases are the same; of timesteps a thousandth is let pass, since machines round differently."""
    return len(some) == len(others) and all(
        replace(one, timesteps=other.timesteps) == other
        and all(abs(a - b) < 1e-3 for a, b in zip(one.timesteps, other.timesteps, strict=True))
        for one, other in zip(some, others, strict=True)
    )


def title(ranges: Sequence[StepRange], program: int) -> str:
    """What people call the program that ``program`` is the first phase of: ``phase 1 (steps 4 to 39)``."""
    numbers = [number for number, one in enumerate(ranges) if one.program == program]
    steps = ", ".join(_steps(ranges[number]) for number in numbers)
    return f"phase{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))} (steps {steps})"


def of_phase(phases: Sequence[StepRange], phase: int) -> str:
    """What is added to the name of something that belongs to one of several programs: ``, phase 1 (steps 4 to 39)``."""
    return f", {title(phases, phase)}" if phases else ""


def _steps(one: StepRange) -> str:
    return str(one.first) if one.first == one.last else f"{one.first} to {one.last}"


def subfolder(phase: int) -> str:
    """Where a bundle keeps what belongs to a program, ``phase-1``; its own folder for that of the first phase."""
    return f"phase-{phase}" if phase else ""
