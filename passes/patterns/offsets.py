"""Which tiles and distances a head's ``tile-offsets`` take: those that its queries' attention falls on."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.tile_offsets import TileOffsets
from intarsia.passes.patterns.tiles import Box, Tiles

Floats = NDArray[np.float64]

QUERIES = 32
"""Tiles of queries, evenly spread, that say which distances are wanted."""


def offsets_of(mass: Floats, layout: TokenLayout, block: int, *, density: float) -> TileOffsets:
    """The tiles of ``block`` tokens, and their distances, that hold most of the mass at this density.

    Args:
        mass: Mean probability with which a query attends to the key at each distance in tokens, along frames, rows and
            columns (2 frames - 1, 2 height - 1, 2 width - 1), the query itself in the middle.

    Raises:
        ValueError: ``mass`` is not one finite number for each distance.
    """
    shape = tuple(2 * extent - 1 for extent in _extents(layout))
    if mass.shape != shape or not np.isfinite(mass).all():
        raise ValueError(f"mass has the shape {mass.shape}; it is one finite number for each distance, {shape}")
    best: tuple[float, TileOffsets] | None = None
    for tile in tiles_of(layout, block):
        counts = Tiles(layout, tile).counts
        held, listed = _wanted(_between_tiles(mass, tile, counts), counts, density)
        if best is None or held > best[0] * (1 + 1e-9):
            text = ",".join(".".join(map(str, offset)) for offset in listed)
            best = held, TileOffsets(density, tile, text)
    assert best is not None
    return best[1]


def _wanted(mass: Floats, counts: Box, density: float) -> tuple[float, list[list[int]]]:
    """What queries keep of their attention, in the mean, and the distances that they want, the most wanted first.

    Some lie outside of the video for some queries, so each of some queries, evenly spread, chooses among its own.
    """
    tiles = np.stack(np.unravel_index(np.arange(np.prod(counts)), counts), axis=1)
    middle = np.array(counts) - 1
    queries = tiles[np.unique(np.linspace(0, len(tiles) - 1, QUERIES).round().astype(np.int64))]
    places = np.ravel_multi_index(tuple(np.moveaxis(tiles[None] - queries[:, None] + middle, -1, 0)), mass.shape)
    kept = max(1, round(density * len(tiles)))
    chosen = np.argsort(-mass.ravel()[places], axis=1, kind="stable")[:, :kept]
    used = np.take_along_axis(places, chosen, axis=1)
    listed = np.unique(used)
    listed = listed[np.argsort(-mass.ravel()[listed], kind="stable")]
    offsets = np.stack(np.unravel_index(listed, mass.shape), axis=1) - middle
    return float(mass.ravel()[used].sum(axis=1).mean()), offsets.tolist()


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
