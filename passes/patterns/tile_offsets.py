"""Tiles at certain distances along frames, rows and columns from the query's tile, the same for all queries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid, check_density
from intarsia.passes.patterns.tiles import Box, Tiles, check_box

_OFFSETS = re.compile(r"-?\d+\.-?\d+\.-?\d+(,-?\d+\.-?\d+\.-?\d+)*")


@dataclass(frozen=True)
class TileOffsets(Pattern):
    """Each query's best tiles by a list of distances, and the text's rows and columns.

    Attention of video depends on how far apart two places are more than on where they are, so one list of distances
    serves all queries; diagonal, multi-diagonal and radial patterns are such lists. A query whose tiles at these
    distances lie outside of the video takes the next nearest ones, so that all queries have as many.

    Attributes:
        density: Share of all pairs of a query and a key that is computed, text included.
        tile: Frames, rows and columns of a tile, whose tokens stand side by side; best as many tokens as a block.
        offsets: Distances in tiles along frames, rows and columns, the most wanted first: ``0.0.0,-1.0.0,0.2.1``;
            ``offsets.Distances`` finds them by mass. None takes the nearest tiles.
    """

    name: ClassVar[str] = "tile-offsets"
    density: float
    tile: Box = (2, 4, 4)
    offsets: str | None = None

    def __post_init__(self) -> None:
        check_density(self.density)
        check_box("tile", self.tile)
        if self.offsets is not None and not (isinstance(self.offsets, str) and _OFFSETS.fullmatch(self.offsets)):
            raise ValueError(f"offsets is {self.offsets!r}; it is distances in tiles such as '0.0.0,-1.0.0,0.2.1'")

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """Each row's most wanted blocks, with text; ValueError if text and one block a row exceed the density."""
        grid = Grid(layout, block_q, block_k)
        tiles = Tiles(layout, self.tile)
        first, second = (_coordinates(tiles, sizes) for sizes in (grid.sizes_q, grid.sizes_k))
        distance = second[None, :, :] - first[:, None, :]
        wanted = np.lexsort((_nearness(distance, self.tile), self._place(distance, tiles.counts)), axis=1)
        return grid.fill(grid.text(), np.argsort(wanted, axis=1), self.density)

    def order(self, layout: TokenLayout) -> TokenOrder:
        """Tile by tile, whole tiles first, then those that are cut short at the far edges."""
        return Tiles(layout, self.tile).order

    def _place(self, distance: NDArray[np.int64], counts: Box) -> NDArray[np.int64]:
        """Where in the list each distance (..., 3) stands; behind its end if it is not in the list."""
        listed = [tuple(map(int, text.split("."))) for text in (self.offsets or "").split(",") if text]
        places = np.full([2 * count - 1 for count in counts], len(listed), dtype=np.int64)
        middle = np.array(counts) - 1
        for place, offset in reversed(list(enumerate(listed))):
            if all(abs(along) < count for along, count in zip(offset, counts, strict=True)):
                places[tuple(middle + offset)] = place
        return np.asarray(places[tuple(np.moveaxis(distance + middle, -1, 0))])


def _coordinates(tiles: Tiles, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frame, row and column, in tiles, of the tile that holds the middle of each block (blocks, 3)."""
    middles = np.cumsum(sizes) - (sizes + 1) // 2 - tiles.layout.before
    return np.asarray(tiles.coordinates[np.clip(middles, 0, tiles.layout.video - 1)])


def _nearness(distance: NDArray[np.int64], tile: Box) -> NDArray[np.int64]:
    """Squared distances in tokens."""
    return np.asarray(np.square(distance * np.array(tile)).sum(axis=-1))
