"""Modulated layer norm in plain PyTorch: the oracle, and what backends decompose to."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm


def modulated_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Layer norm of ``input`` (B, N, C) over C, times 1 + ``scale``, plus ``shift``: (B, N, C) in input's dtype.

    All in f32. Affine ``weight`` and ``bias`` (C); scale and shift are (B, N, C) with 1 for B or N where they do not
    vary. Source: Peebles and Xie, DiT (arXiv 2212.09748), adaLN.
    """
    affine = [None if tensor is None else tensor.float() for tensor in (weight, bias)]
    normed = layer_norm(input.float(), input.shape[-1:], affine[0], affine[1], eps)
    return (normed * (1 + scale.float()) + shift.float()).to(input.dtype)
