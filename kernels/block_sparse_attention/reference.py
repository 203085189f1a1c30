"""Block-sparse attention in plain PyTorch: the oracle, under the whole boolean mask."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    blocks: str,
    order: str | None,
    block_q: int,
    block_k: int,
    scale: float | None,
    mean: float = 0.0,
) -> Tensor:
    """Softmax attention of query (B, H, S, D) to key and value (B, H, T, D) under the table's mask: (B, H, S, D).

    ``blocks`` is a ``BlockTable`` over positions, ``order`` a ``TokenOrder`` that says which token stands at each
    position. Keys whose token number is ``lengths`` (B) or above are not attended to. A query that attends to no key
    gives zeros. ``mean`` is the share of the result that is the mean of all values instead, those at or above
    ``lengths`` left out.
    """
    mask = token_mask(blocks, order, query.shape[2], key.shape[2], block_q, block_k).to(query.device)
    if lengths is not None:
        kept = torch.arange(key.shape[2], device=key.device)[None, :] < lengths[:, None]
        mask = mask & kept[:, None, None, :]
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    found = torch.where(mask.any(-1, keepdim=True), found, torch.zeros_like(found))
    return found if mean == 0 else found * (1 - mean) + mean_value(value, lengths) * mean


def mean_value(value: Tensor, lengths: Tensor | None) -> Tensor:
    """The mean over tokens (B, H, 1, D) of ``value`` (B, H, T, D), of the first ``lengths`` (B) of them if given."""
    if lengths is None:
        return value.mean(2, keepdim=True)
    kept = torch.arange(value.shape[2], device=value.device)[None, :] < lengths[:, None]
    counts = kept.sum(1).clamp(min=1).to(value.dtype)[:, None, None, None]
    return (value * kept[:, None, :, None].to(value.dtype)).sum(2, keepdim=True) / counts


@lru_cache(maxsize=32)
def token_mask(blocks: str, order: str | None, queries: int, keys: int, block_q: int, block_k: int) -> Tensor:
    """The boolean mask over tokens (queries, keys)."""
    mask = BlockTable.parse(blocks).mask(queries, keys, block_q, block_k)
    if order is not None:
        places = TokenOrder.parse(order).inverse()
        mask = mask[places][:, places]
    return torch.from_numpy(mask.copy())


def integers(runs: str) -> Tensor:
    """The numbers of a ``TokenOrder`` text, i64 (N)."""
    return torch.from_numpy(TokenOrder.parse(runs).indices().copy())
