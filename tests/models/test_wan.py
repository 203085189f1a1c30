import math
from dataclasses import replace

import pytest
import torch

from intarsia.models import detector, shapes
from intarsia.models.base import find, load, meta
from intarsia.models.sampler import denoiser, noise

pytest.importorskip("diffusers")


def parameters_of(*, width: int, layers: int, feed_forward: int) -> int:
    """Weights and biases of Wan 2.1, counted by hand."""

    def linear(columns: int, rows: int) -> int:
        return columns * rows + rows

    attention = 4 * linear(width, width) + 2 * width  # q, k, v, out; the norms of q and k
    block = 2 * attention + linear(width, feed_forward) + linear(feed_forward, width) + 2 * width + 6 * width
    text = linear(4096, width) + linear(width, width)
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    patches = linear(16 * 1 * 2 * 2, width) + linear(width, 16 * 1 * 2 * 2)
    return layers * block + text + time + patches + 2 * width


@pytest.mark.parametrize(
    ("name", "expected", "width", "layers", "feed_forward"),
    [
        ("wan2.1-t2v-1.3b", 1_418_996_800, 1536, 30, 8960),
        ("wan2.1-t2v-14b", 14_288_491_584, 5120, 40, 13824),
    ],
)
def test_published_sizes_have_the_published_parameters(
    name: str, expected: int, width: int, layers: int, feed_forward: int
) -> None:
    module = meta(find(name))
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == expected == parameters_of(width=width, layers=layers, feed_forward=feed_forward)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    # diffusers keeps these in f32 whatever the rest is loaded in.
    assert module.get_parameter("blocks.0.scale_shift_table").dtype == torch.float32


def test_published_models_map_their_example_inputs_to_a_velocity() -> None:
    model = find("wan2.1-t2v-1.3b")
    with torch.device("meta"):
        inputs = model.inputs()
    velocity = meta(model)(**inputs, **model.static)[0]
    assert velocity.shape == inputs["hidden_states"].shape == (1, 16, 21, 60, 104)
    assert math.prod(velocity.shape[2:]) // 4 == 32760


@pytest.mark.parametrize("name", ["wan-mini", "wan2.1-t2v-1.3b"])
def test_example_inputs_are_the_same_each_time(name: str) -> None:
    first, second = find(name).inputs(), find(name).inputs()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_varying_axes_exist() -> None:
    for name in ("wan-mini", "wan2.1-t2v-14b"):
        model = find(name)
        inputs = model.inputs()
        assert all(axis < inputs[key].ndim for key, axes in model.dynamic.items() for axis in axes)


def test_wan_mini_fits_in_8_megabytes_and_runs_512_tokens() -> None:
    model = find("wan-mini")
    assert model.weights is not None
    assert model.weights.stat().st_size <= 8_000_000
    module = load(model)
    assert sum(parameter.numel() for parameter in module.parameters()) == 1_771_952
    seen: list[tuple[int, ...]] = []
    module.get_submodule("blocks.0.attn1.to_q").register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        velocity = module(**model.inputs(), **model.static)[0]
    assert seen == [(2, 512, 128)]
    assert velocity.shape == (2, 3, 8, 32, 32)


def test_shipped_weights_draw_what_is_asked() -> None:
    model = find("wan-mini")
    assert model.sampler is not None
    assert model.condition is not None
    asked = [shapes.Label.parse("red disc moving left"), shapes.Label.parse("green triangle moving up")]
    start = noise(model.inputs()["hidden_states"].shape[1:], seed=99, count=2)
    sampler = replace(model.sampler, steps=6)
    videos = sampler.sample(denoiser(load(model)), start, model.condition(list(map(str, asked))))
    assert detector.read(videos) == asked


@pytest.mark.slow
def test_the_shipped_sampler_draws_what_is_asked() -> None:
    model = find("wan-mini")
    assert model.sampler is not None
    assert model.condition is not None
    asked = shapes.labels()[7::24]
    start = noise(model.inputs()["hidden_states"].shape[1:], seed=98, count=2)
    videos = model.sampler.sample(denoiser(load(model)), start, model.condition(list(map(str, asked))))
    assert detector.read(videos) == list(asked)


def test_shipped_prompts_are_understood() -> None:
    model = find("wan-mini")
    assert model.condition is not None
    assert len(model.condition(model.prompts).text) == len(model.prompts) == 48
