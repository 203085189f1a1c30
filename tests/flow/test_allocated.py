"""The loop in which each token gets the steps it needs: what it equals exactly, on the eager graph and in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.allocated import AllocatedEngine, allocation_of, denoising, empty_caches, grid_of, loop_timing
from intarsia.backends.base import Engine
from intarsia.backends.null import NullEngine
from intarsia.backends.onnx import OnnxBackend
from intarsia.backends.runner import denoiser
from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import PlanError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.spec import Spec
from intarsia.ir.target import Target
from intarsia.models.sampler import TIMESTEPS, Conditioning, FlowMatchEuler, noise
from intarsia.models.step_loop import TokenGrid, scores
from intarsia.passes.active_inputs import StepInputs
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.step_pictures import step_pictures

GOLDEN = Path(__file__).parent.parent / "golden"
TARGET = Target("null", "a machine for tests", "null", "none", {"f32": 1e12}, 1e11, 2**30, 1e-6)

GRID = TokenGrid((2, 3, 4), (4, 4, 4))
VIDEO = (2, 4, 8, 8)
SAMPLER = FlowMatchEuler(steps=12, shift=3.0, guidance=3.0)
CONDITIONING = Conditioning(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
START = noise(VIDEO, seed=1, count=1)

Answer = Callable[..., Sequence[Tensor]]
Caches = Sequence[Tensor]


@dataclass
class Done:
    """A sample, and what the loop that made it computed."""

    sample: Tensor
    active: Sequence[tuple[int, ...]]
    orders: Sequence[tuple[int, ...]]

    @property
    def share(self) -> float:
        return sum(map(len, self.active)) / (len(self.active) * GRID.count)


@dataclass
class Network:
    """The model, and the step that the pass makes of it, run by one and the same means."""

    dense: Answer
    step: Answer
    model: Graph
    graph: Graph
    calls: list[tuple[Tensor, Tensor, Caches]] = field(default_factory=list)

    @property
    def clocked(self) -> bool:
        return self.inputs.clocked

    @property
    def inputs(self) -> StepInputs:
        found = StepInputs.of(self.graph)
        assert found is not None
        return found

    @property
    def caches(self) -> Caches:
        return empty_caches(self.inputs)

    def denoise(self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.dense(hidden_states, timestep, encoder_hidden_states)[0]

    def recorded(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        velocity, *after = self.step(*inputs)
        self.calls.append((inputs[0], inputs[3], after))
        return velocity, *after

    def engine(self, allocation: Allocation) -> AllocatedEngine:
        return AllocatedEngine(self.recorded, self.graph, allocation, SAMPLER, GRID)

    def run(self, allocation: Allocation) -> Done:
        self.calls.clear()
        engine = self.engine(allocation)
        made = SAMPLER.sample(denoiser(engine, self.model), START, CONDITIONING)
        return Done(made, engine.loop.active, engine.loop.orders)


def build(program: Program, folder: Path) -> Answer:
    folder.mkdir()
    backend = OnnxBackend()
    return backend.load(folder, backend.build(program, TARGET, folder).files)


@pytest.fixture(scope="module")
def small() -> Program:
    graph = Graph.parse((GOLDEN / "small-video.graph").read_text())
    generator = torch.Generator().manual_seed(2)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) / 3 for p in graph.params})  # type: ignore[union-attr, arg-type]


@pytest.fixture(scope="module", params=["eager-held", "eager-linear", "onnx-held", "onnx-linear"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small: Program) -> Network:
    engine, _, caches = request.param.partition("-")
    made = ActiveTokens(caches).run(small.graph, TARGET, {})
    programs = small, Program(made, small.weights)
    folder = tmp_path_factory.mktemp("engines")
    dense, step = (
        build(program, folder / name) if engine == "onnx" else program.module()
        for name, program in zip(("dense", "step"), programs, strict=True)
    )
    return Network(dense, step, small.graph, made)


@pytest.fixture
def held(network: Network) -> Network:
    if network.clocked:
        pytest.skip("caches that move along are not those of the paper")
    return network


def test_all_divisors_one_is_the_dense_sampler_bit_for_bit(network: Network) -> None:
    run = network.run(Allocation(shares=(0.5, 0.5), divisors=(1, 1)))
    assert torch.equal(run.sample, SAMPLER.sample(network.denoise, START, CONDITIONING))
    assert run.share == 1


@pytest.mark.parametrize(("warm_up", "tail", "divisor"), [(2, 0, 2), (2, 1, 3), (4, 2, 3)])
def test_one_group_is_euler_on_the_grid_of_its_steps(held: Network, warm_up: int, tail: int, divisor: int) -> None:
    run = held.run(Allocation(warm_up=warm_up, tail=tail, shares=(1.0,), divisors=(divisor,)))
    computed = [step for step, active in enumerate(run.active) if active]
    assert computed == [
        step
        for step in range(SAMPLER.steps)
        if step < warm_up or step >= SAMPLER.steps - tail or (step - warm_up + 1) % divisor == 0
    ]
    sigmas = SAMPLER.sigmas()[[*computed, SAMPLER.steps]].tolist()
    expected = euler(held, sigmas)
    assert torch.allclose(run.sample, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run.sample, euler(held, SAMPLER.sigmas().tolist()), atol=1e-2)


def euler(network: Network, sigmas: Sequence[float]) -> Tensor:
    """A sample by Euler's method on a grid of noise levels."""
    state, text = START, torch.cat([CONDITIONING.text, CONDITIONING.null])
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            level = torch.full((2,), now * TIMESTEPS)
            velocity = network.denoise(
                hidden_states=torch.cat([state, state]), timestep=level, encoder_hidden_states=text
            )
            state = state + (after - now) * SAMPLER.guide(velocity)
    return state


