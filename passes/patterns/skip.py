"""No query attends to any key: what the head gives is zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid


@dataclass(frozen=True)
class Skip(Pattern):
    """No block, so zeros, for text too.

    Source: Sparse-vDiT (arXiv 2506.03065), section 4.2, mode 1.
    """

    name: ClassVar[str] = "skip"
    may_be_empty: ClassVar[bool] = True

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """None of them."""
        return np.zeros(Grid(layout, block_q, block_k).shape, dtype=bool)
