"""Integer softmax, norms, functions and products give what their definition says, which is near what floats give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm

from intarsia import kernels
from intarsia.ir.errors import UsageError
from intarsia.kernels.integers import golden_islands as golden

GENERATOR = torch.Generator().manual_seed(5)
KINDS = {8: torch.int8, 16: torch.int16}
ENDS = {8: {"low": -128, "high": 127}, 16: {"low": -(2**15), "high": 2**15 - 1}}
FUNCTIONS = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


def codes(bits: int, *shape: int) -> Tensor:
    """The full range of the element type."""
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=GENERATOR).to(KINDS[bits])


def every(bits: int) -> Tensor:
    return torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(KINDS[bits])


def rows(bits: int, count: int) -> Tensor:
    """Random rows, rows all alike, one-hot rows, rows of ties at the top, and those of the two extremes."""
    low, high = ENDS[bits]["low"], ENDS[bits]["high"]
    found = codes(bits, 12, count)
    found[1], found[2], found[3] = low, high, 0
    found[4], found[5] = low, high
    found[4, 0], found[5, -1] = high, low
    found[6] = torch.where(torch.arange(count) % 2 == 0, low, high)
    found[7] = 1
    found[7, 0] = 2
    found[8, : count // 2 + 1] = high
    found[9] = found[9] >> 3
    found[10] = (torch.arange(count) - count // 2).clamp(low, high)
    return found


def dyadic(scale: float) -> dict[str, int]:
    """Multiplier and shift of 1 / ``scale``."""
    mantissa, exponent = math.frexp(1 / scale)
    return {"multiplier": int(mantissa * 2**31), "shift": 31 - exponent}


def softmaxes() -> Iterator[dict[str, Any]]:
    for bits in KINDS:
        for step in (3.0, 0.1, 0.003, 2e-6):
            table = torch.ops.intarsia.exponentials(step, bits)
            for count in (1, 2, 40, 1000):
                for result in KINDS:
                    given = {"input": rows(bits, max(count, 2))[:, :count], "table": table}
                    yield {**given, **dyadic(1 / ENDS[result]["high"]), **ENDS[result]}
    largest = torch.full((1, 100_000), 2**15 - 1).to(torch.int16)
    yield {"input": largest, "table": table, "multiplier": 2**31 - 1, "shift": 1, **ENDS[16]}
    yield {"input": largest, "table": table, "multiplier": 1, "shift": 62, **ENDS[16]}


def norms() -> Iterator[dict[str, Any]]:
    for bits in KINDS:
        for count in (1, 2, 40, 1000):
            for affine in (False, True):
                weight, bias = ((torch.randn(count, generator=GENERATOR) * 3) if affine else None for _ in "wb")
                for result in KINDS:
                    numbers = torch.ops.intarsia.norm_numbers(weight, bias, 8 / ENDS[result]["high"], count)
                    given = dict(zip(("weight", "bias", "shift"), numbers, strict=True))
                    for centered, epsilon in ((True, 1), (False, 1), (True, 10**9), (False, 2**61)):
                        case = {"input": rows(bits, max(count, 2))[:, :count], **given, **ENDS[result]}
                        yield {**case, "epsilon": epsilon, "centered": centered}
    count = 2**15
    weight = torch.full((count,), -(2.0**30))
    numbers = torch.ops.intarsia.norm_numbers(weight, 2**10 * weight, 2.0, count)
    for centered in (True, False):
        given = dict(zip(("weight", "bias", "shift"), numbers, strict=True))
        yield {"input": rows(16, count), **given, "epsilon": 2**61, "centered": centered}
        yield {"input": rows(16, count), **given, "epsilon": 1, "centered": centered}


def tables() -> Iterator[dict[str, Any]]:
    for function in FUNCTIONS:
        for bits in KINDS:
            for reach in (4.0, 300.0):
                table = torch.ops.intarsia.function_table(function, reach / ENDS[bits]["high"], 1e-4, bits)
                for result in KINDS:
                    yield {"input": every(bits)[:: bits - 1], "table": table, **ENDS[result]}


def products() -> Iterator[dict[str, Any]]:
    for leading, (m, k, n) in (((), (1, 1, 1)), ((2,), (5, 24, 7)), ((2, 3), (4, 9, 4))):
        for shift in (31, 38, 45):
            given = {"input": codes(8, *leading, m, k), "other": codes(8, *leading, k, n)}
            yield {**given, "multiplier": 2**30, "shift": shift, **ENDS[8 if shift > 40 else 16]}
    largest = torch.full((131_071, 1), -128).to(torch.int8)
    yield {"input": largest.t().contiguous(), "other": largest, "multiplier": 2**31 - 1, "shift": 62}


def functions() -> Iterator[dict[str, Any]]:
    for function in FUNCTIONS:
        for bits in KINDS:
            for scale in (0.05, 1e-5):
                yield {"function": function, "input_scale": 8 / ENDS[bits]["high"], "scale": scale, "bits": bits}


def affines() -> Iterator[dict[str, Any]]:
    for factor in (0.0, 1.0, 2.0**-30, 1e9, 2.0**30 - 1e-3):
        weight, bias = (torch.randn(9, generator=GENERATOR) * factor for _ in "wb")
        for one in (None, weight):
            for other in (None, bias):
                yield {"weight": one, "bias": other, "scale": 0.1, "channels": 9}
    yield {"weight": torch.tensor([2.0**29]), "bias": torch.tensor([-(2.0**48)]), "scale": 0.5, "channels": 1}


CASES: Mapping[str, Any] = {
    "intarsia.function_table": functions,
    "intarsia.apply_table": tables,
    "intarsia.exponentials": lambda: (
        {"scale": scale, "bits": bits} for scale in (5.0, 0.1, 1e-4, 1e-9) for bits in KINDS
    ),
    "intarsia.integer_softmax": softmaxes,
    "intarsia.norm_numbers": affines,
    "intarsia.integer_norm": norms,
    "intarsia.matmul_i8i8": products,
}


def array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def same(found: Any, expected: Any) -> bool:
    found, expected = ((one,) if not isinstance(one, tuple) else one for one in (found, expected))
    pairs = list(zip(found, expected, strict=True))
    return all(a.numpy().dtype == b.dtype and np.array_equal(a.numpy(), b) for a, b in pairs)


@pytest.mark.parametrize("op", golden.OPERATORS)
def test_the_reference_gives_the_definition_to_the_bit(op: str) -> None:
    for case in CASES[op]():
        expected = golden.OPERATORS[op](**{key: array(value) for key, value in case.items()})
        assert same(kernels.operators()[op].REFERENCES[op](**case), expected), {
            key: value if not isinstance(value, Tensor) else value.shape for key, value in case.items()
        }


CURVATURE = {"gelu": 0.8, "gelu_tanh": 0.82, "silu": 0.5, "sigmoid": 0.1, "tanh": 0.77}
"""Largest second derivative of each function."""


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("reach", [2.0, 8.0, 40.0])
def test_a_function_is_half_a_step_from_float_and_between_knots_what_its_curve_bends(
    function: str, reach: float
) -> None:
    for bits in KINDS:
        for result in KINDS:
            step, scale = (reach / ENDS[one]["high"] for one in (bits, result))
            table = torch.ops.intarsia.function_table(function, step, scale, bits)
            found = torch.ops.intarsia.apply_table(every(bits), table, **ENDS[result])
            expected = torch.tensor([golden.FUNCTIONS[function](x) for x in (every(bits).double() * step).tolist()])
            bend = 0.0 if bits == 8 else (32 * step) ** 2 / 8 * CURVATURE[function] + scale * 2.0**-13
            off = (found.double() * scale - expected.clamp(-reach - scale, reach)).abs().max()
            assert off <= 0.5001 * scale + bend + 1e-6 * reach


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("count", [2, 40, 4096])
def test_a_softmax_is_half_a_step_from_float_plus_a_billionth_for_each_term(bits: int, count: int) -> None:
    for step in (3.0, 0.1, 0.003, 2e-6):
        table = torch.ops.intarsia.exponentials(step, bits)
        for result in KINDS:
            scale, input = 1 / ENDS[result]["high"], rows(bits, count)
            found = torch.ops.intarsia.integer_softmax(input, table, **dyadic(scale), **ENDS[result])
            expected = (input.double() * step).softmax(-1)
            off = ((found.double() * scale - expected).abs() - expected * 2.0**-27).max()
            assert off <= scale / 2 + (1 + count) * 2.0**-29


def test_equal_scores_share_alike_and_one_far_above_takes_all() -> None:
    table = torch.ops.intarsia.exponentials(1.0, 8)
    alike, one = torch.full((1, 4), -128, dtype=torch.int8), torch.tensor([[-128, 127, -128]], dtype=torch.int8)
    found = [torch.ops.intarsia.integer_softmax(x, table, **dyadic(1 / 128)).tolist() for x in (alike, one)]
    assert found == [[[32] * 4], [[0, 127, 0]]]


def test_halves_of_a_softmax_go_up() -> None:
    table = torch.ops.intarsia.exponentials(1.0, 8)
    five = torch.ops.intarsia.integer_softmax(torch.zeros(1, 2, dtype=torch.int8), table, 2**30 + 8, 30)
    assert five.tolist() == [[1, 1]]
    nine = torch.ops.intarsia.integer_softmax(torch.zeros(1, 2, dtype=torch.int8), table, 2**30 - 8, 30)
    assert nine.tolist() == [[0, 0]]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("count", [1, 2, 40, 4096, 32_768])
def test_a_norm_is_half_a_step_from_float_plus_what_thirty_digits_leave(bits: int, count: int, centered: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    weight, bias = (torch.randn(count, generator=generator) for _ in "wb")
    input, scale = rows(bits, max(count, 2))[:, :count], 6 / 32767
    numbers = torch.ops.intarsia.norm_numbers(weight, bias, scale, count)
    for epsilon in (1, 12345, 10**12, 2**61):
        found = torch.ops.intarsia.integer_norm(input, *numbers, epsilon, centered, **ENDS[16])
        wide, eps = input.double(), epsilon / count**2
        one, other = weight.double(), bias.double()
        expected = layer_norm(wide, [count], one, other, eps) if centered else rms_norm(wide, [count], one, eps) + other
        bound = scale * 0.5001 + float(one.abs().max()) * (2.0**-23 + math.sqrt(count) * 2.0**-27)
        expected = expected.clamp(-6 - scale, 6)
        assert (found.double() * scale - expected).abs().max() <= bound


def test_a_row_of_one_number_is_the_bias_and_nothing_else() -> None:
    numbers = torch.ops.intarsia.norm_numbers(torch.tensor([3.0, -3.0]), torch.tensor([0.5, -0.25]), 0.25, 2)
    found = torch.ops.intarsia.integer_norm(torch.full((1, 2), 77, dtype=torch.int8), *numbers, 1, True)
    assert found.tolist() == [[2, -1]]


def test_functions_follow_pytorchs() -> None:
    x = every(16).double() * (8 / 32767)
    for function, expected in (("gelu", gelu(x)), ("gelu_tanh", gelu(x, approximate="tanh"))):
        table = torch.ops.intarsia.function_table(function, 8 / 32767, 8 / 32767, 16)
        found = torch.ops.intarsia.apply_table(every(16), table, **ENDS[16]).double() * (8 / 32767)
        assert (found - expected).abs().max() < 1.6e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: torch.ops.intarsia.function_table("relu", 1.0, 1.0, 8),
            "function is gelu, gelu_tanh, .* found relu",
        ),
        (lambda x: torch.ops.intarsia.function_table("gelu", 1.0, 1.0, 4), "bits are 8 or 16, found 4"),
        (lambda x: torch.ops.intarsia.function_table("gelu", 0.0, 1.0, 8), "scales are positive numbers"),
        (lambda x: torch.ops.intarsia.apply_table(x, x[0].int()), r"table is int32 \(256\), found torch.int32 \(4,\)"),
        (lambda x: torch.ops.intarsia.apply_table(x.int(), x), "input is int8 or int16, found torch.int32"),
        (lambda x: torch.ops.intarsia.exponentials(0.0, 8), "scale is a positive number, found 0"),
        (lambda x: torch.ops.intarsia.integer_softmax(x, x[0].int(), 1, 1), r"table is int32 \(256\)"),
        (lambda x: torch.ops.intarsia.matmul_i8i8(x, x.t(), 1, 63), "shift is 1 to 62, found 1 and 63"),
        (lambda x: torch.ops.intarsia.matmul_i8i8(x, x, 1, 9), "other has 4 rows"),
        (lambda x: torch.ops.intarsia.norm_numbers(x[0].float(), None, 1.0, 9), r"weight and bias are \(9\)"),
    ],
)
def test_what_does_not_fit_is_said(call: Any, message: str) -> None:
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match=message):
        call(torch.zeros(2, 4, dtype=torch.int8))


@pytest.mark.parametrize(("factor", "name"), [(math.inf, "weight"), (math.nan, "weight"), (2.0**50, "weight")])
def test_a_norm_whose_weight_is_no_number_of_steps_is_refused(factor: float, name: str) -> None:
    with pytest.raises(UsageError, match=rf"norm_numbers: {name} reaches .* steps of the result, below 2\*\*50"):
        torch.ops.intarsia.norm_numbers(torch.tensor([1.0, factor]), None, 1.0, 2)