STAGGERED = Allocation(warm_up=3, tail=1, shares=(0.25, 0.75), divisors=(1, 3), turns="staggered")


def test_moving_a_token_once_is_moving_it_step_by_step(held: Network) -> None:
    stepwise = held.run(STAGGERED)
    sigmas = SAMPLER.sigmas().tolist()
    text = torch.cat([CONDITIONING.text, CONDITIONING.null])
    there, level = START, torch.full((64,), sigmas[0])  # where each token was when it was last computed
    velocity, caches = torch.zeros_like(START), held.caches
    with torch.no_grad():
        for number, active in enumerate(stepwise.active):
            state = there + GRID.spread(sigmas[number] - level, START).float() * velocity
            rows, time = torch.cat([state, state]), torch.full((2,), sigmas[number] * TIMESTEPS)
            answer, *caches = held.step(rows, time, text, torch.tensor(active), *caches)
            computed = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(active), value=True)
            where = GRID.spread(computed, START)
            there, velocity = torch.where(where, state, there), torch.where(where, SAMPLER.guide(answer), velocity)
            level = torch.where(computed, sigmas[number], level)
    deferred = there + GRID.spread(sigmas[-1] - level, START).float() * velocity
    assert torch.allclose(deferred, stepwise.sample, rtol=1e-4, atol=1e-4)


def test_after_a_step_the_first_cache_is_what_a_dense_pass_over_that_state_writes(network: Network) -> None:
    run = network.run(STAGGERED)
    text = torch.cat([CONDITIONING.text, CONDITIONING.null])
    fewer = 0
    for number, (rows, active, caches) in enumerate(list(network.calls)):
        time = torch.full((2,), SAMPLER.timesteps()[number])
        still = (torch.zeros(64), torch.zeros(64)) if network.clocked else ()
        with torch.no_grad():
            _, dense, *_ = network.step(rows, time, text, torch.arange(64), *still, *network.caches)
        assert torch.allclose(caches[0][:, :, active], dense[:, :, active], rtol=1e-5, atol=1e-5)
        fewer += len(active) < 64
    assert fewer == SAMPLER.steps - 4
    assert run.share == pytest.approx((4 + 8 * 0.5) / 12)


def test_every_step_of_staggered_turns_computes_as_many_tokens(network: Network) -> None:
    counts = [len(active) for active in network.run(STAGGERED).active]
    assert counts == [64] * 3 + [32] * 8 + [64]


def test_tokens_that_change_most_are_computed_most_often(held: Network) -> None:
    run = held.run(STAGGERED)
    often = [sum(token in active for active in run.active) for token in run.orders[0]]
    assert often[:16] == [12] * 16
    assert max(often[16:]) == 7


def test_two_samples_at_once_are_refused(held: Network) -> None:
    two = Conditioning(CONDITIONING.text.expand(2, -1, -1), CONDITIONING.null.expand(2, -1, -1))
    run = denoiser(held.engine(Allocation()), held.model)
    with pytest.raises(UsageError, match="caches need every step in its turn, one sample after the other"):
        SAMPLER.sample(run, START.expand(2, -1, -1, -1, -1), two)


