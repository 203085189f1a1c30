"""The loop in which each token gets the steps it needs: what it equals exactly, on the eager graph and in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.models.allocated_sampler import Caches, Clock, Run, TokenGrid, sample, scores
from intarsia.models.sampler import TIMESTEPS, Conditioning, FlowMatchEuler, noise
from intarsia.passes.active_tokens import ActiveTokens

GOLDEN = Path(__file__).parent.parent / "golden"
TARGET = Target("null", "a machine for tests", "null", "none", {"f32": 1e12}, 1e11, 2**30, 1e-6)

GRID = TokenGrid((2, 3, 4), (4, 4, 4))
VIDEO = (2, 4, 8, 8)
SAMPLER = FlowMatchEuler(steps=12, shift=3.0, guidance=3.0)
CONDITIONING = Conditioning(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
START = noise(VIDEO, seed=1, count=1)

Answer = Callable[..., Sequence[Tensor]]


@dataclass
class Network:
    """The model, and the step that the pass makes of it, run by one and the same means."""

    dense: Answer
    step: Answer
    caches: Caches
    clocked: bool = False
    calls: list[tuple[Tensor, Tensor, Caches]] = field(default_factory=list)

    def denoise(self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.dense(hidden_states, timestep, encoder_hidden_states)[0]

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        active: Tensor,
        clock: Clock,
        caches: Caches,
    ) -> tuple[Tensor, Caches]:
        told = (clock.elapsed, clock.rate) if self.clocked else ()
        velocity, *after = self.step(hidden_states, timestep, encoder_hidden_states, active, *told, *caches)
        self.calls.append((hidden_states, active, after))
        return velocity, after

    def run(self, allocation: Allocation) -> Run:
        self.calls.clear()
        return sample(SAMPLER, allocation, self, START, CONDITIONING, caches=self.caches, grid=GRID)


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
    first = [value.name for value in made.inputs].index("active") + (3 if caches == "linear" else 1)
    empty = [torch.zeros(value.type.shape) for value in made.inputs[first:]]  # type: ignore[union-attr, arg-type]
    return Network(dense, step, empty, clocked=caches == "linear")


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
        still = (torch.zeros(1), torch.zeros(64)) if network.clocked else ()
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
    two = replace(CONDITIONING, text=CONDITIONING.text.expand(2, -1, -1))
    with pytest.raises(UsageError, match="2 samples at once; tokens are chosen for one sample at a time"):
        sample(SAMPLER, Allocation(), held, START.expand(2, -1, -1, -1, -1), two, caches=held.caches, grid=GRID)


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


def ramp(
    *, hidden_states: Tensor, timestep: Tensor, active: Tensor, caches: Caches, **_: object
) -> tuple[Tensor, Caches]:
    """A velocity that goes evenly with the noise level, at each place by another slope; the last one where it rests."""
    slopes = torch.linspace(-1, 1, 64).reshape(4, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    fresh = (1 + slopes * timestep[0] / TIMESTEPS).expand(hidden_states.shape)
    computed = torch.zeros(64, dtype=torch.bool).index_fill(0, active, value=True)
    velocity = torch.where(GRID.spread(computed, fresh), fresh, caches[0])
    return velocity, (velocity,)


def test_a_velocity_that_goes_evenly_is_followed_exactly_where_it_is_linear() -> None:
    empty = (torch.zeros(2, *VIDEO),)

    def run(velocity: str, divisor: int) -> Tensor:
        allocation = Allocation(3, 0, (1.0,), (divisor,), "staggered", velocity)
        return sample(SAMPLER, allocation, ramp, START, CONDITIONING, caches=empty, grid=GRID).sample

    assert torch.allclose(run("linear", 4), run("held", 1), atol=1e-5)
    assert not torch.allclose(run("held", 4), run("held", 1), atol=1e-2)


def test_groups_formed_again_are_those_of_the_latest_change() -> None:
    allocation = Allocation(3, 1, (0.5, 0.5), (1, 2), regroup="synchronized")
    empty = (torch.zeros(2, *VIDEO),)
    done: list[tuple[int, int]] = []
    run = sample(
        SAMPLER, allocation, ramp, START, CONDITIONING, caches=empty, grid=GRID,
        progress=lambda step, steps: done.append((step, steps)),
    )  # fmt: skip
    assert len(run.orders) == 1 + 4
    assert done == [(step, 12) for step in range(1, 13)]


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
