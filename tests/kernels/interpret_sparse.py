"""Run block-sparse attention in Triton's interpreter and print its errors; see test_block_sparse_attention_triton.py.

A process of its own: TRITON_INTERPRET must be set before kernels are imported, and stays set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia import kernels
from intarsia.kernels import launch
from intarsia.kernels.block_sparse_attention.reference import block_sparse_attention
from intarsia.kernels.block_sparse_attention.tables import block_tables

GENERATOR = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Case:
    """A call on random tensors: 2 videos of 2 heads, as many queries as keys unless said otherwise."""

    name: str
    blocks: str
    tokens: int
    block_q: int = 32
    block_k: int = 32
    order: str | None = None
    lengths: tuple[int, int] | None = None
    channels: int = 32
    keys: int = 0
    dtype: torch.dtype = torch.float32
    scale: float | None = None


def cases() -> Iterator[Case]:
    """Every mode of Sparse-vDiT and what may be odd about a table, in few blocks each."""
    band, stripe = "4:0-1;0-2;1-3;2-3", "4:3*0,2;0-3"
    frames_last = "0:12*1+8*12,96:32*1"
    for dtype in (torch.float32, torch.float16):
        yield Case("dense", "4:4*0-3", 128, dtype=dtype)
        yield Case("diagonal", band, 128, dtype=dtype)
        yield Case("multi-diagonal", band, 128, order=frames_last, dtype=dtype)
        yield Case("stripe", stripe, 128, dtype=dtype)
        yield Case("empty rows", "4:-;1;-;0,3", 128, dtype=dtype)
        yield Case("lengths", band, 128, lengths=(50, 128), dtype=dtype)
        yield Case("order and lengths", band, 128, order=frames_last, lengths=(100, 300), dtype=dtype)
    yield Case("ragged", "4:0-1;0-2;1-3;2-3", 101)
    yield Case("ragged with an order", "4:0-1;0-2;1-3;2-3", 101, order="0:11*1+8*11,88:13*1")
    yield Case("an order that ends with the first tokens", band, 128, order="64:64*1,0:64*1", lengths=(70, 20))
    yield Case("lengths of nothing", stripe, 128, lengths=(0, 33))
    yield Case("no blocks at all", "4:4*-", 128)
    yield Case("blocks of two sizes", "4:0-1;2-3;0,3", 140, block_q=48, block_k=64, keys=200, scale=0.3)
    yield Case("blocks of 128 x 64", "3:0-1;1-2", 192, block_q=128, block_k=64)
    yield Case("blocks of 16", "6:0,2;1;3-5;-;0-5;2", 90, block_q=16, block_k=16, channels=64, dtype=torch.float16)
    yield Case("heads of 128 channels", "2:0-1;1", 50, channels=128, dtype=torch.float16)


def error(case: Case) -> float:
    """Largest difference, relative to the largest magnitude; infinite if types or the place of zeros differ."""
    query, key, value = operands(case)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    sizes = (case.block_q, case.block_k)
    expected = block_sparse_attention(query, key, value, lengths, case.blocks, case.order, *sizes, case.scale)
    tables = block_tables(case.blocks, case.order, key.shape[2], case.block_k)
    arrays = {**tables._asdict(), "tokens": None if case.order is None else tables.tokens}
    attention = {"query": query, "key": key, "value": value, "lengths": lengths, "scale": case.scale}
    others = {"block_q": case.block_q, "block_k": case.block_k}
    found = launch.run("intarsia.block_sparse_attention_tables", {**attention, **arrays, **others})
    alike = found.shape == expected.shape and found.dtype == expected.dtype and found.transpose(1, 2).is_contiguous()
    if not alike or not torch.equal(found == 0, expected == 0):
        return float("inf")
    return float((found.double() - expected.double()).abs().max() / max(1e-9, float(expected.abs().max())))


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query tokens before heads, key heads before tokens, value a part of a wider row."""
    keys, channels = case.keys or case.tokens, case.channels
    by_token = normal(2, case.tokens, 2, channels).to(case.dtype).transpose(1, 2)
    by_head, fused = normal(2, 2, keys, channels), normal(2, keys, 2, 3 * channels).to(case.dtype)
    return by_token, by_head.to(case.dtype), fused[..., channels : 2 * channels].transpose(1, 2)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


if __name__ == "__main__":
    kernels.register()
    print(json.dumps({f"{case.dtype} {case.name}": error(case) for case in cases()}))
