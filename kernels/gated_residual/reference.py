"""Gated residual sum in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

from torch import Tensor


def gated_residual(residual: Tensor, input: Tensor, gate: Tensor) -> Tensor:
    """``residual`` + ``input`` x ``gate`` in f32: (B, N, C) in residual's dtype.

    Gate is (B, N, C) with 1 for B or N where it does not vary. Source: Peebles and Xie, DiT (arXiv 2212.09748).
    """
    return (residual.float() + input.float() * gate.float()).to(residual.dtype)
