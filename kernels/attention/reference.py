"""Attention in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scale: float | None) -> Tensor:
    """Softmax of ``scale`` x query (B, H, S, D) x key (B, H, T, D), times value (B, H, T, D): (B, H, S, D).

    Keys from ``lengths`` (B) on are not attended to; a query that attends to none gives zeros. ``scale`` is D**-0.5
    if None.
    """
    mask = None
    if lengths is not None:
        keys = torch.arange(key.shape[2], device=key.device)
        mask = (keys[None, :] < lengths[:, None])[:, None, None, :]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
