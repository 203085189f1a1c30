"""Engines of segments run one after the other: what is remembered, and when it is computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.backends.null import NullEngine
from intarsia.backends.segmented import REMEMBERED, Segment, SegmentedEngine, once
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.segments import split

WHOLE = Graph.parse("""\
graph step {
  input %hidden_states: f32[2, 4]
  input %timestep: f32[2]
  input %text: f32[3, 4]
  param %w: f32[4, 4]
  %keys: f32[3, 4] = aten.linear(input=%text, weight=%w)
  %time: f32[2, 1] = aten.unsqueeze(self=%timestep, dim=1)
  %q: f32[2, 4] = aten.mul.Tensor(self=%hidden_states, other=%time)
  %y: f32[2, 3] = aten.linear(input=%q, weight=%keys)
  return %y
}
""")
WEIGHTS = {"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(1))}
SAMPLE, TIME = torch.ones(2, 4), torch.ones(2)


class Counting(NullEngine):
    """Knows how often it was called."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(Program(graph, WEIGHTS))
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return super().__call__(*inputs)


def text(number: int) -> Tensor:
    return torch.full((3, 4), float(number))


@pytest.fixture
def engine() -> SegmentedEngine:
    graphs = split(WHOLE, {"hidden_states": 1, "timestep": 1})
    return SegmentedEngine(tuple(Segment(graph, Counting(graph)) for graph in graphs), WHOLE)


def calls(engine: SegmentedEngine) -> list[int]:
    return [segment.engine.calls for segment in engine.segments]  # type: ignore[attr-defined]


def expected(*inputs: Tensor) -> Tensor:
    return NullEngine(Program(WHOLE, WEIGHTS))(*inputs)[0]


def test_a_loop_of_steps_runs_what_the_prompt_tells_once(engine: SegmentedEngine) -> None:
    assert engine.once == (0,)
    for step in range(5):
        inputs = (SAMPLE * step, TIME * step, text(1))
        assert torch.equal(engine(*inputs)[0], expected(*inputs))
    assert calls(engine) == [1, 5]


def test_the_branches_of_guidance_are_remembered_side_by_side(engine: SegmentedEngine) -> None:
    for step in range(3):
        for number in (0, 1):
            inputs = (SAMPLE, TIME * step, text(number))
            assert torch.equal(engine(*inputs)[0], expected(*inputs))
    assert calls(engine) == [2, 6]


def test_a_prompt_that_was_changed_in_place_is_another_prompt(engine: SegmentedEngine) -> None:
    prompt = text(1)
    engine(SAMPLE, TIME, prompt)
    prompt[0, 0] = 7
    assert torch.equal(engine(SAMPLE, TIME, prompt)[0], expected(SAMPLE, TIME, prompt))
    assert calls(engine) == [2, 2]


def test_what_was_not_asked_for_longest_is_forgotten_first(engine: SegmentedEngine) -> None:
    for number in (*range(REMEMBERED), 0, REMEMBERED):
        engine(SAMPLE, TIME, text(number))
    assert calls(engine)[0] == REMEMBERED + 1
    engine(SAMPLE, TIME, text(0))
    assert calls(engine)[0] == REMEMBERED + 1
    assert torch.equal(engine(SAMPLE, TIME, text(1))[0], expected(SAMPLE, TIME, text(1)))
    assert calls(engine)[0] == REMEMBERED + 2


def test_what_follows_from_the_sample_or_the_time_runs_at_every_step() -> None:
    assert once(WHOLE, split(WHOLE, {"y": 1})) == ()
    assert once(WHOLE, split(WHOLE, {"hidden_states": 1, "text": 1})) == ()
    assert once(WHOLE, split(WHOLE, {"keys": 1, "hidden_states": 2, "timestep": 2})) == (0, 1)


def test_inputs_of_a_segment_are_the_model_s_and_what_came_before(engine: SegmentedEngine) -> None:
    sample, time, keys = engine.inputs_of(1, SAMPLE, TIME, text(2))
    assert torch.equal(keys, torch.nn.functional.linear(text(2), WEIGHTS["w"]))
    assert sample is SAMPLE
    assert time is TIME
