"""Rounding in float gives what integers stand for, and lets gradients through."""

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.ir.operators import resolve

kernels.register()


def fake_quantize(input: Tensor, scale: float, low: int, high: int) -> Tensor:
    return resolve("intarsia.fake_quantize")(input, scale, low, high)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 15), (-8, 7), (-32768, 32767)])
def test_a_value_becomes_the_nearest_multiple_of_the_scale_inside_the_grid(low: int, high: int) -> None:
    x = torch.tensor([-1e6, -0.26, -0.25, 0.0, 0.24, 0.25, 0.75, 1e6])
    codes = [low, max(low, -1), 0, 0, 0, 0, min(2, high), high]
    assert (fake_quantize(x, 0.5, low, high) / 0.5).tolist() == codes


def test_the_gradient_passes_inside_the_grid_and_is_zero_outside() -> None:
    x = torch.tensor([-1.0, -0.1, 0.0, 1.0, 7.6, 8.0], requires_grad=True)
    (3 * fake_quantize(x, 0.5, 0, 15)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 3, 3, 3, 3, 0]


def test_gradients_of_weight_and_bias_pass_straight_through() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    x = torch.randn(5, 3)
    rounded = resolve("intarsia.fake_quantize_channels")(weight, 4)
    shifted = resolve("intarsia.fake_quantize_bias")(bias, weight, 4, 0.1)
    torch.nn.functional.linear(x, rounded, shifted).sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 3))
    torch.testing.assert_close(bias.grad, torch.full((4,), 5.0))


@pytest.mark.parametrize("bits", [4, 8])
def test_each_channel_of_a_weight_has_a_grid_of_its_own_and_a_dead_one_stays_zero(bits: int) -> None:
    weight = torch.randn(3, 2, 3, 3) * torch.tensor([1.0, 100.0, 0.0]).reshape(3, 1, 1, 1)
    rounded = resolve("intarsia.fake_quantize_channels")(weight, bits)
    step = weight.abs().amax(dim=(1, 2, 3)) / (2 ** (bits - 1) - 1)
    assert not rounded[2].any()
    assert ((rounded - weight).abs().amax(dim=(1, 2, 3)) <= step * 0.501).all()


def test_a_bias_becomes_whole_steps_of_the_sum_that_it_is_added_to() -> None:
    weight, bias = torch.tensor([[1.27], [12.7]]), torch.tensor([0.0123, -0.123])
    rounded = resolve("intarsia.fake_quantize_bias")(bias, weight, 8, 0.5)
    torch.testing.assert_close(rounded, torch.tensor([0.010, -0.10]))


def test_a_scale_that_is_no_positive_number_is_refused() -> None:
    with pytest.raises(RuntimeError, match="fake_quantize: scale is a positive number, found 0"):
        fake_quantize(torch.ones(2, device="meta"), 0.0, 0, 15)
