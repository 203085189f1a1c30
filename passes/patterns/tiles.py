"""A video's tokens cut into tiles, boxes of frames, rows and columns, that stand side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import Piece, TokenOrder
from intarsia.passes.patterns.multi_diagonal import around_text

Box = tuple[int, int, int]
"""Frames, rows, columns."""


def check_box(key: str, box: object) -> None:
    """ValueError unless it is three whole numbers from 1 on."""
    if not (isinstance(box, tuple) and len(box) == 3 and all(type(extent) is int and extent > 0 for extent in box)):
        raise ValueError(f"{key} is {box!r}; it is three whole numbers from 1 on, such as (3, 3, 3)")


@dataclass(frozen=True)
class Tiles:
    """The tiles of a layout; those at the far edges may be cut short.

    Attributes:
        layout: The tokens.
        tile: Frames, rows and columns of a tile.
    """

    layout: TokenLayout
    tile: Box

    @property
    def counts(self) -> Box:
        """Tiles along frames, rows and columns."""
        frames, rows, columns = (-(-extent // size) for extent, size in zip(self._extents, self.tile, strict=True))
        return frames, rows, columns

    @cached_property
    def order(self) -> TokenOrder:
        """Tile by tile, whole tiles first, then those that are cut short; text stays where it is."""
        cuts = [_cuts(*axis) for axis in zip(self._extents, self.tile, self._strides, strict=True)]
        return around_text(self.layout, *(self._piece(chosen) for chosen in product(*cuts)))

    @cached_property
    def coordinates(self) -> NDArray[np.int64]:
        """Frame, row and column of the tile of the video's token at each of its positions (video, 3), in tiles."""
        order = self.order.indices() - self.layout.before
        video = order[(order >= 0) & (order < self.layout.video)]
        frames, places = np.divmod(video, self.layout.frame)
        rows, columns = np.divmod(places, self.layout.width)
        return np.asarray(np.stack([frames, rows, columns], axis=1) // np.array(self.tile))

    @property
    def _extents(self) -> Box:
        return self.layout.frames, self.layout.height, self.layout.width

    @property
    def _strides(self) -> Box:
        return self.layout.frame, self.layout.width, 1

    def _piece(self, cuts: tuple[tuple[int, int, int], ...]) -> Piece:
        strides = self._strides
        tiles = tuple((count, size * stride) for (_, count, size), stride in zip(cuts, strides, strict=True))
        tokens = tuple((size, stride) for (_, _, size), stride in zip(cuts, strides, strict=True))
        return Piece(self.layout.before + sum(first for first, _, _ in cuts), tiles + tokens)


def _cuts(extent: int, tile: int, stride: int) -> list[tuple[int, int, int]]:
    """An axis as whole tiles and what is left: where it begins, how many tiles, and how long each is."""
    whole = extent // tile
    cuts = ((0, whole, tile), (whole * tile * stride, 1, extent - whole * tile))
    return [cut for cut in cuts if cut[1] * cut[2]]
