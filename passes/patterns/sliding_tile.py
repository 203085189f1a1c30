"""A window of tiles, boxes of frames, rows and columns, about the query's tile."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import Piece, TokenOrder
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid
from intarsia.passes.patterns.multi_diagonal import around_text

Box = tuple[int, int, int]
"""Frames, rows, columns."""


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
        for key, box in (("window", self.window), ("tile", self.tile)):
            whole = isinstance(box, tuple) and len(box) == 3 and all(type(extent) is int for extent in box)
            if not whole or min(box) < 1:
                raise ValueError(f"{key} is {box!r}; it is three whole numbers from 1 on, such as (3, 3, 3)")

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """Blocks that hold a query and a key of its window, with text; ValueError if the window exceeds the video."""
        grid = Grid(layout, block_q, block_k)
        extents = (layout.frames, layout.height, layout.width)
        counts = tuple(-(-extent // tile) for extent, tile in zip(extents, self.tile, strict=True))
        if any(window > count for window, count in zip(self.window, counts, strict=True)):
            raise ValueError(f"the window is larger than the video, which has {' x '.join(map(str, counts))} tiles")
        near = np.ones((1, 1), dtype=bool)
        for count, window in zip(counts, self.window, strict=True):
            near = np.kron(near, _near(count, window))
        tiles = self._tiles(layout, counts)
        rows, columns = (_held(tiles, layout, sizes, len(near)) for sizes in (grid.sizes_q, grid.sizes_k))
        return grid.text() | (rows @ near @ columns.T > 0)

    def order(self, layout: TokenLayout) -> TokenOrder:
        """Tile by tile, whole tiles first, then those that are cut short at the far edges."""
        strides = (layout.frame, layout.width, 1)
        extents = (layout.frames, layout.height, layout.width)
        axes = [_cuts(extent, tile, step) for extent, tile, step in zip(extents, self.tile, strides, strict=True)]
        return around_text(layout, *(_piece(layout.before, cuts, strides) for cuts in product(*axes)))

    def _tiles(self, layout: TokenLayout, counts: tuple[int, ...]) -> NDArray[np.int64]:
        """The number of the tile of the video's token at each of its positions (video)."""
        order = self.order(layout).indices() - layout.before
        video = order[(order >= 0) & (order < layout.video)]
        frames, places = np.divmod(video, layout.frame)
        rows, columns = np.divmod(places, layout.width)
        frames, rows, columns = (axis // tile for axis, tile in zip((frames, rows, columns), self.tile, strict=True))
        return (frames * counts[1] + rows) * counts[2] + columns


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


def _cuts(extent: int, tile: int, stride: int) -> list[tuple[int, int, int]]:
    """An axis as whole tiles and what is left: where it begins, how many tiles, and how long each is."""
    whole = extent // tile
    cuts = ((0, whole, tile), (whole * tile * stride, 1, extent - whole * tile))
    return [cut for cut in cuts if cut[1] * cut[2]]


def _piece(start: int, cuts: tuple[tuple[int, int, int], ...], strides: Box) -> Piece:
    tiles = tuple((count, size * stride) for (_, count, size), stride in zip(cuts, strides, strict=True))
    tokens = tuple((size, stride) for (_, _, size), stride in zip(cuts, strides, strict=True))
    return Piece(start + sum(first for first, _, _ in cuts), tiles + tokens)
