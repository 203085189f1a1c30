"""The numpy definition of integer arithmetic is what Python's integers say, and torch references give the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia import kernels
from intarsia.ir.errors import UsageError
from intarsia.kernels.integers import golden

INT32 = st.integers(-(2**31), 2**31 - 1)
SHIFT = st.integers(1, 62)
CODES = {"i8": (torch.int8, 128), "i16": (torch.int16, 2**15), "i32": (torch.int32, 2**31)}
ENDS = ((-128, 127), (0, 127), (0, 15), (-8, 7), (-(2**15), 2**15 - 1), (0, 200), (-(2**31), 2**31 - 1))

GENERATOR = torch.Generator().manual_seed(11)


def codes(dtype: str, *shape: int) -> Tensor:
    """The full range of the element type, its extremes first."""
    kind, half = CODES[dtype]
    found = torch.randint(-half, half, shape, generator=GENERATOR)
    found.view(-1)[: min(2, found.numel())] = torch.tensor([-half, half - 1])[: found.numel()]
    return found.to(kind)


def numbers(count: int, shift: int, *, prefix: str = "") -> dict[str, Tensor]:
    """Multipliers of 31 bits, one of them a power of two, so that halves come up, and shifts around one."""
    multiplier = torch.randint(2**30, 2**31 - 1, (count,), generator=GENERATOR)
    multiplier[0] = 2**30
    shifts = torch.randint(shift - 2, shift + 3, (count,), generator=GENERATOR).clamp(1, 62)
    return {f"{prefix}multiplier": multiplier.int(), f"{prefix}shift": shifts.int()}


def bias(count: int, largest: int) -> Tensor:
    return torch.randint(-largest, largest, (count,), generator=GENERATOR).int()


def linears() -> Iterator[dict[str, Any]]:
    for low, high in ENDS:
        for rows, columns, shift in ((5, 24, 38), (1, 3, 36)):
            case = {"input": codes("i8", 2, 3, columns), "weight": codes("i8", rows, columns)}
            yield {**case, "bias": bias(rows, 2**16), **numbers(rows, shift), "low": low, "high": high}
    largest = torch.full((2, 131_071), -128).to(torch.int8)
    yield {"input": largest, "weight": largest, "bias": None, **numbers(2, 55)}


def convolutions() -> Iterator[dict[str, Any]]:
    for (low, high), (groups, stride, padding, dilation) in zip(
        ENDS,
        ((1, 1, 0, 1), (2, 2, 1, 1), (4, 1, 2, 2), (1, 3, 2, 1), (1, 1, 1, 1), (2, 1, 0, 3), (1, 2, 3, 2)),
        strict=True,
    ):
        window = {"stride": (stride, 1), "padding": (padding, 1), "dilation": (1, dilation), "groups": groups}
        weight, input = codes("i8", 8, 4 // groups, 3, 2), codes("i8", 2, 4, 9, 7)
        yield {"input": input, "weight": weight, "bias": bias(8, 2**15), **numbers(8, 38), **window} | {
            "low": low, "high": high,
        }  # fmt: skip


def requantized() -> Iterator[dict[str, Any]]:
    for low, high in ENDS:
        for dtype, shift in (("i8", 31), ("i16", 38), ("i32", 54), ("i32", 61), ("i8", 3)):
            for axis, count in ((1, 4), (-1, 5), (0, 1), (2, 1)):
                yield {"input": codes(dtype, 3, 4, 5), **numbers(count, shift), "axis": axis, "low": low, "high": high}


def sums() -> Iterator[dict[str, Any]]:
    for low, high in ENDS:
        for one, other in (("i8", "i16"), ("i16", "i8"), ("i16", "i16"), ("i32", "i8"), ("i32", "i32")):
            dyadic = {**numbers(1, 31 + CODES[one][1].bit_length() - 8), **numbers(1, 40, prefix="other_")}
            yield {"input": codes(one, 3, 40), "other": codes(other, 3, 40), **dyadic, "low": low, "high": high}


def averages() -> Iterator[dict[str, Any]]:
    for low, high in ENDS:
        for dtype, kernel, stride, padding in (("i8", (3, 2), (2, 1), (1, 0)), ("i16", (7, 7), (1, 1), (0, 0))):
            window = {"kernel_size": kernel, "stride": stride, "padding": padding}
            yield {"input": codes(dtype, 2, 4, 8, 7), **window, **numbers(1, 34), "low": low, "high": high}
    largest = torch.full((1, 1, 256, 255), -(2**15)).to(torch.int16)
    yield {"input": largest, "kernel_size": (256, 255), "stride": (1, 1), "padding": (0, 0), **numbers(1, 55)}


def quantized() -> Iterator[dict[str, Any]]:
    real = torch.cat([torch.randn(500, generator=GENERATOR) * 9, torch.arange(-300, 300) * 0.05, torch.tensor([1e9])])
    for low, high in ENDS[:-1]:
        for scale in (0.1, 0.0123456789, 1e-5, 2.0):
            yield {"input": real, "scale": scale, "low": low, "high": high}


def weights() -> Iterator[Tensor]:
    for shape in ((6, 40), (6, 4, 3, 3)):
        weight = torch.randn(shape, generator=GENERATOR)
        weight[2] = 0
        weight[3] *= 1e-9
        weight[4] = torch.round(weight[4] * 4) / 8
        yield weight


def scales() -> Iterator[dict[str, Any]]:
    """Powers of two and their neighbours, what rounds up to a power of two, and what no shift of 62 reaches."""
    whole = torch.tensor([1.0, 0.5, 2.0**-20, 3.0, 1e-8, 7.9e-11, 2.0**-40])
    below, above = (torch.nextafter(whole, torch.tensor(to)) for to in (0.0, 9.0))
    for factor in (1.0, 1 - 2**-40, 1 / 3, 1e-6, 2**-30, 12345.678):
        yield {"scale": torch.cat([whole, below, above, torch.rand(20, generator=GENERATOR)]), "factor": factor}


def chosen() -> Iterator[dict[str, Any]]:
    """Sums that saturate at 2**10 to 2**20 with and without a bias, numbers without one near them, and tiny ones."""
    for low, high in ((0, 127), (-128, 127), (0, 15)):
        multiplier = torch.randint(2**30, 2**31 - 1, (12,), generator=GENERATOR).int()
        multiplier[3:6] = torch.tensor([2**30, 2**31 - 1, 2**29])
        shift = torch.arange(12, dtype=torch.int32) + 34 - (high < 100) * 3
        shift[-1] = 58
        given_ = {"multiplier": multiplier, "shift": shift, "low": low, "high": high}
        weight = torch.randint(-128, 128, (12, 9, 3, 3), generator=GENERATOR).to(torch.int8)
        bias = torch.randint(-(2**14), 2**14, (12,), generator=GENERATOR).int()
        yield {**given_, "weight": weight, "bias": bias, "input_low": 0, "input_high": 127}
        yield {**given_, "weight": weight, "bias": None, "input_low": -128, "input_high": 127}
        yield {**given_, "weight": None, "bias": None, "input_low": 0, "input_high": 32767}
    few = torch.tensor([2**30, 2**31 - 1, 3 << 29, 129 << 23, (129 << 23) + 500, (129 << 23) + 5000]).int()
    for wide in (30, 31, 38, 39):
        whole = {"multiplier": few, "shift": torch.full((6,), wide, dtype=torch.int32), "weight": None, "bias": None}
        yield {**whole, "input_low": -128, "input_high": 127, "low": -32768, "high": 32767}


CASES: Mapping[str, Any] = {
    "intarsia.linear_i8i8": linears,
    "intarsia.conv2d_i8i8": convolutions,
    "intarsia.requantize": requantized,
    "intarsia.add_requantized": sums,
    "intarsia.avg_pool2d_i8": averages,
    "intarsia.quantize_static": quantized,
    "intarsia.dequantize_static": lambda: (
        {"input": codes(dtype, 3, 50), "scale": scale} for dtype in CODES for scale in (0.1, 1e-5)
    ),
    "intarsia.quantize_channels": lambda: (
        {"weight": weight, "bits": bits, "grain": grain}
        for weight in weights()
        for bits in (4, 8)
        for grain in (0.0, 0.001)
    ),
    "intarsia.dyadic": scales,
    "intarsia.exact_dyadic": chosen,
    "intarsia.quantize_bias": lambda: (
        {"bias": torch.randn(50, generator=GENERATOR), "scale": torch.rand(50, generator=GENERATOR) * step}
        | {"input_scale": 0.02, "largest": largest}
        for step, largest in ((1.0, 2**31 - 1), (1e-3, 1000), (1e-10, 2**31 - 1), (1e-10, 2**30))
    ),
}


@pytest.mark.parametrize("op", golden.OPERATORS)
def test_every_reference_gives_what_is_defined_to_the_bit(op: str) -> None:
    seen = set()
    for case in CASES[op]():
        narrow = {"dtype": torch.float32} if op == "intarsia.dequantize_static" else {}
        found = kernels.operators()[op].REFERENCES[op](**case, **narrow)
        given_ = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in case.items()}
        expected = golden.OPERATORS[op](**given_)
        for one, two in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
            assert one.numpy().dtype == two.dtype
            np.testing.assert_array_equal(one.numpy(), two, strict=True)
            seen.update(two.reshape(-1)[:200].tolist())
    assert len(seen) > 30


def exact(value: int, multiplier: int, shift: int) -> int:
    return math.floor(Fraction(value * multiplier, 2**shift) + Fraction(1, 2))


def array(*values: int) -> Any:
    return np.array(values, np.int32)


@given(value=INT32, multiplier=INT32, shift=SHIFT)
def test_scaling_rounds_half_up_and_never_leaves_int64(value: int, multiplier: int, shift: int) -> None:
    assert golden.scaled(array(value), array(multiplier), array(shift)).item() == exact(value, multiplier, shift)


@given(shift=SHIFT, multiple=st.integers(-(2**20), 2**20), beside=st.integers(-1, 1))
def test_halves_go_up_and_their_neighbours_where_they_belong(shift: int, multiple: int, beside: int) -> None:
    power = min(shift - 1, 30)
    value = (2 * multiple + 1 << (shift - 1 - power)) + beside
    if -(2**31) <= value < 2**31:
        found = golden.scaled(array(value), array(1 << power), array(shift)).item()
        assert found == exact(value, 1 << power, shift)
        assert beside or found == multiple + 1


@given(pairs=st.tuples(INT32, INT32, INT32, INT32, SHIFT, SHIFT))
@settings(max_examples=50)
def test_each_operand_of_a_sum_is_rounded_on_its_own(pairs: tuple[int, ...]) -> None:
    one, other, m, n, c, d = pairs
    operands, numbers_ = (array(one), array(other)), (array(m), array(c), array(n), array(d))
    found = golden.add_requantized(*operands, *numbers_, low=-(2**31), high=2**31 - 1)
    assert found.item() == max(-(2**31), min(2**31 - 1, exact(one, m, c) + exact(other, n, d)))


def test_the_sum_of_rounded_operands_is_not_the_rounded_sum() -> None:
    """4.4 and 2.4 are 6, though 6.8 is 7. Source: HAWQ-V3, section 3.3."""
    tenth = golden.dyadic(np.array([0.1], np.float32), 1.0)
    assert golden.add_requantized(array(44), array(24), *tenth, *tenth).item() == 6


@given(real=st.floats(2.0**-80, 2.0**29))
def test_dyadic_numbers_are_the_nearest_of_31_bits(real: float) -> None:
    multiplier, shift = (int(found.item()) for found in golden.dyadic(np.array([1.0], np.float32), real))
    assert 0 <= multiplier < 2**31
    assert 1 <= shift <= 62
    assert abs(Fraction(multiplier, 2**shift) - Fraction(real)) <= Fraction(1, 2 ** (shift + 1))
    assert multiplier >= 2**30 or shift == 62


def test_an_average_counts_the_zeros_around() -> None:
    ninth = golden.dyadic(np.array([1 / 9], np.float32), 1.0)
    input = np.full((1, 1, 3, 3), 90, np.int8)
    found = golden.avg_pool2d_i8(input, (3, 3), (1, 1), (1, 1), *ninth)
    assert found[0, 0].tolist() == [[40, 60, 40], [60, 90, 60], [40, 60, 40]]


def test_sums_beyond_int32_have_no_meaning() -> None:
    input = np.full((1, 3), 127, np.int8)
    bias = array(2**31 - 1)
    with pytest.raises(OverflowError, match="a sum of 2147532034 to 2147532034 leaves int32"):
        golden.linear_i8i8(input, input, bias, array(1), array(1))


@pytest.mark.parametrize("ends", [(0, 127), (-128, 127), (0, 15)])
def test_f32_and_halves_to_even_are_right_for_every_sum_of_a_chosen_number(ends: tuple[int, int]) -> None:
    """Looked at one by one, not on both sides of the steps alone."""
    given_ = np.random.default_rng(2).integers(2**30, 2**31, 10).astype(np.int32)
    shift = np.full(10, 31 + 18 - ends[1].bit_length(), np.int32)
    weight = np.full((10, 16), 127, np.int8)
    found, _ = golden.exact_dyadic(given_, shift, weight, np.full(10, 55, np.int32), -128, 127, *ends)
    sums = np.arange(-16 * 127 * 128, 16 * 127 * 127 + 1)[None] + 55

    def wrong(multiplier: Any) -> int:
        exact_ = golden.scaled(sums, multiplier[:, None], shift[:, None]).clip(*ends)
        factor = np.ldexp(multiplier.astype(np.float32), -shift)[:, None]
        return int((np.rint(sums.astype(np.float32) * factor).clip(*ends) != exact_).sum())

    assert wrong(given_) > 0 or ends == (0, 15)
    assert wrong(found) == 0
    assert (abs(found.astype(np.int64) - given_) <= 31 * 2**12 + 2**6).all()


@pytest.mark.parametrize(("scale", "factor"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, 2.0**31), (-1.0, 1.0)])
def test_what_no_dyadic_number_stands_for_is_told(scale: float, factor: float) -> None:
    kernels.register()
    with pytest.raises(UsageError, match=r"intarsia.dyadic: .* from 0 to 2\*\*30, found .*; calibrate on data"):
        torch.ops.intarsia.dyadic(torch.tensor([0.5, scale]), factor)
