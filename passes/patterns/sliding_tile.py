"""A window of tiles, boxes of frames, rows and columns, about the query's tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid
from intarsia.passes.patterns.tiles import Box, Tiles, check_box


@dataclass(frozen=True)
class SlidingTile(Pattern):
    """Keys in the tiles about the query's tile, and the text's rows and columns; the window stays inside of the video.

    The tokens of a tile stand side by side; tiles at the far edges may be cut short. Where tiles are whole blocks, no
    block is computed that the window does not hold. Source: Sliding Tile Attention (arXiv 2502.04507), section 3.2.

    Attributes:
        window: Tiles along frames, rows and columns that a query attends to.
        tile: Frames, rows and columns of a tile.
    """

    name: ClassVar[str] = "sliding-tile"
    window: Box
    tile: Box = (2, 4, 4)

    def __post_init__(self) -> None:
        check_box("window", self.window)
        check_box("tile", self.tile)

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """Blocks that hold a query and a key of its window, with text; ValueError if the window exceeds the video."""
        grid = Grid(layout, block_q, block_k)
        cut = Tiles(layout, self.tile)
        counts = cut.counts
        if any(window > count for window, count in zip(self.window, counts, strict=True)):
            raise ValueError(f"the window is larger than the video, which has {' x '.join(map(str, counts))} tiles")
        near = np.ones((1, 1), dtype=bool)
        for count, window in zip(counts, self.window, strict=True):
            near = np.kron(near, _near(count, window))
        tiles = np.ravel_multi_index(tuple(cut.coordinates.T), counts)
        rows, columns = (_held(tiles, layout, sizes, len(near)) for sizes in (grid.sizes_q, grid.sizes_k))
        return grid.text() | (rows @ near @ columns.T > 0)

    def order(self, layout: TokenLayout) -> TokenOrder:
        """Tile by tile, whole tiles first, then those that are cut short at the far edges."""
        return Tiles(layout, self.tile).order


def _near(count: int, window: int) -> Blocks:
    """Which of the tiles along an axis each one attends to: a window that is pushed back inside at the ends."""
    tiles = np.arange(count)
    first = np.clip(tiles - window // 2, 0, count - window)[:, None]
    return (tiles >= first) & (tiles < first + window)


def _held(tiles: NDArray[np.int64], layout: TokenLayout, sizes: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Which tiles each block holds a token of, as 0 and 1 (blocks, tiles)."""
    block_of = np.repeat(np.arange(len(sizes)), sizes)[layout.before : layout.before + layout.video]
    found = np.zeros((len(sizes), count), dtype=np.float32)
    found[block_of, tiles] = 1
    return found
