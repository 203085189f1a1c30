"""RMS norm and rotary embedding in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rope(input: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    """RMS norm of ``input`` (B, N, C) over all of C, then neighbouring pairs of channels turned: (B, N, heads, D).

    All in f32, result in input's dtype. Weight (C); cos and sin f32 (N, D/2), the same for every head, D = C / heads.
    Sources: Zhang and Sennrich, RMSNorm (arXiv 1910.07467); Su et al., RoFormer (arXiv 2104.09864).
    """
    batch, tokens, channels = input.shape
    wide = input.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    pairs = normed.reshape(batch, tokens, heads, channels // heads // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.reshape(batch, tokens, heads, channels // heads).to(input.dtype)
