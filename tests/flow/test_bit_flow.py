"""What ranges of a denoising loop are measured on: many prompts, all of the loop; and what is predicted of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from intarsia.backends.onnx import OnnxBackend
from intarsia.bit_flow import EVERY, parts_of_loop
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import load_target
from intarsia.loop_data import PROMPTS, recorded
from intarsia.models import wan
from intarsia.models.base import Model
from intarsia.models.sampler import FlowMatchEuler, noise
from intarsia.programs import planned, predicted
from intarsia.search.bit_data import Data
from intarsia.search.bit_search import search_bits
from intarsia.search.bit_settings import BitSearch
from intarsia.search.bit_study import Part
from intarsia.search.progress import Silent
from intarsia.subject import SAMPLES, SPLITS, Subject, asked_of, resolve, video_shape

FOUR = """graph four {
  input %x: f32[16, 32]
  param %w1: f32[32, 32]
  param %w2: f32[32, 32]
  param %w3: f32[32, 32]
  param %w4: f32[8, 32]
  %first: f32[16, 32] = aten.linear(input=%x, weight=%w1)
  %a: f32[16, 32] = aten.relu(self=%first)
  %second: f32[16, 32] = aten.linear(input=%a, weight=%w2)
  %third: f32[16, 32] = aten.linear(input=%a, weight=%w3)
  %sum: f32[16, 32] = aten.add.Tensor(self=%second, other=%third)
  %b: f32[16, 32] = aten.relu(self=%sum)
  %fourth: f32[16, 8] = aten.linear(input=%b, weight=%w4)
  return %fourth
}"""

SAMPLER = FlowMatchEuler(steps=8, shift=3.0, guidance=3.0)
WHOLE = wan.wan_mini


def first_block() -> Model:
    """wan-mini cut down to its first block, with random weights, for videos of two small frames."""
    whole = WHOLE()

    def build() -> nn.Module:
        module = whole.build()
        module.blocks = module.blocks[:1]
        return module

    def inputs() -> dict[str, torch.Tensor]:
        video = noise((3, 2, 16, 16), seed=0, count=2).to(torch.get_default_device())
        return {**whole.inputs(), "hidden_states": video}

    return replace(whole, build=build, inputs=inputs, weights=None, sampler=SAMPLER)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "wan_mini", first_block)
        yield resolve("wan-mini")


def texts(calls: list[tuple[torch.Tensor, ...]]) -> set[tuple[float, ...]]:
    """The different prompts of calls, as what the network is told of them."""
    return {tuple(call[2][0].flatten().tolist()) for call in calls}


def test_every_video_takes_its_turn_so_that_all_steps_are_seen_and_the_ends_by_all(subject: Subject) -> None:
    calls = recorded(subject, every=8, always=(0, 7), seed=0, progress=Silent())
    assert [(call.step, call.video) for call in calls] == sorted((call.step, call.video) for call in calls)
    seen = {step: [call.video for call in calls if call.step == step] for step in range(8)}
    assert seen[0] == seen[7] == list(range(PROMPTS))
    assert seen[3] == [5, 13]
    assert {call.step for call in calls if call.staggered} == set(range(8))
    assert sum(call.staggered for call in calls) == PROMPTS


def test_calls_begin_with_the_noise_and_the_prompts_of_the_calibration_split(subject: Subject) -> None:
    assert subject.model is not None
    assert subject.model.condition is not None
    prompts, seed = asked_of(subject.model, "calibration", PROMPTS, 2)
    calls = recorded(subject, every=8, always=(0,), seed=2, progress=Silent())
    starts = noise(video_shape(subject.program.graph), seed=seed, count=PROMPTS)
    for call in (call for call in calls if call.step == 0):
        video, _, text = call.inputs
        assert torch.equal(video, starts[call.video].expand_as(video))
        assert torch.equal(text[:1], subject.model.condition([prompts[call.video]]).text)


@pytest.mark.parametrize("seed", [0, 5, 40])
def test_splits_share_neither_prompts_nor_noise_however_many_are_asked_for(subject: Subject, seed: int) -> None:
    assert subject.model is not None
    most = {split: max(PROMPTS, *(counts[split] for counts in SAMPLES.values())) for split in SPLITS}
    asked = {split: asked_of(subject.model, split, count, seed) for split, count in most.items()}
    for one, other in combinations(SPLITS, 2):
        assert set(asked[one][0]).isdisjoint(asked[other][0])
        assert asked[one][1] != asked[other][1]


@pytest.mark.parametrize("effort", sorted(EVERY))
def test_ranges_of_each_phase_are_measured_on_all_prompts_and_sensitivities_on_no_step_more_than_on_others(
    subject: Subject, effort: str
) -> None:
    first, second = parts_of_loop(subject, 2, effort=effort, seed=0, progress=Silent())
    assert (first.first, first.last, second.first, second.last) == (0, 2, 3, 7)
    for part in (first, second):
        assert len(texts(list(part.data.batches))) == PROMPTS
        told = sorted({float(call[1][0]) for call in part.data.batches}, reverse=True)
        assert told == pytest.approx(SAMPLER.timesteps()[part.first : (part.last or 0) + 1])
        assert part.sample is not None
        share = len(part.sample.batches) / (PROMPTS * 8 / EVERY[effort])
        assert share == pytest.approx(part.share, abs=0.1)


def test_without_phases_there_is_one_part_that_is_open_at_its_end(subject: Subject) -> None:
    (part,) = parts_of_loop(subject, 1, effort="quick", seed=0, progress=Silent())
    assert (part.first, part.last, part.share) == (0, None, 1.0)


def test_a_model_is_not_looped_over_again_for_every_phase(subject: Subject) -> None:
    phases: list[tuple[str, int | None]] = []

    class Told(Silent):
        def start(self, phase: str, total: int | None) -> None:
            phases.append((phase, total))

    parts_of_loop(subject, 4, effort="quick", seed=0, progress=Told())
    assert phases == [("calibration videos", PROMPTS * 8)]


def four_layers() -> Program:
    graph, generator = Graph.parse(FOUR), torch.Generator().manual_seed(0)
    types = {param.name: param.type for param in graph.params}
    return Program(graph, {name: torch.randn(of.shape, generator=generator) / 6 for name, of in types.items()})  # type: ignore[union-attr]


def test_the_search_and_the_export_predict_the_bytes_that_the_file_of_onnx_holds(tmp_path: Path) -> None:
    program, target = four_layers(), load_target("cpu-avx2")
    data = Data([(torch.randn(16, 32, generator=torch.Generator().manual_seed(1)),)])
    found = search_bits(program, target, (Part(data),), how=BitSearch(bops=0.0))
    made = planned(Subject("four", program), found.plan, target)
    packed = predicted(Subject("four", program), made, found.plan, target, backends=["onnx"])
    assert packed["bytes"] == found.predicted.bytes
    assert packed["four_bits"] == "weights of four bits are two a byte in the file"

    OnnxBackend().build(made.first, target, tmp_path)
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    four = [one for one in stored if one.data_type == onnx.TensorProto.INT4]
    assert sum(len(one.raw_data) for one in four) == 2 * 32 * 32 // 2
    plain = predicted(Subject("four", program), made, found.plan, target, backends=["onnx", "tvm"])
    assert plain["bytes"] == found.predicted.bytes + 2 * 32 * 32 // 2
    assert plain["four_bits"] == "a weight of four bits takes a byte in the files of tvm"


def test_nothing_is_said_of_four_bits_where_no_weight_has_them() -> None:
    program, target = four_layers(), load_target("cpu-avx2")
    subject = Subject("four", program)
    assert "four_bits" not in predicted(subject, planned(subject, None, target), None, target, backends=["onnx"])
