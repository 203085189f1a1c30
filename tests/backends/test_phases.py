from __future__ import annotations

import pytest
import torch

from intarsia.backends.by_step import at_step, by_step
from intarsia.backends.phases import StepRange, step_ranges, title
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase
from intarsia.models.sampler import Conditioning, FlowMatchEuler

SAMPLER = FlowMatchEuler(steps=10, shift=3.0, guidance=1.0)


def network(dtype: str = "f32") -> Graph:
    return Graph.parse(f"""graph network {{
      input %x: f32[N, 2]
      input %timestep: {dtype}[N]
      %y: f32[N, 2] = aten.relu(self=%x)
      return %y
    }}""")


def runs(count: int):  # type: ignore[no-untyped-def]
    """Networks that answer with their own number."""
    return [lambda x, _, number=number: (torch.full_like(x, number),) for number in range(count)]


def answer(run, timestep: float) -> float:  # type: ignore[no-untyped-def]
    return float(run(torch.zeros(2, 2), torch.full((2,), timestep))[0][0, 0])


def test_each_step_of_the_loop_goes_to_the_network_of_its_phase() -> None:
    ranges = step_ranges((Phase((), 0, 2), Phase((), 3, 3), Phase((), 4, None)), SAMPLER.timesteps())
    run = by_step(runs(3), ranges, network())
    seen: list[float] = []

    def denoise(*, hidden_states, timestep, encoder_hidden_states):  # type: ignore[no-untyped-def]
        seen.append(float(run(hidden_states, timestep)[0][0, 0]))
        return torch.zeros_like(hidden_states)

    SAMPLER.sample(denoise, torch.zeros(2, 2), Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)))
    assert seen == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]


def test_a_timestep_between_two_steps_goes_to_the_nearer_one() -> None:
    steps = SAMPLER.timesteps()
    run = by_step(runs(2), step_ranges((Phase((), 0, 2), Phase((), 3)), steps), network())
    middle = (steps[2] + steps[3]) / 2
    assert [answer(run, middle + 1), answer(run, middle - 1)] == [0, 1]
    assert [answer(run, 2000), answer(run, 0)] == [0, 1]


def test_a_call_whose_rows_belong_to_several_phases_is_refused() -> None:
    run = by_step(runs(2), step_ranges((Phase((), 0, 2), Phase((), 3)), SAMPLER.timesteps()), network())
    with pytest.raises(UsageError, match="timesteps of phases 0 and 1; split its rows"):
        run(torch.zeros(2, 2), torch.tensor([1000.0, 1.0]))


def test_integer_timesteps_are_told_apart_as_they_are_rounded() -> None:
    ranges = step_ranges((Phase((), 0, 4), Phase((), 5)), SAMPLER.timesteps())
    run = by_step(runs(2), ranges, network("i64"))
    assert [answer(run, int(step)) for step in SAMPLER.timesteps()] == [0] * 5 + [1] * 5


def test_timesteps_too_coarse_to_tell_the_phases_apart_are_refused() -> None:
    fine = FlowMatchEuler(steps=400, shift=8.0).timesteps()
    with pytest.raises(PlanError, match="is bf16, in which the last step of phase 0 and the first of phase 1 are both"):
        by_step(runs(2), step_ranges((Phase((), 0, 1), Phase((), 2)), fine), network("bf16"))


def test_a_network_without_timestep_has_no_phases() -> None:
    ranges = step_ranges((Phase((), 0, 4), Phase((), 5)), SAMPLER.timesteps())
    graph = Graph.parse("graph g {\n input %x: f32[2]\n %y: f32[2] = aten.relu(self=%x)\n return %y\n}")
    with pytest.raises(PlanError, match="graph g: phases are told apart by the input %timestep; it takes x"):
        by_step(runs(2), ranges, graph)


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ((Phase((), 0, 3), Phase((), 4, 8)), "the last phase ends at step 8; the sampler goes on to 9"),
        ((Phase((), 0, 3), Phase((), 4, 10)), "phase 1 is steps 4 to 10; the sampler's are 0 to 9"),
        ((Phase((), 0, 9), Phase((), 10)), "phase 1 is steps 10 to the last; the sampler's are 0 to 9"),
        ((Phase((), 0, 0),), "the last phase ends at step 0; the sampler goes on to 9"),
    ],
)
def test_phases_that_do_not_fit_the_sampler_are_refused(phases: tuple[Phase, ...], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        step_ranges(phases, SAMPLER.timesteps())


def test_phases_come_back_from_json_and_are_named_by_their_steps() -> None:
    phases = (Phase((), 0, 0), Phase((), 1, 3), Phase((), 4, None))
    ranges = step_ranges(phases, SAMPLER.timesteps(), programs=(0, 1, 0))
    assert tuple(StepRange.from_json(one.to_json()) for one in ranges) == ranges
    assert title(ranges, 0) == "phases 0 and 2 (steps 0, 4 to 9)"
    assert title(ranges, 1) == "phase 1 (steps 1 to 3)"
    assert sum(one.steps for one in ranges) == 10


def test_inputs_are_put_at_the_first_step_of_a_phase() -> None:
    _, late = step_ranges((Phase((), 0, 2), Phase((), 3)), SAMPLER.timesteps())
    x, timestep = at_step((torch.ones(2, 2), torch.zeros(2)), network(), late)
    assert torch.equal(x, torch.ones(2, 2))
    assert timestep.tolist() == pytest.approx([SAMPLER.timesteps()[3]] * 2)
