"""Which tiles and distances a head's ``tile-offsets`` take: those that its queries' attention falls on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import cast

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.tile_offsets import TileOffsets
from intarsia.passes.patterns.tiles import Box, Tiles

Floats = NDArray[np.float64]

QUERIES = 32
"""Tiles of queries, evenly spread, that say which distances are wanted."""


@dataclass(frozen=True)
class Distances:
    """How far from its queries a head looks.

    Attributes:
        mass: Mean probability with which a query attends to the key at each distance in tokens, along frames, rows and
            columns (2 frames - 1, 2 height - 1, 2 width - 1), the query itself in the middle.
        layout: The tokens.
        block: Tokens of a tile.
    """

    mass: Floats
    layout: TokenLayout
    block: int

    def __post_init__(self) -> None:
        shape = tuple(2 * extent - 1 for extent in _extents(self.layout))
        if self.mass.shape != shape or not np.isfinite(self.mass).all():
            raise ValueError(
                f"mass has the shape {self.mass.shape}; it is one finite number for each distance, {shape}"
            )

    def pattern(self, density: float) -> TileOffsets:
        """The tiles, and their distances, that hold most of the mass at this density."""
        best = max(self._tiled, key=lambda tiled: tiled.held(density))
        listed = ",".join(".".join(map(str, offset)) for offset in best.wanted(density))
        return TileOffsets(density, best.tile, listed)

    @cached_property
    def _tiled(self) -> tuple[_Tiled, ...]:
        return tuple(_Tiled.of(self.mass, self.layout, tile) for tile in tiles_of(self.layout, self.block))


@dataclass(frozen=True)
class _Tiled:
    """The same in tiles of one shape, as some queries, evenly spread, see it: each has other tiles about it.

    Attributes:
        counts: Tiles along frames, rows and columns.
        ranked: For each of the queries the distances of all tiles, by number, those of most mass first.
        mass: By number of the distance.
    """

    tile: Box
    counts: Box
    ranked: NDArray[np.int64]
    mass: Floats

    @classmethod
    def of(cls, mass: Floats, layout: TokenLayout, tile: Box) -> _Tiled:
        counts = Tiles(layout, tile).counts
        by_tile = _between_tiles(mass, tile, counts)
        tiles = np.stack(np.unravel_index(np.arange(np.prod(counts)), counts), axis=1)
        queries = tiles[np.unique(np.linspace(0, len(tiles) - 1, QUERIES).round().astype(np.int64))]
        apart = np.moveaxis(tiles[None] - queries[:, None] + np.array(counts) - 1, -1, 0)
        numbers = np.ravel_multi_index(tuple(apart), by_tile.shape)
        order = np.argsort(-by_tile.ravel()[numbers], axis=1, kind="stable")
        return cls(tile, counts, np.take_along_axis(numbers, order, axis=1), by_tile.ravel())

    def held(self, density: float) -> float:
        """What queries keep of their attention, in the mean; rounded, so that equals are equal."""
        return round(float(self.mass[self._kept(density)].sum(axis=1).mean()), 9)

    def wanted(self, density: float) -> list[list[int]]:
        """The distances that some query wants, the most wanted first."""
        listed = np.unique(self._kept(density))
        listed = listed[np.argsort(-self.mass[listed], kind="stable")]
        shape = [2 * count - 1 for count in self.counts]
        offsets = np.stack(np.unravel_index(listed, shape), axis=1) - (np.array(self.counts) - 1)
        return cast("list[list[int]]", offsets.tolist())

    def _kept(self, density: float) -> NDArray[np.int64]:
        return self.ranked[:, : max(1, round(density * self.ranked.shape[1]))]


def tiles_of(layout: TokenLayout, block: int) -> tuple[Box, ...]:
    """Tiles of ``block`` tokens, or of as many as fit, whose sides are powers of two within the video's."""
    sides = [[1 << bit for bit in range(extent.bit_length()) if 1 << bit <= extent] for extent in _extents(layout)]
    boxes = [(f, h, w) for f, h, w in product(*sides) if f * h * w <= block]
    most = max(f * h * w for f, h, w in boxes)
    return tuple(box for box in boxes if box[0] * box[1] * box[2] == most)


def _between_tiles(mass: Floats, tile: Box, counts: Box) -> Floats:
    """Probability with which a query attends to the tile at each distance in tiles, in the mean over its tile."""
    for axis, (size, count) in enumerate(zip(tile, counts, strict=True)):
        extent = mass.shape[axis] // 2
        tokens = np.arange(-extent, extent + 1)
        apart = np.abs(tokens[None, :] - size * np.arange(1 - count, count)[:, None])
        share = np.maximum(size - apart, 0) / size  # of a tile's queries, those whose key at this distance is in it
        mass = np.moveaxis(np.tensordot(share, mass, axes=(1, axis)), 0, axis)
    return mass


def _extents(layout: TokenLayout) -> Box:
    return layout.frames, layout.height, layout.width
