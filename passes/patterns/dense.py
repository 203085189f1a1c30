"""Every query attends to every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid


@dataclass(frozen=True)
class Dense(Pattern):
    """All blocks.

    Source: Sparse-vDiT (arXiv 2506.03065), section 4.2, mode 0.
    """

    name: ClassVar[str] = "dense"

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """All of them."""
        return np.ones(Grid(layout, block_q, block_k).shape, dtype=bool)