def test_a_second_sample_starts_with_caches_of_its_own(held: Network) -> None:
    run = denoiser(held.engine(STAGGERED), held.model)
    first, second = (SAMPLER.sample(run, START, CONDITIONING) for _ in range(2))
    assert torch.equal(first, second)


def test_a_window_without_steps_is_refused(held: Network) -> None:
    with pytest.raises(UsageError, match="warm_up 9 and tail 4 exceed 12 steps"):
        held.run(Allocation(warm_up=9, tail=4))


def test_caches_of_eight_bits_run_in_onnx(tmp_path: Path, small: Program) -> None:
    made = Program(ActiveTokens(cache_dtype="i8").run(small.graph, TARGET, {}), small.weights)
    engine, eager = build(made, tmp_path / "step"), made.module()
    inputs = example_inputs(small.graph)
    caches: Caches = [
        torch.zeros(value.type.shape, dtype=DTYPES[value.type.dtype])  # type: ignore[union-attr, arg-type]
        for value in made.graph.inputs[4:]
    ]
    for active in (torch.arange(64), torch.arange(0, 64, 3)):
        found, expected = (run(*inputs, active, *caches) for run in (engine, eager))
        assert torch.allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
        assert all((one.float() - other.float()).abs().max() <= 1 for one, other in zip(found, expected, strict=True))
        caches = expected[1:]


def test_onnx_says_that_it_takes_no_floats_of_eight_bits(tmp_path: Path, small: Program) -> None:
    made = Program(ActiveTokens(cache_dtype="f8e4m3").run(small.graph, TARGET, {}), small.weights)
    with pytest.raises(Unsupported, match="caches are stored in i8, not f8e4m3"):
        build(made, tmp_path / "step")


