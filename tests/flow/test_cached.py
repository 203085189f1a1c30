"""The loop in which steps reuse what their blocks added last: what it equals exactly, and the published rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.null import NullEngine
from intarsia.backends.runner import denoiser
from intarsia.backends.segmented import Segment, SegmentedEngine
from intarsia.cached import CachedEngine, Watch, cached_loop_timing, relative_change, rule_of
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, example_inputs
from intarsia.looped import looped
from intarsia.models.sampler import Conditioning, FlowMatchEuler, noise
from intarsia.passes.step_caching import FirstBlockCache, StepCaching, TeaCache
from intarsia.signal_fit import Recorded

GOLDEN = Path(__file__).parent.parent / "golden"

SAMPLER = FlowMatchEuler(steps=12, shift=3.0, guidance=3.0)
CONDITIONING = Conditioning(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
START = noise((2, 4, 8, 8), seed=1, count=1)


class Counted(Engine):
    """An engine that keeps what it was given."""

    device = "CPU"

    def __init__(self, program: Program) -> None:
        self.engine, self.calls = NullEngine(program), list[tuple[Tensor, ...]]()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.calls.append(inputs)
        return self.engine(*inputs)


@pytest.fixture(scope="module")
def small() -> Program:
    graph = Graph.parse((GOLDEN / "small-video.graph").read_text())
    generator = torch.Generator().manual_seed(2)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) / 3 for p in graph.params})  # type: ignore[union-attr, arg-type]


def cached(program: Program, rule: StepCaching) -> CachedEngine:
    graphs = rule.split(program.graph)
    parts = [Program(one, {param.name: program.weights[param.name] for param in one.params}) for one in graphs]
    segments = tuple(Segment(part.graph, Counted(part)) for part in parts)
    return CachedEngine(SegmentedEngine(segments, program.graph), rule, SAMPLER)


def sample(engine: Engine, graph: Graph) -> Tensor:
    return SAMPLER.sample(denoiser(engine, graph), START, CONDITIONING)


def calls(engine: CachedEngine) -> list[list[tuple[Tensor, ...]]]:
    return [segment.engine.calls for segment in engine.engine.segments]  # type: ignore[attr-defined]


KINDS = [TeaCache, FirstBlockCache]


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_of_0_is_the_dense_sampler_bit_for_bit(kind: type[StepCaching], small: Program) -> None:
    engine = cached(small, kind(threshold=0.0))
    assert torch.equal(sample(engine, small.graph), sample(NullEngine(small), small.graph))
    assert engine.loops == [[True] * 12]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warm_up", "tail"), [(1, 1), (3, 0), (2, 3)])
def test_a_threshold_out_of_reach_computes_the_first_and_the_last_steps_alone(
    kind: type[StepCaching], warm_up: int, tail: int, small: Program
) -> None:
    engine = cached(small, kind(threshold=1e9, warm_up=warm_up, tail=tail))
    sample(engine, small.graph)
    assert engine.watch.computed == [True] * warm_up + [False] * (12 - warm_up - tail) + [True] * tail
    assert [len(one) for one in calls(engine)] == [12, warm_up + tail, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_adds_what_the_blocks_added_last(kind: type[StepCaching], small: Program) -> None:
    engine = cached(small, kind(threshold=1e9, warm_up=1, tail=0))
    velocity = sample(engine, small.graph)
    before, _, head = engine.engine.segments
    given, _, heads = calls(engine)
    streams = [before.engine(*inputs)[1] for inputs in [*given]]
    at = [value.name for value in head.graph.inputs].index(engine.engine.segments[1].graph.outputs[0])
    added = heads[0][at] - streams[0]
    for stream, inputs in zip(streams[1:], heads[1:], strict=True):
        assert torch.equal(inputs[at], stream + added)
    assert not torch.allclose(velocity, sample(NullEngine(small), small.graph), atol=1e-2)


def watch(rule: StepCaching, signals: list[float]) -> list[bool]:
    found = Watch(rule, len(signals))
    return [found.computes(torch.tensor([signal, -signal])) for signal in signals]


def test_tea_cache_sums_up_changes_from_step_to_step_until_they_reach_the_threshold() -> None:
    signals = [1.0, 1.1, 1.21, 1.331, 1.4641, 1.61051, 1.771561]  # each 10 % above the one before
    assert watch(TeaCache(threshold=0.25, tail=0), signals) == [True, False, False, True, False, False, True]
    assert watch(TeaCache(threshold=0.15, tail=0), signals) == [True, False, True, False, True, False, True]
    assert watch(TeaCache(threshold=0.25, tail=2), signals) == [True, False, False, True, False, True, True]


def test_tea_cache_puts_each_change_through_its_polynomial() -> None:
    signals = [1.0, 1.1, 1.21, 1.331, 1.4641]
    doubled = TeaCache(threshold=0.25, tail=0, coefficients=(2.0, 0.0))
    assert watch(doubled, signals) == [True, False, True, False, True]
    squared = TeaCache(threshold=0.025, tail=0, coefficients=(1.0, 0.0, 0.0))
    assert watch(squared, signals) == [True, False, False, True, False]


def test_the_first_block_cache_holds_a_residual_against_that_of_the_last_computed_step() -> None:
    rule = FirstBlockCache(threshold=0.25, tail=0)
    assert watch(rule, [1.0, 1.2, 1.0, 1.2, 1.24, 1.3, 1.5, 1.7]) == [
        True,
        False,
        False,
        False,
        False,
        True,
        False,
        True,
    ]
    assert watch(rule, [1.0, 1.1, 1.2, 1.3, 1.3]) == [True, False, False, True, False]


def test_a_change_is_relative_and_of_all_rows_together() -> None:
    before = torch.tensor([[1.0, -1.0], [3.0, -3.0]])
    assert relative_change(before + torch.tensor([[0.0], [0.5]]), before) == pytest.approx(0.25 / 2)
    assert relative_change(before.bfloat16(), before) == 0


def test_a_second_sample_reuses_nothing_of_the_first(small: Program) -> None:
    engine = cached(small, TeaCache(threshold=0.3))
    first, second = (sample(engine, small.graph) for _ in range(2))
    assert torch.equal(first, second)
    assert len(engine.loops) == 2
    assert engine.loops[0] == engine.loops[1]
    assert 2 < sum(engine.loops[0]) < 12


def test_the_polynomial_tells_how_far_the_answer_moves_where_the_signal_does(small: Program) -> None:
    recorded = Recorded(cached(small, TeaCache(threshold=0.0)))
    for _ in range(2):
        SAMPLER.sample(denoiser(recorded, small.graph), START, CONDITIONING)
    assert len(recorded.moves) == 2 * 11
    polynomial = TeaCache(coefficients=recorded.coefficients())
    moves = torch.tensor([answer for _, answer in recorded.moves])
    told = torch.tensor([polynomial.reach(0.0, signal) for signal, _ in recorded.moves])
    assert (told - moves).square().sum() < 0.5 * (moves - moves.mean()).square().sum()


def test_steps_of_a_loop_are_timed_by_whether_they_were_computed(small: Program) -> None:
    engine = cached(small, FirstBlockCache(threshold=1e9, warm_up=2, tail=3))
    found = cached_loop_timing(engine, example_inputs(small.graph), repeats=2)
    assert [(one.first, one.last) for one in found.phases] == [(0, 1), (2, 8), (9, 11)]
    computed, skipped, again = found.calls
    assert computed == again
    assert 0 < skipped.seconds < computed.seconds
    assert found.call.seconds == pytest.approx((5 * computed.seconds + 7 * skipped.seconds) / 12)


def test_the_engine_of_a_plan_is_called_as_its_rule_says(small: Program) -> None:
    plan = Plan("0" * 12, "null", (Phase((Step("teacache(threshold=0.2)"),)),))
    segments = cached(small, TeaCache()).engine
    engine = looped(segments, small.graph, plan, SAMPLER, small.graph)
    assert isinstance(engine, CachedEngine)
    assert (engine.rule, engine.engine) == (TeaCache(0.2), segments)
    with pytest.raises(PlanError, match="small_video: teacache needs the sampler's steps"):
        looped(segments, small.graph, plan, None, small.graph)


def test_two_samples_at_once_are_refused(small: Program) -> None:
    engine = cached(small, FirstBlockCache(tail=0))
    two = Conditioning(CONDITIONING.text.expand(2, -1, -1), CONDITIONING.null.expand(2, -1, -1))
    with pytest.raises(UsageError, match="first-block-cache: step 1 follows step 1; what is reused needs every step"):
        SAMPLER.sample(denoiser(engine, small.graph), START.expand(2, -1, -1, -1, -1), two)


def test_more_steps_than_the_loop_has_are_refused(small: Program) -> None:
    with pytest.raises(UsageError, match="teacache: warm_up 9 and tail 4 exceed 12 steps"):
        cached(small, TeaCache(warm_up=9, tail=4))


def test_a_plan_tells_the_rule() -> None:
    def plan(*passes: str) -> Plan:
        return Plan("0" * 12, "null", (Phase(tuple(Step(one) for one in passes)),))

    assert rule_of(plan("clean", "teacache(threshold=0.2)")) == TeaCache(0.2)
    assert rule_of(plan("clean")) is None
    assert rule_of(None) is None
