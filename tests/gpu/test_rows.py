"""Our norms and the gated residual on a GPU, against their references on the same device."""

import pytest
import torch
from torch import Tensor

from intarsia import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative to the largest output: sums in another order, then one rounding to the element type."""

SHAPES = ((1, 1, 48), (2, 77, 1_536), (2, 1_560, 3_072), (1, 32_760, 5_120), (2, 5, 16_384))


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def assert_near_reference(op: str, case: dict[str, object]) -> None:
    kernels.register()
    found = getattr(torch.ops.intarsia, op)(**case)
    wanted = kernels.operators()[f"intarsia.{op}"].REFERENCES[f"intarsia.{op}"](**case)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert difference <= TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "channels"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_modulated_norm_agrees(batch: int, tokens: int, channels: int, affine: bool, dtype: torch.dtype) -> None:
    x = normal(batch, tokens, channels, dtype=dtype, seed=0)
    weight = normal(channels, dtype=dtype, seed=1) if affine else None
    for rows in ((batch, 1), (batch, tokens), (1, 1)):
        scale, shift = normal(*rows, 2 * channels, dtype=torch.float32, seed=2).chunk(2, dim=-1)
        case = {"input": x, "weight": weight, "bias": weight, "scale": scale, "shift": shift, "eps": 1e-6}
        assert_near_reference("modulated_norm", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "channels"), SHAPES)
def test_gated_residual_agrees(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> None:
    residual, x = (normal(batch, tokens, channels, dtype=dtype, seed=i) for i in range(2))
    for rows in ((batch, 1), (batch, tokens), (1, 1)):
        gate = normal(*rows, 2 * channels, dtype=torch.float32, seed=2)[..., channels:]
        assert_near_reference("gated_residual", {"residual": residual, "input": x, "gate": gate})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "channels"), SHAPES)
@pytest.mark.parametrize("with_weight", [True, False])
def test_norm_with_rope_agrees(batch: int, tokens: int, channels: int, with_weight: bool, dtype: torch.dtype) -> None:
    heads = channels // (128 if channels % 128 == 0 else 16)
    x = normal(batch, tokens, 3 * channels, dtype=dtype, seed=0)[..., channels : 2 * channels]
    angles = normal(tokens, channels // heads // 2, dtype=torch.float32, seed=1)
    weight = normal(channels, dtype=dtype, seed=2) if with_weight else None
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    assert_near_reference("norm_rope", {"input": x, "weight": weight, **tables, "heads": heads, "eps": 1e-6})
