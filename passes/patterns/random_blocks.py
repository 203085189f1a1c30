"""Blocks drawn at random: what a pattern must beat at the same density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid, check_density


@dataclass(frozen=True)
class Random(Pattern):
    """Blocks drawn at random, at least one in each row, and the text's rows and columns.

    Attributes:
        density: Share of all pairs of a query and a key that is computed, text included.
        seed: Another seed draws other blocks.
    """

    name: ClassVar[str] = "random"
    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it is at least 0 and below 2^32")

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """As many blocks as the density allows, with text; ValueError if text and one block a row exceed it."""
        grid = Grid(layout, block_q, block_k)
        drawn = np.random.RandomState(self.seed).permutation(grid.shape[0] * grid.shape[1])  # alike in every NumPy
        return grid.fill(grid.text(), drawn.reshape(grid.shape), self.density)
