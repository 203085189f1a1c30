"""A table of blocks and an order of tokens as arrays of 32 bits, as a kernel reads them, and attention under them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable

NEVER = 2**31 - 1
"""The reach of a block that is cut short: no length is above it."""


class Tables(NamedTuple):
    """What ``intarsia.block_tables`` gives, i32.

    Attributes:
        rows: For each block of queries its number, and where its blocks of keys begin and end in ``columns`` (M, 3).
            Those with the most keys come first, so that none of them is what the GPU waits for at the end.
        columns: The blocks of keys of all rows, one row after the other, ascending in each (blocks computed).
        reach: The largest token in each block of keys, ``NEVER`` if the block is cut short (N). A block is attended to
            as a whole if its reach is below the number of keys and below the length.
        tokens: The token at each position (S); none where tokens stand as they come.
    """

    rows: Tensor
    columns: Tensor
    reach: Tensor
    tokens: Tensor


def block_tables(blocks: str, order: str | None, keys: int, block_k: int) -> Tables:
    """The arrays of a ``BlockTable`` text over ``keys`` keys, and of a ``TokenOrder`` text or None."""
    table = BlockTable.parse(blocks)
    tokens = np.arange(0) if order is None else TokenOrder.parse(order).indices()
    counts = np.diff(table.indptr)
    numbers = np.argsort(-counts, kind="stable")
    ends = np.cumsum(counts[numbers])
    rows = np.stack([numbers, ends - counts[numbers], ends], axis=1)
    parts = [table.indices[table.indptr[number] : table.indptr[number + 1]] for number in numbers]
    reach = _reach(tokens if order is not None else np.arange(keys), table.columns, block_k)
    return Tables(*map(_i32, (rows, np.concatenate([*parts, np.arange(0)]), reach, tokens)))


@lru_cache(maxsize=256)
def tables_on(device: torch.device, blocks: str, order: str | None, keys: int, block_k: int) -> Tables:
    """The same arrays on a device, made once."""
    return Tables(*(array.to(device) for array in block_tables(blocks, order, keys, block_k)))


def block_sparse_attention_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    reach: Tensor,
    tokens: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float | None,
) -> Tensor:
    """``block_sparse_attention`` of the tables: query (B, H, S, D), key and value (B, H, T, D): (B, H, S, D).

    The reach follows from the rest; it tells a kernel which blocks need no mask.
    """
    numbers = torch.repeat_interleave(rows[:, 0], rows[:, 2] - rows[:, 1], output_size=columns.shape[0])
    blocks = torch.zeros((rows.shape[0], reach.shape[0]), dtype=torch.bool, device=query.device)
    blocks = blocks.index_put((numbers, columns), torch.ones((), dtype=torch.bool, device=query.device))
    positions_q, positions_k = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    if tokens is not None:
        positions_q = positions_k = torch.argsort(tokens)
    mask = blocks[positions_q // block_q][:, positions_k // block_k]
    if lengths is not None:
        kept = torch.arange(key.shape[2], device=key.device)[None, :] < lengths[:, None]
        mask = mask & kept[:, None, None, :]
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return torch.where(mask.any(-1, keepdim=True), found, torch.zeros_like(found))


def _reach(tokens: NDArray[np.int64], columns: int, block_k: int) -> NDArray[np.int64]:
    padded = np.full(columns * block_k, NEVER)
    padded[: len(tokens)] = tokens
    largest: NDArray[np.int64] = padded.reshape(columns, block_k).max(axis=1)
    return largest


def _i32(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array.astype(np.int32))
