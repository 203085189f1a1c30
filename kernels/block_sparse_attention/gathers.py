"""A table of blocks as a few dense attentions: which positions of queries meet which positions of keys.

    '4:2*0,2;1-2;2-3' in blocks of 2 x 2      queries             keys                      what makes it one piece
    rows 0, 1                                 [[0 1 2 3]]         [[0 1 4 5]]               one set of keys
    rows 2, 3                                 [[4 5] [6 7]]       [[2 3 4 5] [4 5 6 7]]     equal counts of keys

Backends without a kernel for the operator gather the keys of each piece and compute its attention densely.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable, Run

COPY = 8
"""Pairs of a query and a key that cost as much as copying one key and its value: ONNX Runtime 1.31, one core."""

MASK = 1.1
"""Cost of a pair where some groups of a piece are padded: all of it is computed under a mask."""

PIECE = 1 << 17
"""Pairs that one piece less is worth: it is a handful of operators in a graph, and a start of each at run time."""

PIECES = 256
"""Of a large table, one piece less is worth this part of all pairs, so that many sizes do not make as many pieces."""

WASTE = 1.1
"""Keys that a group of queries is given for each that it asks for, at most."""


@dataclass(frozen=True, eq=False)
class Piece:
    """G groups of Q queries; each group attends to its own K keys.

    Attributes:
        queries: Positions of the queries (G, Q).
        blocks: The blocks of keys of each group, ascending (G, k).
        padding: How many of its blocks, the first ones, a group must not attend to (G); None if it attends to all.
        block: Keys of a block.
        cut: Keys that the last block of every group is short of; 0 unless it is the table's last column.
    """

    queries: NDArray[np.int64]
    blocks: NDArray[np.int64]
    padding: NDArray[np.int64] | None
    block: int
    cut: int

    @property
    def keys(self) -> NDArray[np.int64]:
        """Positions of the keys (G, K)."""
        wide = self.blocks[:, :, None] * self.block + np.arange(self.block)
        return wide.reshape(len(wide), -1)[:, : self.keys_per_group]

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """Which of its keys a group attends to (G, K); None if to all."""
        if self.padding is None:
            return None
        found: NDArray[np.bool_] = np.arange(self.keys_per_group) >= self.padding[:, None] * self.block
        return found

    @property
    def keys_per_group(self) -> int:
        """K."""
        return int(self.blocks.shape[1]) * self.block - self.cut

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed, padding included."""
        return self.queries.size * self.keys_per_group