@pytest.fixture(scope="module")
def ramps(small: Program) -> Network:
    """A velocity that goes evenly with the noise level, at each place by another slope; the last one where it rests."""
    graph = ActiveTokens().run(small.graph, TARGET, {})
    slopes = torch.linspace(-1, 1, 64).reshape(4, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)

    def ramp(rows: Tensor, timestep: Tensor, text: Tensor, active: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        fresh = (1 + slopes * timestep[0] / TIMESTEPS).expand(rows.shape)
        computed = torch.zeros(64, dtype=torch.bool).index_fill(0, active, value=True)
        last = caches[0].flatten()[: fresh.numel()].reshape(fresh.shape)
        velocity = torch.where(GRID.spread(computed, fresh), fresh, last)
        kept = torch.cat([velocity.flatten(), caches[0].flatten()[fresh.numel() :]]).reshape(caches[0].shape)
        return velocity, kept, *caches[1:]

    return Network(ramp, ramp, small.graph, graph)


def test_a_velocity_that_goes_evenly_is_followed_exactly_where_it_is_linear(ramps: Network) -> None:
    def run(velocity: str, divisor: int) -> Tensor:
        return ramps.run(Allocation(3, 0, (1.0,), (divisor,), "staggered", velocity)).sample

    assert torch.allclose(run("linear", 4), run("held", 1), atol=1e-5)
    assert not torch.allclose(run("held", 4), run("held", 1), atol=1e-2)


def test_groups_formed_again_are_those_of_the_latest_change(ramps: Network) -> None:
    run = ramps.run(Allocation(3, 1, (0.5, 0.5), (1, 2), regroup="synchronized"))
    assert len(run.orders) == 1 + 4


ALLOCATION = Allocation(3, shares=(1.0,), divisors=(3,))
PLAN = Plan("0" * 12, "null", (Phase((Step(str(Spec("active-tokens", {"allocation": str(ALLOCATION)}))),)),))


def test_an_engine_of_all_tokens_is_called_as_it_is(small: Program) -> None:
    engine = NullEngine(small)
    assert denoising(engine, small.graph, None, SAMPLER, small.graph) is engine


def test_one_group_runs_the_unchanged_model_at_its_steps(held: Network, small: Program) -> None:
    """Steps that compute all tokens or none need no caches, so nothing is rewritten."""
    made = ActiveTokens(allocation=str(ALLOCATION)).run(small.graph, TARGET, {})
    assert made is small.graph
    engine = denoising(NullEngine(small), made, PLAN, SAMPLER, small.graph)
    assert isinstance(engine, AllocatedEngine)
    sample = SAMPLER.sample(denoiser(engine, held.model), START, CONDITIONING)
    torch.testing.assert_close(sample, held.run(ALLOCATION).sample, rtol=1e-4, atol=1e-5)
    found = loop_timing(engine, example_inputs(small.graph), repeats=2)
    assert [call.repeats > 0 for call in found.calls] == [True, False, True, False, True, False, True]


def test_an_engine_of_active_tokens_is_called_as_its_plan_says(small: Program) -> None:
    made = ActiveTokens().run(small.graph, TARGET, {})
    engine = denoising(NullEngine(Program(made, small.weights)), made, PLAN, SAMPLER, small.graph)
    assert isinstance(engine, AllocatedEngine)
    assert engine.grid == grid_of(small.graph) == GRID
    assert engine.allocation == allocation_of(PLAN) == ALLOCATION
    with pytest.raises(PlanError, match="active tokens need the sampler's steps"):
        denoising(engine, made, PLAN, None, small.graph)


def test_steps_that_compute_as_many_tokens_are_timed_once(small: Program) -> None:
    made = ActiveTokens().run(small.graph, TARGET, {})
    timed: list[int] = []

    class Counting(Engine):
        device = "CPU"

        def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            timed.append(len(inputs[3]))
            return inputs

    engine = AllocatedEngine(Counting(), made, Allocation(2, 1, (0.5, 0.5), (2, 4)), SAMPLER, GRID)
    found = loop_timing(engine, example_inputs(small.graph), repeats=2)
    assert set(timed) == {64, 32}
    assert sum(one.steps for one in found.phases) == SAMPLER.steps
    counts = [0 if call.repeats == 0 else 1 for call in found.calls]
    assert counts[0] == 1
    assert 0 in counts
    shares = engine.allocation.shares_by_step(SAMPLER.steps)
    idle = [one for one, call in zip(found.phases, found.calls, strict=True) if call.seconds == 0]
    assert sum(one.steps for one in idle) == shares.count(0)


@pytest.mark.parametrize("grid", [GRID, TokenGrid((4, 2, 3), (4, 4, 4)), TokenGrid((1, 1, 1), (4, 4, 4))], ids=str)
def test_values_of_tokens_are_spread_to_where_their_means_are_taken(grid: TokenGrid) -> None:
    shape = {2: (1, 2, 4, 8, 8), 4: (1, 2, 8, 8, 4), 1: (1, 64, 6)}[grid.axes[0]]
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    spread = grid.spread(values, torch.zeros(shape)).expand(shape)
    assert torch.allclose(grid.means(spread).flatten(), values, atol=1e-6)


def test_a_score_is_the_change_relative_to_what_was() -> None:
    before = torch.full((1, *VIDEO), 2.0)
    now = before.clone()
    now[0, :, 1, 2:4, 4:6] = -1.0
    alone = scores(now, before, GRID, smooth=False)[0].reshape(4, 4, 4)
    assert alone[1, 1, 2] == pytest.approx(1.5)
    assert alone.count_nonzero() == 1
    around = scores(now, before, GRID, smooth=True)[0].reshape(4, 4, 4)
    assert around.count_nonzero() == 27
    assert around[1, 1, 2] == pytest.approx(1.5 / 27)


def test_what_a_loop_computed_has_a_map_and_an_animation(held: Network, small: Program) -> None:
    engine = held.engine(Allocation(warm_up=2, shares=(0.5, 0.5), divisors=(2, 4)))
    video = SAMPLER.sample(denoiser(engine, held.model), START, CONDITIONING)[0, :1].expand(3, -1, -1, -1)
    pictures = step_pictures(engine, video, SAMPLER)
    assert {name: data[:3] for name, data in pictures.items()} == {"steps.png": b"\x89PN", "steps.gif": b"GIF"}
    assert step_pictures(NullEngine(small), video, SAMPLER) == {}


@pytest.mark.parametrize("frames", [1, 2])
def test_scores_of_short_videos_are_smoothed_too(frames: int) -> None:
    grid, before = TokenGrid((2, 3, 4), (frames, 4, 4)), torch.ones(1, 2, frames, 8, 8)
    now = before.clone()
    now[0, :, 0, :2, :2] = 4.0
    found = scores(now, before, grid, smooth=True)[0].reshape(frames, 4, 4)
    assert found[0, 0, 0] == pytest.approx(3 / (4 * frames))
    assert found.count_nonzero() == 4 * frames
