"""Ranges of activations: three methods against their definitions, and data that is none."""

import pytest
import torch
from torch import Tensor

from intarsia.ir.errors import SpecError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.passes.calibrate import range_of
from intarsia.search.calibration import LeastError, MinMax, Percentile, calibrate, find_method, warnings

GRAPH = Graph.parse("""graph g {
  input %x: f32[4, 8]
  param %w: f32[8, 8]
  %y: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=None)
  %z: f32[4, 8] = aten.relu(self=%y)
  return %z
}""")


def program(gain: float = 1.0) -> Program:
    return Program(GRAPH, {"w": gain * torch.eye(8)})


def batch(*numbers: float) -> tuple[Tensor]:
    return (torch.tensor(numbers).repeat(4, 8 // len(numbers)),)


def taken(method: MinMax | Percentile | LeastError, *batches: Tensor) -> tuple[float, float]:
    seen = method.begin()
    for one in batches:
        seen.take(one)
    return seen.range()


def test_ranges_are_those_of_the_networks_input_and_of_what_its_layers_give() -> None:
    found = calibrate(program(2.0), [batch(-3.0, 1.0)], MinMax())
    assert {name: range_of(option) for name, option in found.items()} == {"x": (-3.0, 1.0), "z": (0.0, 2.0)}


def test_minmax_is_a_moving_average_that_begins_with_the_first_batch() -> None:
    found = calibrate(program(), [batch(-1.0, 1.0), batch(-2.0, 3.0)], MinMax(momentum=0.9))
    assert range_of(found["x"]) == pytest.approx((-1.1, 1.2))
    widest = calibrate(program(), [batch(-2.0, 1.0), batch(-1.0, 3.0)], MinMax(widest=True))
    assert range_of(widest["x"]) == (-2.0, 3.0)


def test_a_percentile_leaves_out_as_many_on_either_side() -> None:
    numbers = torch.linspace(-1.0, 1.0, 20_001)
    assert taken(Percentile(keep=90.0), numbers) == pytest.approx((-0.9, 0.9), abs=2e-3)
    assert taken(Percentile(keep=100.0), numbers) == pytest.approx((-1.0, 1.0), abs=1e-6)


def test_a_histogram_widens_for_larger_numbers_and_forgets_none() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5_000, generator=generator) * gain for gain in (1.0, 10.0, 0.1, 40.0)]
    whole = torch.cat(batches)
    expected = tuple(float(whole.quantile(share)) for share in (0.005, 0.995))
    assert taken(Percentile(keep=99.0), *batches) == pytest.approx(expected, rel=0.02)


def test_least_error_is_that_of_the_grid_that_rounds_best() -> None:
    numbers = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    low, high = taken(LeastError(bits=4), numbers)

    def error(clip: float) -> float:
        scale = clip / 7
        return float(((numbers / scale).round().clamp(-8, 7) * scale - numbers).square().mean())

    best = min(error(float(numbers.abs().max()) * part / 200) for part in range(40, 201))
    assert error(max(-low, high)) <= best * 1.01
    assert high < float(numbers.max())


def test_the_grid_of_least_error_is_the_one_that_integers_have() -> None:
    positive = torch.randn(50_000, generator=torch.Generator().manual_seed(2)).relu()
    (low, high), (lower, higher) = taken(LeastError(bits=4), positive), taken(LeastError(bits=4), -positive)
    assert low == higher == 0.0
    assert -lower < high, "sixteen codes above 0 reach further than the eight below it"
    far = taken(LeastError(), positive + 5.0)
    assert far[0] == 5.0 < far[1] <= float(positive.max()) + 5.0


def test_a_value_that_is_always_zero_and_channels_that_are_dead_are_warned_of() -> None:
    weights = -torch.eye(8)
    weights[[1, 6]] = 0.0
    dead = Program(GRAPH, {"w": weights})
    found = calibrate(dead, [batch(1.0, 2.0)], Percentile())
    assert range_of(found["z"]) == (0.0, 0.0)
    assert warnings(found, dead) == (
        "%z was zero on all calibration data; a range of 0 has no scale, calibrate on data that reaches it",
        "%y: the weights of 2 of 8 channels are all zero: dead channels 1, 6",
    )


def test_zeros_that_come_first_count_as_much_as_later_ones() -> None:
    zeros, ones = torch.zeros(9_000), torch.linspace(0.0, 1.0, 1_000)
    assert taken(Percentile(keep=99.0), zeros, ones) == pytest.approx(taken(Percentile(keep=99.0), ones, zeros))
    assert taken(Percentile(keep=99.0), zeros, ones) == pytest.approx((0.0, 0.95), abs=0.01)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "calibration data: there is none; give at least one batch"),
        ([batch(1.0), batch(float("nan"))], "calibration data, batch 1: %x holds NaN"),
        ([batch(float("inf"))], "calibration data, batch 0: %x holds infinity"),
    ],
)
def test_data_that_is_none_is_told_in_one_line(batches: list[tuple[Tensor]], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        calibrate(program(), batches, MinMax())
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_methods_are_written_as_passes_are() -> None:
    assert find_method("minmax") == MinMax()
    assert find_method("percentile(keep=99.9)") == Percentile(keep=99.9)
    for text, said in (("max", "Known: minmax, percentile, mse"), ("mse(bits=16)", "bits is 16; it is 4 or 8")):
        with pytest.raises(SpecError, match=said):
            find_method(text)
