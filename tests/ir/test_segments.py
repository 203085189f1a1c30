"""Cut a graph into graphs that run one after the other."""

from __future__ import annotations

import pytest
import torch

from intarsia.ir.execute import to_module
from intarsia.ir.graph import Graph
from intarsia.ir.segments import split
from intarsia.ir.verify import verify

STEP = Graph.parse("""\
graph step {
  size N in [1, 8]
  input %x: f32[N, 4]
  input %text: f32[2, 4]
  param %w: f32[4, 4]
  %keys: f32[2, 4] = aten.linear(input=%text, weight=%w)
  %shift: f32[1, 4] = aten.sum.dim_IntList(self=%text, dim=[0], keepdim=True)
  %y: f32[N, 4] = aten.linear(input=%x, weight=%w)
  %z: f32[N, 2] = aten.linear(input=%y, weight=%keys)
  %last: f32[N, 4] = aten.add.Tensor(self=%y, other=%shift)
  return %last, %z
}
""")


def run(segments: tuple[Graph, ...], weights: dict[str, torch.Tensor], **values: torch.Tensor) -> list[torch.Tensor]:
    table = dict(values)
    for segment in segments:
        verify(segment)
        answers = to_module(segment, weights)(*(table[value.name] for value in segment.inputs))
        table |= dict(zip(segment.outputs, answers, strict=True))
    return [table[name] for name in STEP.outputs]


@pytest.mark.parametrize("stages", [{}, {"x": 1}, {"x": 1, "z": 2}, {"last": 1}, {"z": 1, "last": 2}])
@pytest.mark.parametrize("late", [False, True])
def test_segments_one_after_the_other_are_the_graph(stages: dict[str, int], late: bool) -> None:
    weights, x, text = {"w": torch.randn(4, 4)}, torch.randn(3, 4), torch.randn(2, 4)
    whole = to_module(STEP, weights)(x, text)
    segments = split(STEP, stages, late=late)
    assert len(segments) == max(stages.values(), default=0) + 1
    for ours, expected in zip(run(segments, weights, x=x, text=text), whole, strict=True):
        assert torch.equal(ours, expected)


def test_what_the_text_alone_tells_runs_before_all_that_the_sample_tells() -> None:
    before, after = split(STEP, {"x": 1})
    assert [value.name for value in before.inputs] == ["text"]
    assert before.outputs == ("keys", "shift")
    assert [value.name for value in after.inputs] == ["x", "keys", "shift"]
    assert after.outputs == ("last", "z")


def test_a_weight_that_two_segments_use_is_a_parameter_of_both_and_sizes_are_those_that_a_segment_mentions() -> None:
    before, after = split(STEP, {"x": 1})
    assert before.params == after.params == STEP.params
    assert before.sizes == ()
    assert after.sizes == STEP.sizes


def test_late_what_one_stage_alone_uses_runs_there() -> None:
    first, second = split(STEP, {"z": 1}, late=True)
    assert [node.name for node in first.nodes] == ["shift", "y", "last"]
    assert [node.name for node in second.nodes] == ["keys", "z"]


SIZED = Graph.parse("""\
graph sized {
  size N in [1, 8]
  input %x: f32[N, 4]
  input %y: f32[N, 4]
  param %w: f32[4]
  %twice: f32[4] = aten.add.Tensor(self=%w, other=%w)
  %n: int = aten.sym_size.int(self=%x, dim=0)
  %a: f32[N, 4] = aten.mul.Tensor(self=%x, other=%twice)
  %b: f32[N, 4] = aten.mul.Tensor(self=%y, other=%twice)
  %c: f32[N, 4] = aten.add.Tensor(self=%a, other=%b)
  %z: f32[4, N] = aten.view(self=%c, size=[4, %n])
  return %z
}
""")


def test_sizes_and_what_follows_from_weights_alone_are_computed_where_they_are_used() -> None:
    before, after = split(SIZED, {"y": 1})
    assert [node.name for node in before.nodes] == ["twice", "a"]
    assert [node.name for node in after.nodes] == ["twice", "n", "b", "c", "z"]
    assert before.outputs == ("a",)
    assert [value.name for value in after.inputs] == ["x", "y", "a"]
    x, y, w = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4)
    (middle,) = to_module(before, {"w": w})(x)
    (found,) = to_module(after, {"w": w})(x, y, middle)
    assert torch.equal(found, to_module(SIZED, {"w": w})(x, y)[0])
