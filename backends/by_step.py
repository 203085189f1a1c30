"""Run the program of a call's denoising step, found from the timestep that the call is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.phases import StepRange
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES

TIMESTEP = "timestep"
"""The graph's input by which a call tells its step, as ``models.sampler.Denoise`` names it."""

Run = Callable[..., tuple[Tensor, ...]]
"""One call of a network: tensors in the graph's input order in, tensors in output order out."""


@dataclass(frozen=True)
class _Phases:
    """Finds the phase of a call.

    Attributes:
        at: Where in a call's inputs the timestep (N) is.
        spans: Lowest and highest timestep of each phase, rounded as the graph's input rounds them.
    """

    at: int
    spans: tuple[tuple[float, float], ...]

    def of(self, inputs: Sequence[Tensor]) -> int:
        """The phase whose timesteps are nearest to the call's; UsageError if its rows belong to several."""
        timestep = inputs[self.at]
        found = {self._nearest(float(value)) for value in (timestep.min(), timestep.max())}
        if len(found) > 1:
            raise UsageError(f"a call with timesteps of phases {' and '.join(map(str, sorted(found)))}; split its rows")
        return found.pop()

    def _nearest(self, value: float) -> int:
        return min(
            range(len(self.spans)),
            key=lambda number: max(self.spans[number][0] - value, value - self.spans[number][1], 0.0),
        )


def _phases(ranges: Sequence[StepRange], graph: Graph) -> _Phases:
    names = [value.name for value in graph.inputs]
    if TIMESTEP not in names:
        raise PlanError(
            f"graph {graph.name}: phases are told apart by the input %{TIMESTEP}; it takes {', '.join(names)}. "
            "Give a plan of one phase"
        )
    dtype = DTYPES[graph.type(TIMESTEP).dtype]
    rounded = [torch.tensor(one.timesteps, dtype=torch.float32).to(dtype).tolist() for one in ranges]
    for number, (before, after) in enumerate(pairwise(rounded)):
        if before[1] == after[0]:
            raise PlanError(
                f"graph {graph.name}: its input %{TIMESTEP} is {graph.type(TIMESTEP).dtype}, in which the last step of "
                f"phase {number} and the first of phase {number + 1} are both {before[1]:g}; move the border"
            )
    return _Phases(names.index(TIMESTEP), tuple((min(ends), max(ends)) for ends in rounded))


def require_phases(ranges: Sequence[StepRange], graph: Graph) -> None:
    """Raise PlanError where a call of ``graph`` does not tell to which of the phases it belongs."""
    _phases(ranges, graph)


def by_step(runs: Sequence[Run], ranges: Sequence[StepRange], graph: Graph) -> Run:
    """One network of ``runs``, one a phase: each call goes to the phase whose timesteps are nearest to its own.

        by_step([NullEngine(early), NullEngine(late)], step_ranges(plan.phases, sampler.timesteps()), early.graph)

    Raises:
        PlanError: The graph has no timestep, or one too coarse to tell the phases apart.
    """
    phases = _phases(ranges, graph)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return runs[phases.of(inputs)](*inputs)

    return run


@dataclass(frozen=True)
class PhasedEngine(Engine):
    """Engines of one loop, one for each distinct program; a call runs that of its step.

    Attributes:
        engines: By the number of the earliest phase that runs them.
        ranges: The loop's phases.
        graph: Any of the programs' graphs; they have the same inputs.
    """

    engines: Mapping[int, Engine]
    ranges: tuple[StepRange, ...]
    graph: Graph
    _run: Run = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        runs = [self.engines[one.program] for one in self.ranges]
        object.__setattr__(self, "_run", by_step(runs, self.ranges, self.graph))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the engine of the call's phase gives; UsageError if rows of the call belong to several phases."""
        return self._run(*inputs)

    @property
    def device(self) -> str:
        """The device of the engines, each once."""
        return "; ".join(dict.fromkeys(engine.device for engine in self.engines.values()))


def joined(engines: Mapping[int, Engine], ranges: Sequence[StepRange], graph: Graph) -> Engine:
    """The engines, by the number of the earliest phase that runs them, as one; the only one where there is one."""
    return PhasedEngine(engines, tuple(ranges), graph) if ranges else engines[0]


def at_step(inputs: Sequence[Tensor], graph: Graph, one: StepRange) -> tuple[Tensor, ...]:
    """The inputs with the timestep of the phase's first step."""
    return at_timestep(inputs, graph, one.timesteps[0])


def at_timestep(inputs: Sequence[Tensor], graph: Graph, timestep: float) -> tuple[Tensor, ...]:
    """The inputs with another timestep in every row."""
    return tuple(
        torch.full_like(tensor, timestep) if value.name == TIMESTEP else tensor
        for value, tensor in zip(graph.inputs, inputs, strict=True)
    )
