"""Run the segments of a graph one after the other; what no step changes is computed once and remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from intarsia.backends.base import Carried, Engine, Stateful
from intarsia.backends.by_step import TIMESTEP
from intarsia.ir.graph import Graph

REMEMBERED = 4
"""Calls that a segment remembers: the branches of guidance, where each is a call of its own, for two videos."""


@dataclass(frozen=True)
class Segment:
    """A part of a graph, as ``ir.segments.split`` cuts it, and its engine."""

    graph: Graph
    engine: Engine


@dataclass(frozen=True)
class SegmentedEngine(Engine):
    """The engine of a graph whose segments have engines of their own.

    Segments that no step changes, those of ``once``, answer from memory where all their inputs have the values of one
    of the last ``REMEMBERED`` calls. So the engine gives what the graph gives, whoever calls it in whatever order.

    Attributes:
        segments: In the order in which they run.
        graph: The whole, of which they are the parts.
    """

    segments: tuple[Segment, ...]
    graph: Graph
    _memories: Mapping[int, _Memory] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steady = once(self.graph, [segment.graph for segment in self.segments])
        object.__setattr__(self, "_memories", {number: _Memory() for number in steady})

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the whole graph gives."""
        table = dict(zip((value.name for value in self.graph.inputs), inputs, strict=True))
        for number, segment in enumerate(self.segments):
            run = segment.engine
            given = tuple(table[value.name] for value in segment.graph.inputs)
            answer = self._memories[number].answer(run, given) if number in self._memories else run(*given)
            table |= dict(zip(segment.graph.outputs, answer, strict=True))
        return tuple(table[name] for name in self.graph.outputs)

    def stateful(self, values: Sequence[Tensor], *, inputs: Sequence[int], outputs: Sequence[int]) -> Stateful:
        """The same, each segment keeping what it alone reads and gives back; carried where several do."""
        names = [
            (self.graph.inputs[one].name, self.graph.outputs[two]) for one, two in zip(inputs, outputs, strict=True)
        ]
        homes = [self._home(*pair) for pair in names]
        if None in homes:
            return Carried(self, values, inputs=inputs, outputs=outputs)
        return _SegmentedStates(self, dict(zip(names, values, strict=True)), homes)

    def _home(self, read: str, given: str) -> int | None:
        """The segment that alone reads an input and gives an output, which no other reads; None where there is none."""
        touching = [
            number
            for number, segment in enumerate(self.segments)
            if {read, given} & {*(value.name for value in segment.graph.inputs), *segment.graph.outputs}
        ]
        if len(touching) != 1:
            return None
        graph = self.segments[touching[0]].graph
        both = given in graph.outputs and read in {value.name for value in graph.inputs}
        return touching[0] if both else None

    def inputs_of(self, number: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What segment ``number`` is given in a call with ``inputs`` of the whole graph; those before it run."""
        table = dict(zip((value.name for value in self.graph.inputs), inputs, strict=True))
        for segment in self.segments[:number]:
            answer = segment.engine(*(table[value.name] for value in segment.graph.inputs))
            table |= dict(zip(segment.graph.outputs, answer, strict=True))
        return tuple(table[value.name] for value in self.segments[number].graph.inputs)

    @property
    def once(self) -> tuple[int, ...]:
        """Numbers of the segments that run once for each prompt."""
        return tuple(self._memories)

    @property
    def device(self) -> str:
        """The device of the engines, each once."""
        return "; ".join(dict.fromkeys(segment.engine.device for segment in self.segments))


class _SegmentedStates(Stateful):
    """Segments of which some keep inputs of theirs: each is called, and gives, without them.

    Args:
        engine: All of them.
        kept: Zeros, by the names of an input that is kept and of the output that it becomes.
        homes: The segment of each.
    """

    def __init__(
        self, engine: SegmentedEngine, kept: Mapping[tuple[str, str], Tensor], homes: Sequence[int | None]
    ) -> None:
        self._names, self._homes = list(kept), homes
        self._states: dict[int, Stateful] = {}
        for number in sorted({home for home in homes if home is not None}):
            segment = engine.segments[number]
            own = [pair for pair, home in zip(kept, homes, strict=True) if home == number]
            given = [value.name for value in segment.graph.inputs]
            self._states[number] = segment.engine.stateful(
                [kept[pair] for pair in own],
                inputs=[given.index(read) for read, _ in own],
                outputs=[segment.graph.outputs.index(made) for _, made in own],
            )
        segments = (
            Segment(self._without(segment.graph), self._states.get(number, segment.engine))
            for number, segment in enumerate(engine.segments)
        )
        self._engine = SegmentedEngine(tuple(segments), self._without(engine.graph))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the whole graph gives beside what is kept."""
        return self._engine(*inputs)

    def clear(self) -> None:
        """Keep zeros, in all segments."""
        for state in self._states.values():
            state.clear()

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What the segments keep, in the order in which it was given."""
        left = {number: iter(state.kept) for number, state in self._states.items()}
        return tuple(next(left[home]) for home in self._homes if home is not None)

    @property
    def device(self) -> str:
        """That of the segments."""
        return self._engine.device

    def _without(self, graph: Graph) -> Graph:
        """Names that a graph takes and gives beside those that are kept."""
        read, given = ({pair[side] for pair in self._names} for side in (0, 1))
        inputs = tuple(value for value in graph.inputs if value.name not in read)
        return replace(graph, inputs=inputs, outputs=tuple(name for name in graph.outputs if name not in given))


def once(whole: Graph, segments: Sequence[Graph]) -> tuple[int, ...]:
    """Numbers of the segments that follow neither from the sample, the whole graph's first input, nor the timestep."""
    steady = {value.name for value in whole.inputs[1:]} - {TIMESTEP}
    found: list[int] = []
    for number, segment in enumerate(segments):
        if all(value.name in steady for value in segment.inputs):
            steady.update(segment.outputs)
            found.append(number)
    return tuple(found)


@dataclass
class _Memory:
    """The last calls of a segment, the latest last: copies of what it was given, and what it answered."""

    calls: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = field(default_factory=list)

    def answer(self, run: Engine, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        known = next((call for call in self.calls if _same(call[0], given)), None)
        if known is None:
            known = (tuple(tensor.clone() for tensor in given), run(*given))
            self.calls = self.calls[-REMEMBERED + 1 :]
        else:
            self.calls = [call for call in self.calls if call is not known]
        self.calls.append(known)
        return known[1]


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(
        one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(some, others, strict=True)
    )
