"""Pictures of which tokens ran at which step show just that."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.step_pictures import StepTrace, estimates, step_animation, step_map

EXTENTS = (2, 2, 2)
EVERY = tuple(range(8))
TRACE = StepTrace((EVERY, EVERY, (0, 4), (1, 5), EVERY), EXTENTS)
BLACK = -torch.ones(3, 4, 16, 16)


def pixels(data: bytes, frame: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    picture = Image.open(io.BytesIO(data))
    picture.seek(frame)
    return np.asarray(picture.convert("RGB")).astype(np.int64)


def test_a_trace_tells_for_each_step_which_tokens_it_computed() -> None:
    computed = TRACE.computed
    assert computed.shape == (5, 2, 2, 2)
    assert computed.sum(axis=0).tolist() == [[[4, 4], [3, 3]], [[4, 4], [3, 3]]]


def test_estimates_are_the_video_where_the_velocity_is_straight() -> None:
    data, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = [1.0, 0.7, 0.2, 0.0]
    states = [data + sigma * (noise - data) for sigma in sigmas]
    for estimate in estimates(states, sigmas):
        assert torch.allclose(estimate, data, atol=1e-5)


def test_the_map_is_brighter_where_tokens_got_more_steps() -> None:
    few = pixels(step_map(BLACK, TRACE))
    more = pixels(step_map(BLACK, StepTrace((EVERY,) * 5, EXTENTS)))
    assert few.shape == more.shape == (few.shape[0], 1000, 3)
    dark = (few[:, 100:] < 40).all(axis=-1)
    rows = np.flatnonzero(dark.mean(axis=1) > 0.8)  # the video itself is black
    below = slice(rows[-1] + 12, rows[-1] + 12 + len(rows) - 4)
    assert few[below, 150:200].sum() < more[below, 150:200].sum()
    assert np.array_equal(few[rows[0] : rows[-1], 100:980], more[rows[0] : rows[-1], 100:980])


def test_a_veil_lies_over_the_tokens_that_rest() -> None:
    data = step_animation([BLACK], TRACE, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.n_frames == 5
    dense, few = pixels(data, 0), pixels(data, 2)
    top, left, token = 60, 16, 64
    quarters = {
        (row, column): few[top + row * token + 20, left + column * token + 20] for row in (0, 1) for column in (0, 1)
    }
    assert quarters[0, 0].max() < 40  # token 0 is computed
    assert all(quarters[place].min() > 120 for place in ((0, 1), (1, 0), (1, 1)))
    assert dense[top + 2 : top + 120, left + 2 : left + 120].max() < 40


@pytest.mark.parametrize("frames", [1, 3, 21])
def test_long_and_short_videos_have_pictures(frames: int) -> None:
    video, trace = torch.zeros(3, frames, 24, 40), StepTrace(((0,),) * 3, (frames, 3, 5))
    for data in (step_map(video, trace), step_animation([video] * 3, trace, [1.0, 0.5, 0.2])):
        assert pixels(data).ndim == 3