@dataclass(frozen=True, eq=False)
class Gathers:
    """The pieces of a table, and where its answers come from.

    Attributes:
        pieces: What is computed; no query is in two of them.
        order: The token at each position (S), to gather queries, keys and values by; None if it is the position.
        answers: For each token (S) its place among the answers of all pieces, group after group; tokens that attend
            to nothing share the place behind the last. None if the places are 0 to S-1.
        zeros: Whether a row of zeros is needed there.
    """

    pieces: tuple[Piece, ...]
    order: NDArray[np.int64] | None
    answers: NDArray[np.int64] | None
    zeros: bool

    @classmethod
    def of(
        cls,
        table: BlockTable,
        order: TokenOrder | None,
        *,
        queries: int,
        keys: int,
        block_q: int,
        block_k: int,
        most: int | None = None,
    ) -> Self:
        """The pieces that cost least, by the prices above; none is padded beyond ``WASTE``.

        Args:
            table: Which blocks of ``block_q`` queries attend to which blocks of ``block_k`` keys.
            order: The token at each position; None if it is the position.
            queries: How many there are, S.
            keys: How many there are, T; S where there is an order.
            block_q: Queries of a block.
            block_k: Keys of a block.
            most: Queries of a group at most; groups that share their keys are not cut without it.
        """
        cut = table.columns * block_k - keys
        worth = max(PIECE, table.count * block_q * block_k // PIECES)
        groups = [
            _Group(group[first : first + (most or group.size)], row, cut if row[-1][1] == table.columns - 1 else 0)
            for row, parts in _rows(table, queries, block_q).items()
            for group in _together(row, parts, block_k, worth)
            for first in range(0, group.size, most or group.size)
        ]
        pieces = tuple(_piece(bucket, block_k) for bucket in _buckets(groups, block_k, worth))
        given = [piece.queries.reshape(-1) for piece in pieces]
        done = np.concatenate([*given, np.array([], np.int64)])
        answers = np.full(queries, done.size, np.int64)
        answers[done] = np.arange(done.size)
        tokens = None if order is None else order.indices()
        if tokens is not None and np.array_equal(tokens, np.arange(queries)):
            tokens = None
        if order is not None and tokens is not None:
            answers = answers[order.inverse()]
        straight = np.array_equal(answers, np.arange(queries))
        return cls(pieces, tokens, None if straight else answers, zeros=done.size < queries)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed, padding included."""
        return sum(piece.pairs for piece in self.pieces)


@dataclass(frozen=True, eq=False)
class _Group:
    """Queries that attend to the same blocks of keys, the last of which is short of ``cut`` keys."""

    queries: NDArray[np.int64]
    row: tuple[Run, ...]
    cut: int

    @property
    def count(self) -> int:
        return _count(self.row)


def _rows(table: BlockTable, queries: int, block_q: int) -> Mapping[tuple[Run, ...], Sequence[NDArray[np.int64]]]:
    """The queries of every row that attends to anything, by the row's blocks of keys."""
    found: Mapping[tuple[Run, ...], list[NDArray[np.int64]]] = defaultdict(list)
    for number, row in enumerate(table.rows):
        if row:
            found[row].append(np.arange(number * block_q, min((number + 1) * block_q, queries)))
    return found


def _together(
    row: tuple[Run, ...], parts: Sequence[NDArray[np.int64]], block_k: int, worth: int
) -> Sequence[NDArray[np.int64]]:
    """The queries of equal rows as one group where that saves more copies than a piece is worth, else one by one."""
    saved = COPY * (len(parts) - 1) * _count(row) * block_k
    return [np.concatenate(parts)] if saved > worth else parts


def _buckets(groups: Sequence[_Group], block_k: int, worth: int) -> Iterator[Sequence[_Group]]:
    """Groups that become one piece: as many queries each, and as many keys or nearly so."""
    alike: Mapping[tuple[int, int], list[_Group]] = defaultdict(list)
    for group in groups:
        alike[group.queries.size, group.cut].append(group)
    for (size, _), members in alike.items():
        members.sort(key=lambda group: group.count)
        counts = [group.count for group in members]
        cuts = _cheapest([count * block_k * size for count in counts], worth)
        for first, end in zip([0, *cuts], cuts, strict=False):
            yield sorted(members[first:end], key=lambda group: int(group.queries[0]))


def _cheapest(pairs: Sequence[int], worth: int) -> list[int]:
    """Ends of the neighbours that go together, for ascending pairs of groups: padding against pieces."""
    ends = [index + 1 for index in range(len(pairs)) if index + 1 == len(pairs) or pairs[index] < pairs[index + 1]]
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for end in ends:
        most = pairs[end - 1]
        starts = [start for start in best if most <= WASTE * pairs[start]]
        prices = {start: (end - start) * most * (MASK if pairs[start] < most else 1) + worth for start in starts}
        best[end] = min((best[start][0] + price, [*best[start][1], end]) for start, price in prices.items())
    return best[len(pairs)][1]


def _piece(groups: Sequence[_Group], block: int) -> Piece:
    count = max(group.count for group in groups)
    padding = np.array([count - group.count for group in groups], np.int64)
    blocks = [[group.row[0][0]] * (count - group.count) + _blocks(group.row) for group in groups]
    return Piece(
        queries=np.stack([group.queries for group in groups]),
        blocks=np.array(blocks, np.int64),
        padding=padding if padding.any() else None,
        block=block,
        cut=groups[0].cut,
    )


def _blocks(row: tuple[Run, ...]) -> list[int]:
    return [block for first, last in row for block in range(first, last + 1)]


def _count(row: tuple[Run, ...]) -> int:
    return sum(last - first + 1 for first, last in row)
