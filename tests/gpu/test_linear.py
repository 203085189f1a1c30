"""Our linear layers on a GPU, against the reference on the same device."""

from collections.abc import Callable

import pytest
import torch

from intarsia import kernels
from intarsia.kernels.linear_i4 import reference as reference_i4
from intarsia.kernels.linear_i8 import reference as reference_i8
from intarsia.kernels.linear_i8i8 import reference as reference_i8i8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = ((1, 40, 64), (5, 130, 96), (17, 1536, 1536), (1000, 1000, 256), (2048, 1536, 8960))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to the largest output; 16-bit references round the weight or sum in other orders."""


def inputs(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(rows, columns, generator=generator, device="cuda") / columns**0.5
    return x, weight, torch.randn(rows, generator=generator, device="cuda").to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference <= TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_eight_bits_agree(tokens: int, rows: int, columns: int, dtype: torch.dtype, with_bias: bool) -> None:
    kernels.register()
    x, weight, bias = inputs(tokens, rows, columns, dtype)
    codes, scale = torch.ops.intarsia.quantize_rows(weight)
    given = bias if with_bias else None
    assert_near(torch.ops.intarsia.linear_i8(x, codes, scale, given), reference_i8.linear_i8(x, codes, scale, given))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_four_bits_agree(tokens: int, rows: int, columns: int, dtype: torch.dtype, group: int) -> None:
    if columns % group:
        pytest.skip("the group does not divide the columns")
    kernels.register()
    x, weight, bias = inputs(tokens, rows, columns, dtype)
    packed, scale = torch.ops.intarsia.quantize_groups(weight, group)
    found = torch.ops.intarsia.linear_i4(x, packed, scale, bias, group)
    assert_near(found, reference_i4.linear_i4(x, packed, scale, bias, group))


def whole(low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_integer_layers_agree_bit_for_bit(tokens: int, rows: int, columns: int, with_bias: bool) -> None:
    kernels.register()
    x = whole(-128, 128, tokens, columns, dtype=torch.int8)
    weight = whole(-128, 128, rows, columns, dtype=torch.int8)
    bias = whole(-(2**20), 2**20, rows, dtype=torch.int32) if with_bias else None
    shift = whole(10, 20, rows, dtype=torch.int32)
    large = (whole(-(2**31), 2**31, rows, dtype=torch.int32), shift + 28)
    ties = (torch.ones_like(shift), shift - 4)
    for dyadic in (large, ties):
        found = torch.ops.intarsia.linear_i8i8(x, weight, bias, *dyadic)
        assert torch.equal(found, reference_i8i8.linear_i8i8(x, weight, bias, *dyadic))
        assert found.unique().numel() > min(16, rows)


@pytest.mark.parametrize("quantize", [reference_i8.quantize_rows, lambda w: reference_i4.quantize_groups(w, 32)])
def test_rounding_is_that_of_the_cpu_but_for_ties(
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = quantize(weight), quantize(weight.cuda())
    different = [(one != other.cpu()).double().mean().item() for one, other in zip(on_cpu, on_gpu, strict=True)]
    assert max(different) < 0.01  # sums in another order may settle a tie between two clipping ratios
