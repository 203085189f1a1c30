"""Which blocks of keys each block of queries attends to, as a short text and as block-CSR arrays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.errors import SpecError

Run = tuple[int, int]
"""Neighbouring blocks, from the first to the last, both included."""

_ROWS = re.compile(r"(?:(\d+)\*)?(-|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)")


@dataclass(frozen=True)
class BlockTable:
    """For each block of queries the blocks of keys that it attends to, ascending, as runs.

    ``16:12*0-3,7;4*-`` has 16 blocks of keys; 12 blocks of queries see the keys' blocks 0 to 3 and 7, 4 see none.
    """

    rows: tuple[tuple[Run, ...], ...]
    columns: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` wrote; SpecError if it is not of that form or a row is not ascending."""
        columns, colon, rest = text.partition(":")
        found = [_ROWS.fullmatch(part) for part in rest.split(";")]
        if not colon or not columns.isdigit() or not all(found):
            raise SpecError(f"expected a table of blocks such as '16:12*0-3,7;4*-', found {text[:60]!r}")
        rows = tuple(chain.from_iterable((_runs(m[2]),) * int(m[1] or 1) for m in found if m))
        for runs in set(rows):
            if not _ascending(runs):
                raise SpecError(f"table of blocks: the row {_print_row(runs)!r} is not ascending")
            if runs and runs[-1][1] >= int(columns):
                raise SpecError(f"table of blocks: the row {_print_row(runs)!r} goes beyond {columns} blocks of keys")
        return cls(rows, int(columns))

    @classmethod
    def of(cls, blocks: NDArray[np.bool_]) -> Self:
        """The table of a boolean matrix (blocks of queries, blocks of keys)."""
        return cls(tuple(_runs_of(row) for row in blocks), blocks.shape[1])

    def __str__(self) -> str:
        parts = []
        for row, group in groupby(self.rows):
            count = len(list(group))
            parts.append(f"{count}*{_print_row(row)}" if count > 1 else _print_row(row))
        return f"{self.columns}:{';'.join(parts)}"

    @property
    def count(self) -> int:
        """Blocks that are computed."""
        return int(self.indptr[-1])

    @cached_property
    def indptr(self) -> NDArray[np.int32]:
        """Where each row begins in ``indices`` (blocks of queries + 1)."""
        counts = [sum(last - first + 1 for first, last in row) for row in self.rows]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    @cached_property
    def indices(self) -> NDArray[np.int32]:
        """The blocks of keys of all rows, row after row (count)."""
        runs = [np.arange(first, last + 1) for row in self.rows for first, last in row]
        return np.concatenate([*runs, []]).astype(np.int32)

    def blocks(self) -> NDArray[np.bool_]:
        """The boolean matrix (blocks of queries, blocks of keys)."""
        found = np.zeros((len(self.rows), self.columns), dtype=bool)
        for number, row in enumerate(self.rows):
            for first, last in row:
                found[number, first : last + 1] = True
        return found

    def pairs(self, queries: int, keys: int, block_q: int, block_k: int) -> int:
        """How many pairs of a query and a key are computed; the last blocks may be cut short."""
        q_sizes = np.minimum(block_q, queries - np.arange(len(self.rows)) * block_q)
        k_ends = np.minimum(np.arange(self.columns + 1) * block_k, keys)
        per_row = [sum(int(k_ends[last + 1] - k_ends[first]) for first, last in row) for row in self.rows]
        return int(np.dot(q_sizes.astype(np.int64), np.array(per_row, dtype=np.int64)))

    def mask(self, queries: int, keys: int, block_q: int, block_k: int) -> NDArray[np.bool_]:
        """The boolean mask over positions (queries, keys)."""
        wide = np.repeat(np.repeat(self.blocks(), block_q, axis=0), block_k, axis=1)
        return wide[:queries, :keys]


def _runs(text: str) -> tuple[Run, ...]:
    if text == "-":
        return ()
    pairs = (part.partition("-") for part in text.split(","))
    return tuple((int(first), int(last or first)) for first, _, last in pairs)


def _ascending(runs: tuple[Run, ...]) -> bool:
    within = all(first <= last for first, last in runs)
    return within and all(last < first for (_, last), (first, _) in pairwise(runs))


def _runs_of(row: NDArray[np.bool_]) -> tuple[Run, ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
    return tuple((int(first), int(end) - 1) for first, end in edges.reshape(-1, 2))


def _print_row(row: tuple[Run, ...]) -> str:
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in row) or "-"
