"""A proof that floats give a dyadic number's integers holds for every number in reach, and is not given lightly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.backends import onnx_exact
from intarsia.backends.onnx_exact import DOUBLE, Scaling, affine, divided, exact_affine, lossless, whole_scale

Array = np.ndarray[Any, np.dtype[Any]]

TRUNK = (-32_768, 32_767)

ENDS = st.sampled_from([(0, 15), (0, 127), (-8, 7), (-128, 127)])


def scaling(multiplier: int, shift: int, bias: int, reach: int, ends: tuple[int, int]) -> tuple[Scaling, Array]:
    """Of numbers -reach..reach, and these."""
    made = Scaling.of(np.array([multiplier]), np.array([shift]), bias, (-reach, reach), ends)
    return made, np.arange(-reach, reach + 1)[None]


def requantized(x: Array, factor: Array, bias: int, zero: int) -> Array:
    """As QLinearConv does it."""
    codes = np.rint((x + bias).astype(np.float32) * factor[:, None])
    return np.clip(codes, -zero, 255 - zero).astype(np.int64)


@given(
    bits=st.integers(1, 31),
    share=st.floats(0.5, 0.999),
    gain=st.floats(1e-4, 0.9),
    bias=st.integers(-300, 300),
    ends=ENDS,
)
@settings(max_examples=60, deadline=None)
def test_what_is_proved_holds_for_every_number(
    bits: int, share: float, gain: float, bias: int, ends: tuple[int, int]
) -> None:
    shift = max(1, bits + int(-np.log2(gain)))
    made, x = scaling(max(1, int(share * 2**bits)), shift, bias, 40_000, ends)
    expected = made.exactly(x)
    zero = max(0, -made.low)
    if (factor := whole_scale(made, zero)) is not None:
        np.testing.assert_array_equal(np.clip(requantized(x, factor, bias, zero), *ends), expected)
    if (found := affine(made, zero)) is not None:
        real = x.astype(np.float32) * found[0][:, None] + found[1][:, None]
        np.testing.assert_array_equal(np.clip(real, ends[0] + zero, ends[1] + zero).astype(np.int64) - zero, expected)
    if made.bits <= DOUBLE:
        double, summand = exact_affine(made, zero)
        real = x * double[:, None] + summand[:, None]
        np.testing.assert_array_equal(np.floor(np.clip(real, ends[0] + zero, ends[1] + zero)) - zero, expected)


def test_few_bits_are_exact_in_f32_though_ties_go_up_here_and_to_even_there() -> None:
    made, x = scaling(3 << 28, 38, 0, 40_000, (0, 127))
    factor = whole_scale(made, 0)
    assert factor is not None
    assert factor[0] > np.float32(3 / 2**10)
    np.testing.assert_array_equal(np.minimum(requantized(x, factor, 0, 0), 127), made.exactly(x))
    assert (np.rint(x * (3 / 2**10)).clip(0, 127) != made.exactly(x)).any()


def test_ties_on_both_sides_of_zero_are_not_exact_for_any_factor_near() -> None:
    made, _ = scaling(1, 4, 0, 4000, (-128, 127))
    assert whole_scale(made, 128) is None
    assert affine(made, 128) is not None


def test_31_bits_of_many_channels_and_large_sums_need_f64() -> None:
    numbers = np.random.default_rng(1).integers(2**30, 2**31, 64)
    made = Scaling.of(numbers, np.full(64, 31 + 12), 77, (-(2**21), 2**21), (0, 127))
    assert whole_scale(made, 0) is None
    assert affine(made, 0) is None
    assert made.bits <= DOUBLE


@pytest.mark.parametrize("added", [0, 1, 20_000, 32_767])
def test_numbers_with_few_bits_behind_the_point_lose_nothing_even_when_an_integer_is_added(added: int) -> None:
    made = Scaling.of(np.array([37, 5]), np.array([7, 6]), np.array([-60_000, 12_345]), (-(2**22), 2**22), TRUNK)
    found = lossless(made, 0)
    assert found is not None
    x = np.arange(-(2**22), 2**22, 3)[None].repeat(2, axis=0)
    real = x.astype(np.float32) * found[0][:, None] + found[1][:, None] + np.float32(added)
    wanted = np.clip(made.exactly(x) + added, 0, 32_767)
    np.testing.assert_array_equal(np.floor(np.clip(real, 0, 32_767)), wanted)


def test_what_has_more_bits_than_f32_is_not_called_lossless() -> None:
    made = Scaling.of(np.array([37, 5]), np.array([9, 6]), 0, (-(2**22), 2**22), TRUNK)
    assert lossless(made, 0) is None
    far = Scaling.of(np.array([37]), np.array([7]), 2**20, (-(2**22), 2**22), TRUNK)
    assert lossless(far, 0) is None


def test_one_division_is_proved_for_every_integer_of_a_tensor() -> None:
    for seed in range(20):
        number = int(np.random.default_rng(seed).integers(2**30, 2**31))
        made = Scaling.of(np.array([number]), np.array([39]), 0, (0, 32_767), (0, 127))
        if (divisor := divided(made)) is not None:
            x = np.arange(32_768)[None]
            found = np.rint(x.astype(np.float32) / np.float32(divisor)).clip(0, 127)
            np.testing.assert_array_equal(found, made.exactly(x))
            return
    pytest.fail("no number of twenty has a divisor")


def test_proofs_look_at_both_sides_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_exact, "EVERY", 0)
    made, x = scaling(1_500_000_001, 31 + 8, -5, 60_000, (-128, 127))
    exact = made.exactly(x)[0]
    steps = x[0, 1:][exact[1:] != exact[:-1]]
    assert made.borders is not None
    assert {*steps.tolist(), *(steps - 1).tolist()} <= set(made.borders[0].tolist())


def test_sums_that_int32_does_not_hold_are_no_matter() -> None:
    made = Scaling.of(np.array([2**31 - 1]), np.array([40]), 2**31 - 1, (-(2**31), 2**31 - 1), (-128, 127))
    assert made.highest.tolist() == [0]
