"""Equally spaced diagonals, the same place in all frames: a band, once the tokens stand place by place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import Piece, TokenOrder
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid, check_density


@dataclass(frozen=True)
class MultiDiagonal(Pattern):
    """Keys at about the query's place in all frames, and the text's rows and columns.

    There is no sink: place by place, the first frame's tokens are spread over all blocks.
    Source: Sparse-vDiT (arXiv 2506.03065), section 4.2, mode 3; the order is Sparse-VideoGen's (arXiv 2502.01776).

    Attributes:
        density: Share of all pairs of a query and a key that is computed, text included.
    """

    name: ClassVar[str] = "multi-diagonal"
    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """A band with text; ValueError if text is more than the density."""
        grid = Grid(layout, block_q, block_k)
        return grid.fill(grid.text(), grid.distance(), self.density)

    def order(self, layout: TokenLayout) -> TokenOrder:
        """All frames of the first place, then of the second, and so on; text stays where it is."""
        video = Piece(layout.before, ((layout.frame, 1), (layout.frames, layout.frame)))
        return around_text(layout, video)


def around_text(layout: TokenLayout, *video: Piece) -> TokenOrder:
    """The order that leaves text where it is, with ``video`` in place of the video's tokens."""
    before = Piece(0, ((layout.before, 1),))
    after = Piece(layout.before + layout.video, ((layout.after, 1),))
    return TokenOrder(tuple(piece for piece in (before, *video, after) if piece.count))
