"""Our attention on a GPU, up to the tokens of a video, against exact attention of some of its queries."""

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.kernels.attention.reference import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to the largest output; weights and results are rounded to the element type."""

ROWS = 64
"""Queries whose exact attention is computed in f64."""


@pytest.fixture(autouse=True)
def registered() -> None:
    kernels.register()


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def assert_near_exact(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scale: float | None) -> None:
    found = torch.ops.intarsia.attention(query, key, value, lengths, scale)
    assert found.dtype == query.dtype
    assert found.shape == query.shape
    assert found.transpose(1, 2).is_contiguous()
    some = torch.linspace(0, query.shape[2] - 1, min(ROWS, query.shape[2]), device="cuda").long()
    expected = attention(query[:, :, some].double(), key.double(), value.double(), lengths, scale)
    difference = (found[:, :, some].double() - expected).abs().max() / expected.abs().max()
    assert difference <= TOLERANCE[query.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "tokens", "channels"), [(12, 32_760, 128), (48, 17_776, 64), (4, 4_097, 32)])
def test_videos_attend_to_themselves(heads: int, tokens: int, channels: int, dtype: torch.dtype) -> None:
    query, key, value = (normal(1, tokens, heads, channels, dtype=dtype, seed=i).transpose(1, 2) for i in range(3))
    assert_near_exact(query, key, value, None, None)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (127, 512), (1_000, 77), (130, 129)])
def test_ragged_blocks_and_lengths_agree(queries: int, keys: int, channels: int, dtype: torch.dtype) -> None:
    query = normal(2, 3, queries, channels, dtype=dtype, seed=0)
    key, value = (normal(2, 3, keys, channels, dtype=dtype, seed=i) for i in (1, 2))
    assert_near_exact(query, key, value, None, 0.3)
    lengths = torch.tensor([max(1, keys // 3), keys + 5], device="cuda")
    assert_near_exact(query, key, value, lengths, None)
    assert_near_exact(query, key, value, lengths.int(), None)


def test_queries_without_keys_give_zeros() -> None:
    query = normal(2, 3, 40, 64, dtype=torch.float16, seed=0)
    lengths = torch.tensor([0, 40], device="cuda")
    found = torch.ops.intarsia.attention(query, query, query, lengths, None)
    assert not found[0].any()
    assert found[1].isfinite().all()


def test_operands_are_read_where_they_lie() -> None:
    fused = normal(2, 300, 4, 3 * 64, dtype=torch.bfloat16, seed=0)
    query, key, value = (part.transpose(1, 2) for part in fused.chunk(3, dim=-1))
    assert_near_exact(query, key, value, None, None)
    assert_near_exact(query.contiguous(), key, value.contiguous(), None, None)
