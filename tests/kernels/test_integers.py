"""Integer arithmetic is exact: against Python's own integers, at the ends of their ranges too."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia import kernels
from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.kernels.base import Work
from intarsia.kernels.conv2d_i8i8.reference import conv2d_i8i8
from intarsia.kernels.integers.reference import dequantize_static, quantize_static, requantize
from intarsia.kernels.linear_i4.reference import pack
from intarsia.kernels.linear_i8i8.reference import linear_i8i8

INT32 = st.integers(-(2**31), 2**31 - 1)

LAYER = """graph g {
  size N in [1, 64]
  input %x: i8[N, 48]
  param %w: i8[40, 48]
  param %b: i32[40]
  param %m: i32[40]
  param %s: i32[40]
  %y: i8[N, 40] = intarsia.linear_i8i8(input=%x, weight=%w, bias=%b, multiplier=%m, shift=%s)
  return %y
}
"""
CONVOLUTION = """graph g {
  size N in [1, 64]
  input %x: i8[N, 16, 8, 8]
  param %w: i8[32, 4, 3, 3]
  param %m: i32[32]
  param %s: i32[32]
  %y: i8[N, 32, 4, 4] = intarsia.conv2d_i8i8(input=%x, weight=%w, bias=None, multiplier=%m, shift=%s, stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups=4)
  return %y
}
"""  # noqa: E501


def exact(total: int, multiplier: int, shift: int) -> int:
    return max(-128, min(127, (total * multiplier + (1 << (shift - 1))) >> shift))


@given(total=INT32, multiplier=INT32, shift=st.integers(1, 62))
def test_requantizing_is_exact_for_every_dyadic_number(total: int, multiplier: int, shift: int) -> None:
    given_, numbers = torch.tensor([[total]], dtype=torch.int32), torch.tensor([multiplier, shift], dtype=torch.int32)
    assert requantize(given_, numbers[:1], numbers[1:], 1).item() == exact(total, multiplier, shift)


def test_halves_are_rounded_up() -> None:
    totals = torch.tensor([[-3, -1, 1, 3, 5]], dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    assert requantize(totals, one, one, 0).tolist() == [[-1, 0, 1, 2, 3]]


def test_each_channel_has_its_own_dyadic_number_along_the_axis() -> None:
    totals = torch.full((1, 2, 3), 64, dtype=torch.int32)
    multiplier, shift = torch.tensor([1, 3], dtype=torch.int32), torch.tensor([1, 6], dtype=torch.int32)
    assert requantize(totals, multiplier, shift, 1).tolist() == [[[32] * 3, [3] * 3]]


def test_quantizing_rounds_half_to_even_and_clips() -> None:
    values = torch.tensor([0.25, 0.75, -0.25, 1000.0, -1000.0])
    assert quantize_static(values, 0.5).tolist() == [0, 2, 0, 127, -128]


def test_dequantizing_multiplies_in_f32_before_the_cast() -> None:
    codes = torch.tensor([127, -128], dtype=torch.int8)
    assert torch.equal(dequantize_static(codes, 0.1, torch.bfloat16), (codes.float() * 0.1).bfloat16())


def random(*shape: int, low: int = -128, high: int = 128) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_linear_layer_sums_in_whole_numbers() -> None:
    x, weight, bias = random(3, 48), random(4, 48), random(4, low=-(2**20), high=2**20)
    multiplier, shift = random(4, low=1, high=2**31), random(4, low=40, high=48)
    totals = (x @ weight.t() + bias).tolist()
    expected = [[exact(total, int(multiplier[i]), int(shift[i])) for i, total in enumerate(row)] for row in totals]
    found = linear_i8i8(x.to(torch.int8), weight.to(torch.int8), bias.int(), multiplier.int(), shift.int())
    assert found.tolist() == expected


def test_a_convolution_of_one_pixel_is_a_linear_layer() -> None:
    x, weight, bias = random(2, 8, 3, 5), random(6, 8, 1, 1), random(6)
    dyadic = random(6, low=1, high=2**20).int(), random(6, low=20, high=30).int()
    found = conv2d_i8i8(x.to(torch.int8), weight.to(torch.int8), bias.int(), *dyadic, [1, 1], [0, 0], [1, 1], 1)
    by_pixel = x.permute(0, 2, 3, 1).to(torch.int8)
    expected = linear_i8i8(by_pixel, weight.flatten(1).to(torch.int8), bias.int(), *dyadic)
    assert torch.equal(found, expected.permute(0, 3, 1, 2))


def test_unpacking_undoes_packing() -> None:
    kernels.register()
    codes = random(3, 8, low=-8, high=8).to(torch.int8)
    assert torch.equal(torch.ops.intarsia.unpack_i4(pack(codes)), codes)


def test_work_counts_products_of_int8() -> None:
    linear, convolution = Graph.parse(LAYER), Graph.parse(CONVOLUTION)
    moved = 10 * 48 + 40 * 48 + 3 * 4 * 40 + 10 * 40
    assert kernels.work(linear.nodes[0], linear, {"N": 10}) == Work(2.0 * 10 * 40 * 48, "i8", moved)
    moved = 3 * 16 * 64 + 32 * 36 + 2 * 4 * 32 + 3 * 32 * 16
    assert kernels.work(convolution.nodes[0], convolution, {"N": 3}) == Work(2.0 * 3 * 32 * 16 * 36, "i8", moved)


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        ("48", "131071", None),
        ("48", "131072", "a sum has 131,072 terms; int32 certainly holds 131,071"),
        ("%x: i8", "%x: u8", "input is u8; intarsia.linear_i8i8 takes i8"),
        ("%b: i32", "%b: f32", "bias is f32; intarsia.linear_i8i8 takes i32"),
        ("%s: i32", "%s: i64", "shift is i64; intarsia.linear_i8i8 takes i32"),
        ("%w: i8[40, 48]", "%w: i8[40, N]", "weight is i8[40, N]; intarsia.linear_i8i8 takes fixed extents"),
    ],
)
def test_why_not_is_exact_at_its_borders(found: str, instead: str, reason: str | None, target: Target) -> None:
    graph = Graph.parse(LAYER.replace(found, instead))
    assert kernels.why_not(graph.nodes[0], graph, target) == reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, n: torch.ops.intarsia.linear_i8i8(x.float(), x, None, n, n), "input is int8, found torch.float32"),
        (lambda x, n: torch.ops.intarsia.linear_i8i8(x, x[:, :4], None, n, n), "input ends in 4, found 6"),
        (lambda x, n: torch.ops.intarsia.linear_i8i8(x, x, n[:1], n, n), r"bias is \(3,\)"),
        (lambda x, n: torch.ops.intarsia.linear_i8i8(x, x, None, n[:1], n), r"multiplier is \(3,\)"),
        (lambda x, n: torch.ops.intarsia.requantize(x.half(), n, n, 0), "input is int8, int16 or int32, found torch.f"),
        (lambda x, n: torch.ops.intarsia.dequantize_static(n.long(), 0.5, torch.half), "or int32, found torch.int64"),
        (lambda x, n: torch.ops.intarsia.requantize(x, n, n, 0, 5, 5), "rising integers of 32 bits, found 5 and 5"),
        (lambda x, n: torch.ops.intarsia.add_requantized(x, x[:2], *[n[:1]] * 4), r"other is \(3, 6\), found \(2, 6\)"),
        (lambda x, n: torch.ops.intarsia.quantize_static(x.float(), -0.5), "scale is a positive number, found -0.5"),
        (lambda x, n: torch.ops.intarsia.unpack_i4(x), "packed is uint8, found torch.int8"),
    ],
)
def test_fake_kernels_say_what_does_not_fit(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    kernels.register()
    x, n = torch.zeros(3, 6, dtype=torch.int8, device="meta"), torch.ones(3, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match=message):
        call(x, n)
