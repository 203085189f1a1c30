"""Block-sparse attention for TVM: tables of what each task reads, and operands packed in the order of the positions.

Neighbouring rows of the table that list the same blocks of keys are one row here. Its queries are cut into tiles, its
blocks of keys into panels of sixteen; the order of tokens is part of how both are packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intarsia.backends.tvm_attention import by_head
from intarsia.backends.tvm_operators import ROW_TILES, TILE_OVERHEAD, VECTOR, lanes
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable, Run

PANEL = 2 * VECTOR
"""Keys of a panel: two registers."""

TASK_ROWS = 64
"""Queries of a task: they pass over the same keys while those are in the cache."""

BEYOND = 2**31 - 1
"""Stands for the token of a key that is not there."""


@dataclass(frozen=True)
class Plan:
    """What is computed, as tables of i32.

    Attributes:
        tile: Queries of a tile.
        rows: The token of each query, tile after tile; the last query of a row of the table fills up its last tile.
        places: The token of each key in panels (panels, panel); ``BEYOND`` behind the end of a block.
        lists: The panels that rows of the table read, list after list.
        tasks: For each task its first tile, how many tiles, where its list begins, how many panels (tasks, 4).
    """

    tile: int
    rows: NDArray[np.int32]
    places: NDArray[np.int32]
    lists: NDArray[np.int32]
    tasks: NDArray[np.int32]

    @classmethod
    def of(cls, call: Mapping[str, Any], queries: int, keys: int) -> Plan:
        """The tables of a call, its arguments by name, for this many queries and keys."""
        order = None if call["order"] is None else TokenOrder.parse(call["order"]).indices()
        asked, block = np.arange(queries) if order is None else order, call["block_k"]
        tokens = np.arange(keys) if order is None else order
        places = np.concatenate([_padded(tokens[start : start + block]) for start in range(0, keys, block)])
        rows = list(_rows(BlockTable.parse(call["blocks"]), queries, call["block_q"]))
        tile = min(ROW_TILES, key=lambda tile: sum(_tiles(row, tile) for row in rows) * (tile + TILE_OVERHEAD))
        panels = {row.runs: _panels(row.runs, -(-block // PANEL), len(places)) for row in rows}
        begins = dict(zip(panels, accumulate(map(len, panels.values()), initial=0), strict=False))
        firsts = accumulate((_tiles(row, tile) for row in rows), initial=0)
        tasks = [
            (first + begin, count, begins[row.runs], len(panels[row.runs]))
            for row, first in zip(rows, firsts, strict=False)
            for begin, count in _shares(_tiles(row, tile), TASK_ROWS // tile)
        ]
        filled = np.concatenate([_filled(row, tile) for row in rows])
        lists = np.concatenate([*panels.values(), [0]])  # one more, so that there is an array where no row has keys
        return cls(tile, *(np.asarray(one, np.int32) for one in (asked[filled], places, lists, tasks)))


@dataclass(frozen=True)
class _Row:
    """Positions of queries from ``begin`` up to ``end`` that attend to the same runs of blocks."""

    begin: int
    end: int
    runs: tuple[Run, ...]


def attention(
    builder: Any,
    call: Mapping[str, Any],
    *,
    operands: Sequence[tuple[Any, bool]],
    lengths: Any | None,
) -> Any:
    """Emit the attention of ``call``, its arguments by name, to ``builder``: (B, S, H, D).

    ``operands`` are query, key and value as Relax has them, each with whether it is (B, S, H, D) and not (B, H, S, D).
    ``lengths`` (B) are the tokens from which on keys do not count.
    """
    from tvm import relax

    from intarsia.backends.tvm_sparse_kernel import Sizes, kernel

    (query, *_), (key, *_) = operands[:2]
    batch, heads, queries, depth = by_head(query.ty, operands[0][1])[0]
    keys = by_head(key.ty, operands[1][1])[0][2]
    found = Plan.of(call, queries, keys)
    scale = depth**-0.5 if call["scale"] is None else call["scale"]
    width = lanes(depth)
    channels = -(-depth // width) * width
    rows, places, lists, tasks = map(_constant, (found.rows, found.places, found.lists, found.tasks))
    if lengths is None:
        ends = _constant(np.full((batch,), keys, np.int32))
    else:
        ends = builder.emit(relax.op.astype(lengths, "int32"))
    packed = [
        builder.emit_te(packed_queries, query, rows, scale=scale, swapped=operands[0][1]),
        builder.emit_te(packed_keys, key, places, swapped=operands[1][1]),
        builder.emit_te(packed_values, operands[2][0], places, channels=channels, swapped=operands[2][1]),
    ]
    sizes = Sizes(
        batch=batch,
        heads=heads,
        queries=queries,
        depth=depth,
        channels=channels,
        width=width,
        rows=found.tile,
        tiles=len(found.rows) // found.tile,
        most=int(found.tasks[:, 1].max()),
        tasks=len(found.tasks),
        panels=len(found.places),
        listed=len(found.lists),
        masked=lengths is not None or bool((found.places == BEYOND).any()),
    )
    result = relax.TensorType((batch, queries, heads, depth), "float32")
    function = builder.add_func(kernel(sizes), "sparse_attention")
    return builder.emit(relax.call_tir(function, [*packed, ends, places, lists, tasks, rows], result))


def packed_queries(query: Any, rows: Any, *, scale: float, swapped: bool) -> Any:
    """Queries in the order of ``rows`` (N), scaled: (B, H, N, D)."""
    from tvm import te, tirx

    (batch, heads, _, depth), at = by_head(query, swapped)
    shape = (batch, heads, rows.shape[0], depth)
    factor = tirx.const(scale, "float32")
    return te.compute(shape, lambda b, h, i, d: at(b, h, rows[i], d) * factor, name="packed_queries")


def packed_keys(key: Any, places: Any, *, swapped: bool) -> Any:
    """Keys side by side in panels, the tokens of ``places`` (P, W): (B, H, P, D, W)."""
    from tvm import te, tirx

    (batch, heads, tokens, depth), at = by_head(key, swapped)
    panels, width = places.shape

    def packed(b: Any, h: Any, panel: Any, d: Any, lane: Any) -> Any:
        return at(b, h, tirx.min(places[panel, lane], tokens - 1), d)

    return te.compute((batch, heads, panels, depth, width), packed, name="packed_keys")


def packed_values(value: Any, places: Any, *, channels: int, swapped: bool) -> Any:
    """Values of the tokens of ``places`` (P, W), zeros for those that are not there: (B, H, P * W, channels)."""
    from tvm import te, tirx

    (batch, heads, tokens, depth), at = by_head(value, swapped)
    panels, width = places.shape

    def packed(b: Any, h: Any, i: Any, c: Any) -> Any:
        token = places[i // width, i % width]
        there = token < tokens if channels == depth else tirx.all(token < tokens, c < depth)
        return tirx.if_then_else(there, at(b, h, token, c), tirx.const(0.0, "float32"))

    return te.compute((batch, heads, panels * width, channels), packed, name="packed_values")


def _rows(table: BlockTable, queries: int, block: int) -> Iterator[_Row]:
    """Rows of the table, neighbours that are alike as one."""
    begin = 0
    for runs, alike in groupby(table.rows):
        end = min(begin + len(list(alike)) * block, queries)
        yield _Row(begin, end, runs)
        begin = end


def _tiles(row: _Row, tile: int) -> int:
    return -(-(row.end - row.begin) // tile)


def _filled(row: _Row, tile: int) -> NDArray[np.int64]:
    """Positions of the row's queries, the last one again up to a whole tile."""
    return np.minimum(row.begin + np.arange(_tiles(row, tile) * tile), row.end - 1)


def _padded(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tokens of a block of keys in panels."""
    return np.pad(tokens, (0, -len(tokens) % PANEL), constant_values=BEYOND).reshape(-1, PANEL)


def _panels(runs: Sequence[Run], each: int, panels: int) -> NDArray[np.int64]:
    """The panels of all blocks in runs, ``each`` of a block; the last block may have fewer."""
    return np.concatenate([*(np.arange(a * each, min((z + 1) * each, panels)) for a, z in runs), []]).astype(np.int64)


def _shares(count: int, most: int) -> Iterator[tuple[int, int]]:
    """``count`` things in shares of at most ``most``, as alike as can be: where each begins, and how many."""
    parts = -(-count // most)
    edges = [count * part // parts for part in range(parts + 1)]
    return ((begin, end - begin) for begin, end in pairwise(edges))


def _constant(array: NDArray[np.int32]) -> Any:
    from tvm import relax

    return relax.const(array, str(array.dtype))
