"""A band about the main diagonal: neighbours in the same frame, and in the frames next to it."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid, check_density, check_sink


@dataclass(frozen=True)
class Diagonal(Pattern):
    """Keys at most a width away from the query, and the text's rows and columns.

    The width is what the density leaves. Source: Sparse-vDiT (arXiv 2506.03065), section 4.2, mode 2.

    Attributes:
        density: Share of all pairs of a query and a key that is computed, text and sink included.
        sink: First frames that every query attends to; Sparse-VideoGen has 1 for Wan and 0 for others.
    """

    name: ClassVar[str] = "diagonal"
    density: float
    sink: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_sink(self.sink)

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """A band, with text and sink; ValueError if those are more than the density."""
        grid = Grid(layout, block_q, block_k)
        return grid.fill(grid.text() | grid.sink(self.sink), grid.distance(), self.density)


def width_of_density(density: float, layout: TokenLayout) -> float:
    """Largest distance in tokens between a query and a key of a band without blocks, by Sparse-VideoGen's formula.

    With S tokens, text of which rows and columns are kept, d' = d - 2 text / S: the band that fills d' of the square is
    S (1 - sqrt(1 - d')) wide. Sparse-VideoGen then rounds the width to whole blocks of 128 tokens, down for CogVideoX
    and HunyuanVideo and up for Wan; ``Diagonal`` counts blocks instead.
    Source: ``sparsity_to_width`` of svg-project/Sparse-VideoGen, which calls the density sparsity.

    Raises:
        ValueError: The density is not above the text's rows and columns.
    """
    check_density(density)
    beside = density - 2 * (layout.before + layout.after) / layout.tokens
    if beside <= 0:
        raise ValueError(f"density {density:g} at {layout}: text alone takes {density - beside:.4f} of the pairs")
    return layout.tokens * (1 - sqrt(1 - beside))
