"""A pattern at a layout in blocks of a size: its table, its mask over tokens, what it computes and what it moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.patterns.base import Pattern


@dataclass(frozen=True)
class Mask:
    """What one head computes.

    Attributes:
        pattern: Which blocks.
        layout: The tokens, S in all.
        block_q: Tokens of a block of queries.
        block_k: Tokens of a block of keys.
    """

    pattern: Pattern
    layout: TokenLayout
    block_q: int
    block_k: int

    @cached_property
    def table(self) -> BlockTable:
        """The blocks over positions; UsageError if the pattern does not fit."""
        return self.pattern.table(self.layout, self.block_q, self.block_k)

    @cached_property
    def order(self) -> TokenOrder | None:
        """Which token stands at each position; None where they stand as they come."""
        return self.pattern.order(self.layout)

    def tokens(self) -> NDArray[np.bool_]:
        """Which keys each query attends to (S, S), both by token number: what a kernel is held against."""
        count = self.layout.tokens
        positions = self.table.mask(count, count, self.block_q, self.block_k)
        if self.order is None:
            return positions
        places = self.order.inverse()
        return positions[np.ix_(places, places)]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed, exactly."""
        return self.table.pairs(self.layout.tokens, self.layout.tokens, self.block_q, self.block_k)

    @property
    def density(self) -> float:
        """The share of all pairs that is computed."""
        return self.pairs / self.layout.tokens**2

    def flops(self, head_dim: int) -> int:
        """Floating-point operations of the two products; a multiply-add counts two."""
        return 4 * head_dim * self.pairs

    def bytes(self, head_dim: int, element: int = 2) -> int:
        """Bytes that a kernel moves which keeps nothing from one block of queries to the next.

        Queries are read and results written once, keys and values once for each block of queries that attends to them;
        queries that attend to nothing are not read. The table is counted as block-CSR in int32, the order not at all.

        Args:
            head_dim: Channels of the head.
            element: Bytes of an element.
        """
        counts = np.diff(self.table.indptr)
        sizes_q, sizes_k = self._sizes(self.block_q, len(counts)), self._sizes(self.block_k, self.table.columns)
        keys = int(sizes_k[self.table.indices].sum())
        rows = int(sizes_q[counts > 0].sum()) + 2 * keys + self.layout.tokens
        return rows * head_dim * element + 4 * (len(self.table.indptr) + self.table.count)

    def _sizes(self, block: int, count: int) -> NDArray[np.int64]:
        return np.minimum(block, self.layout.tokens - np.arange(count, dtype=np.int64) * block)
