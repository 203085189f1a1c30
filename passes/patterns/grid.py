"""A sequence of tokens cut into blocks: which of them hold text or first frames, and what a choice of them costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import floor

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout

Blocks = NDArray[np.bool_]
"""Which blocks of keys (columns) each block of queries (rows) attends to."""


@dataclass(frozen=True)
class Grid:
    """The blocks of scores of a layout, over positions; text stands where the layout has it.

    Attributes:
        layout: The tokens.
        block_q: Tokens of a block of queries; the last block may be cut short.
        block_k: Tokens of a block of keys; the last block may be cut short.
    """

    layout: TokenLayout
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        if min(self.block_q, self.block_k) < 1:
            raise ValueError(f"blocks are {self.block_q} queries x {self.block_k} keys; both are at least 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks of queries, blocks of keys."""
        return len(self.sizes_q), len(self.sizes_k)

    @cached_property
    def sizes_q(self) -> NDArray[np.int64]:
        """Tokens in each block of queries."""
        return _sizes(self.layout.tokens, self.block_q)

    @cached_property
    def sizes_k(self) -> NDArray[np.int64]:
        """Tokens in each block of keys."""
        return _sizes(self.layout.tokens, self.block_k)

    def text(self) -> Blocks:
        """The rows and columns of blocks that hold a text token."""
        video = (self.layout.before, self.layout.before + self.layout.video)
        rows, columns = (_beyond(video, sizes) for sizes in (self.sizes_q, self.sizes_k))
        return rows[:, None] | columns[None, :]

    def sink(self, frames: int) -> Blocks:
        """The columns of blocks that hold a token of the first frames; ValueError if the video has not as many."""
        if frames > self.layout.frames:
            raise ValueError(f"sink is {frames} frames; the video has {self.layout.frames}")
        first = self.layout.before
        columns = _within((first, first + frames * self.layout.frame), self.sizes_k)
        return np.broadcast_to(columns, self.shape).copy()

    def distance(self) -> NDArray[np.int64]:
        """Half tokens between the middles of a block of queries and of a block of keys, if no block is cut short."""
        middles_q, middles_k = self.middles()
        return np.asarray(np.abs(middles_q[:, None] - middles_k[None, :]))

    def middles(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The middles of the blocks of queries and of keys in half tokens, as if no block were cut short."""
        rows, columns = (np.arange(count, dtype=np.int64) for count in self.shape)
        return (2 * rows + 1) * self.block_q, (2 * columns + 1) * self.block_k

    def pairs(self, blocks: Blocks) -> int:
        """Pairs of a query and a key in these blocks, exactly."""
        return int(self.sizes_q @ (blocks @ self.sizes_k))

    def density(self, blocks: Blocks) -> float:
        """The share of all pairs that is in these blocks."""
        return self.pairs(blocks) / self.layout.tokens**2

    def budget(self, density: float, kept: Blocks) -> int:
        """Pairs that the density leaves beside the blocks ``kept``; ValueError if those are already more than it."""
        left = floor(density * self.layout.tokens**2 + 1e-6) - self.pairs(kept)
        if left < 0:
            raise ValueError(
                f"what it keeps in any case has density {self.density(kept):.4f}, more than the {density:g} asked for; "
                "ask for more, or for smaller blocks"
            )
        return left

    def fill(self, kept: Blocks, distance: NDArray[np.int64], density: float) -> Blocks:
        """``kept`` and each row's nearest blocks, widened as far as the density allows.

        Blocks join by distance. Of the first distance for which there is no room in all rows, some rows get theirs,
        spread evenly over the sequence, so that rows differ in width by at most one step.

        Raises:
            ValueError: ``kept`` and the nearest blocks are already more than the density.
        """
        kept = kept | (distance == distance.min(axis=1, keepdims=True))
        budget = self.budget(density, kept)
        levels, level = np.unique(distance, return_inverse=True)
        level = level.reshape(self.shape)
        prices = np.where(kept, 0, self.sizes_q[:, None] * self.sizes_k[None, :])
        spent = np.cumsum(np.bincount(level.ravel(), weights=prices.ravel(), minlength=len(levels)))
        full = int(np.searchsorted(spent, budget, side="right"))
        blocks = kept | (level < full)
        if full == len(levels):
            return np.asarray(blocks)
        rows = _spread(len(prices))
        left = budget - (int(spent[full - 1]) if full else 0)
        affordable = np.cumsum(np.where(level == full, prices, 0).sum(axis=1)[rows]) <= left
        wider = np.zeros(len(rows), dtype=bool)
        wider[rows[affordable]] = True
        return np.asarray(blocks | (wider[:, None] & (level == full)))


def check_density(density: float) -> None:
    """ValueError unless the density is a number above 0 and at most 1."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; it is a number above 0 and at most 1")


def check_sink(sink: int) -> None:
    """ValueError unless the number of frames is at least 0."""
    if sink < 0:
        raise ValueError(f"sink is {sink}; it is a number of frames, 0 or more")


def _sizes(tokens: int, block: int) -> NDArray[np.int64]:
    return np.minimum(block, tokens - np.arange(0, tokens, block, dtype=np.int64))


def _within(interval: tuple[int, int], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The blocks that hold a position from the interval's first on and before its end."""
    ends = np.cumsum(sizes)
    return np.asarray((ends > interval[0]) & (ends - sizes < interval[1]) & (interval[0] < interval[1]))


def _beyond(interval: tuple[int, int], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The blocks that hold a position outside of the interval."""
    ends = np.cumsum(sizes)
    return np.asarray((ends - sizes < interval[0]) | (ends > interval[1]))


def _spread(count: int) -> NDArray[np.int64]:
    """0 to count - 1 in an order of which every beginning is spread evenly: multiples of the golden ratio, modulo 1."""
    ranks = np.arange(count, dtype=np.uint64) * np.uint64(2654435769) % np.uint64(2**32)
    return np.argsort(ranks, kind="stable")
