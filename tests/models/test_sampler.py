import pytest
import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.models.sampler import Conditioning, FlowMatchEuler, denoiser, noise

CONDITIONING = Conditioning(text=torch.ones(3, 2, 4), null=torch.zeros(3, 2, 4))


def curved(*, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """A velocity that depends on all it is given."""
    return hidden_states.sin() * timestep[:, None] / 1000 + encoder_hidden_states.mean((1, 2))[:, None]


def test_sigmas_fall_from_one_to_exactly_zero() -> None:
    sigmas = FlowMatchEuler(steps=40, shift=3.0).sigmas()
    assert sigmas.shape == (41,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_without_shift_sigmas_are_evenly_spaced() -> None:
    assert FlowMatchEuler(steps=4, shift=1.0).sigmas().tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_shift_holds_sigmas_near_noise() -> None:
    # 3 * 0.5 / (1 + 2 * 0.5)
    assert FlowMatchEuler(steps=2, shift=3.0).sigmas().tolist() == [1.0, 0.75, 0.0]


def test_a_sample_is_euler_s_sum_written_by_hand() -> None:
    sampler = FlowMatchEuler(steps=5, shift=2.0, guidance=4.0)
    start = noise((6,), seed=1, count=3)
    state = start
    for now, after in zip(sampler.sigmas()[:-1], sampler.sigmas()[1:], strict=True):
        asked, null = (
            curved(hidden_states=state, timestep=torch.full((3,), now * 1000), encoder_hidden_states=text)
            for text in (CONDITIONING.text, CONDITIONING.null)
        )
        state = state + float(after - now) * (null + 4.0 * (asked - null))
    assert torch.allclose(sampler.sample(curved, start, CONDITIONING), state, atol=1e-6)


def test_one_step_along_a_straight_velocity_is_the_data() -> None:
    start, data = noise((6,), seed=1, count=3), noise((6,), seed=2, count=3)
    made = FlowMatchEuler(steps=1, guidance=1.0).sample(lambda **_: start - data, start, CONDITIONING)
    assert torch.allclose(made, data, atol=1e-6)


def test_guidance_runs_asked_and_null_as_one_batch() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(*, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        seen.append((timestep, encoder_hidden_states))
        return hidden_states

    FlowMatchEuler(steps=2, shift=1.0, guidance=3.0).sample(watch, noise((6,), seed=1, count=3), CONDITIONING)
    assert [row[0].tolist() for row in seen] == [[1000.0] * 6, [500.0] * 6]
    assert torch.equal(seen[0][1], torch.cat([CONDITIONING.text, CONDITIONING.null]))


def test_guidance_of_one_skips_the_null_branch() -> None:
    rows: list[int] = []

    def watch(*, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        rows.append(len(hidden_states))
        return hidden_states

    FlowMatchEuler(steps=1, guidance=1.0).sample(watch, noise((6,), seed=1, count=3), CONDITIONING)
    assert rows == [3]


def test_the_same_noise_gives_the_same_sample() -> None:
    sampler, start = FlowMatchEuler(steps=5), noise((6,), seed=1, count=3)
    assert torch.equal(sampler.sample(curved, start, CONDITIONING), sampler.sample(curved, start, CONDITIONING))


def test_progress_counts_the_steps() -> None:
    seen: list[tuple[int, int]] = []
    start = noise((6,), seed=1, count=3)
    FlowMatchEuler(steps=3).sample(curved, start, CONDITIONING, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_noise_without_a_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^sampler: 2 rows of noise for 3 of conditioning$"):
        FlowMatchEuler().sample(curved, noise((6,), seed=1, count=2), CONDITIONING)


def test_json_gives_the_same_sampler_back() -> None:
    sampler = FlowMatchEuler(steps=12, shift=2.5, guidance=1.0)
    assert FlowMatchEuler.from_json(sampler.to_json()) == sampler


def test_json_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^sampler: found order, steps; the fields are steps, shift, guidance$"):
        FlowMatchEuler.from_json('{"steps": 4, "order": 2}')


@pytest.mark.parametrize(("field", "text"), [({"steps": 0}, "steps is 0"), ({"shift": 0.0}, "shift is 0.0")])
def test_impossible_settings_are_refused(field: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        FlowMatchEuler(**field)


def test_a_row_of_noise_is_the_same_whatever_the_batch() -> None:
    assert torch.equal(noise((3, 4), seed=7, count=5)[3:], noise((3, 4), seed=7, count=2, first=3))


def test_rows_and_seeds_do_not_share_noise() -> None:
    # The last two differ only above the 32 bits that the generator keeps of its seed.
    rows = torch.cat([noise((8,), seed=seed, count=2) for seed in (0, 1, 2**32)])
    assert len({tuple(row.tolist()) for row in rows}) == 6


def test_a_diffusers_module_is_opened_to_its_velocity() -> None:
    class Doubles(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))

        def forward(
            self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            assert hidden_states.dtype == torch.bfloat16
            assert timestep.dtype == torch.float32
            assert not return_dict
            return (self.two * hidden_states,)

    velocity = denoiser(Doubles())(
        hidden_states=torch.ones(1, 2), timestep=torch.ones(1), encoder_hidden_states=torch.ones(1, 1, 1)
    )
    assert velocity.tolist() == [[2.0, 2.0]]
