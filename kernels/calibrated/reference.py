"""The identity in plain PyTorch: what backends decompose to."""

from __future__ import annotations

from torch import Tensor


def calibrated(input: Tensor, low: float, high: float) -> Tensor:
    """``input``; ``low`` and ``high`` are for passes to read."""
    return input.clone()
