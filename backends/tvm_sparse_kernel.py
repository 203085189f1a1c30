"""Block-sparse attention in TVM's script: a task is some tiles of queries, and reads the panels of keys of their row.

The softmax is kept up as panels pass by, so that nothing larger than a few panels of scores is ever stored.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-redef"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tvm.script import tirx as T  # noqa: N812

from intarsia.backends.tvm_attention import LOWEST
from intarsia.backends.tvm_functions import exponential
from intarsia.backends.tvm_sparse import PANEL

PANELS = 4
"""Panels whose scores are made before values are mixed: 64 keys and values of 64 channels are 32 KiB."""


@dataclass(frozen=True)
class Sizes:
    """What a kernel is made for.

    Attributes:
        batch: B.
        heads: H.
        queries: S.
        depth: Channels D of a head.
        channels: Channels of values, zeros behind the D up to a multiple of ``width``.
        width: Channels that are mixed at once.
        rows: Queries of a tile.
        tiles: Tiles of all tasks.
        most: Tiles of the largest task.
        tasks: Tasks of a head.
        panels: Panels of keys of a head.
        listed: Panels in the lists of all rows.
        masked: Whether there are keys that do not count.
    """

    batch: int
    heads: int
    queries: int
    depth: int
    channels: int
    width: int
    rows: int
    tiles: int
    most: int
    tasks: int
    panels: int
    listed: int
    masked: bool


@lru_cache(maxsize=64)
def kernel(n: Sizes) -> Any:
    """The function of packed queries, keys and values, of ends and of a plan's tables; heads beside channels.

    queries (B, H, tiles * rows, depth), scaled; keys (B, H, panels, depth, PANEL); values (B, H, panels * PANEL,
    channels); ends (B): tokens from there on do not count; places (panels, PANEL): the token of each key; lists
    (listed): panels, list after list; tasks (tasks, 4): first tile, tiles, where the list begins, its length; rows
    (tiles * rows): the token of each query; result (B, S, H, depth).
    """

    @T.prim_func(s_tir=True)
    def sparse_attention(  # noqa: PLR0917
        query_data: T.handle,
        key_data: T.handle,
        value_data: T.handle,
        end_data: T.handle,
        place_data: T.handle,
        list_data: T.handle,
        task_data: T.handle,
        row_data: T.handle,
        result_data: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        queries = T.match_buffer(query_data, (n.batch, n.heads, n.tiles * n.rows, n.depth))
        keys = T.match_buffer(key_data, (n.batch, n.heads, n.panels, n.depth, PANEL))
        values = T.match_buffer(value_data, (n.batch, n.heads, n.panels * PANEL, n.channels))
        ends = T.match_buffer(end_data, (n.batch,), "int32")
        places = T.match_buffer(place_data, (n.panels, PANEL), "int32")
        lists = T.match_buffer(list_data, (n.listed,), "int32")
        tasks = T.match_buffer(task_data, (n.tasks, 4), "int32")
        rows = T.match_buffer(row_data, (n.tiles * n.rows,), "int32")
        result = T.match_buffer(result_data, (n.batch, n.queries, n.heads, n.depth))
        for task in T.parallel(n.batch * n.heads * n.tasks):
            with T.sblock("sparse_attention"):
                index = T.axis.spatial(n.batch * n.heads * n.tasks, task)
                T.reads(queries[:, :, :, :])
                T.writes(result[:, :, :, :])
                logits = T.sblock_alloc_buffer((n.rows, PANELS * PANEL))
                top = T.sblock_alloc_buffer((n.most * n.rows,))
                total = T.sblock_alloc_buffer((n.most * n.rows, PANEL))
                mixed = T.sblock_alloc_buffer((n.most * n.rows, n.channels))
                lanes = T.sblock_alloc_buffer((n.rows, PANEL), scope="local")
                scores = T.sblock_alloc_buffer((n.rows, PANEL), scope="local")
                mixture = T.sblock_alloc_buffer((n.rows, n.width), scope="local")
                peak = T.sblock_alloc_buffer((n.rows,), scope="local")
                shrink = T.sblock_alloc_buffer((n.rows,), scope="local")
                b: T.let = index // (n.heads * n.tasks)
                h: T.let = index // n.tasks % n.heads
                first: T.let = tasks[index % n.tasks, 0]
                count: T.let = tasks[index % n.tasks, 1]
                begin: T.let = tasks[index % n.tasks, 2]
                length: T.let = tasks[index % n.tasks, 3]
                _begin(n, count, top, total, mixed)
                for chunk in range((length + PANELS - 1) // PANELS):
                    start: T.let = begin + chunk * PANELS
                    several: T.let = T.min(PANELS, length - chunk * PANELS)
                    for tile in range(count):
                        query: T.let = (first + tile) * n.rows
                        row: T.let = tile * n.rows
                        _fill(n, lanes, LOWEST)
                        for j in range(several):
                            panel: T.let = lists[start + j]
                            _score(n, b, h, query, panel, queries, keys, scores)
                            if n.masked:
                                _mask(n, panel, ends[b], places, scores)
                            _store(n, j, scores, lanes, logits)
                        _raise(n, row, lanes, top, peak, shrink)
                        _weigh(n, row, several, logits, total, lanes, peak, shrink)
                        for part in range(n.channels // n.width):
                            _load(n, row, part, mixed, shrink, mixture)
                            for j in range(several):
                                panel: T.let = lists[start + j]
                                _mix(n, b, h, j, panel, part, logits, values, mixture)
                            _keep(n, row, part, mixture, mixed)
                _finish(n, b, h, first, count, rows, total, mixed, peak, result)

    return sparse_attention


@T.inline
def _begin(n, count, top, total, mixed):
    for row in range(count * n.rows):
        top[row] = T.float32(LOWEST)
        for lane in T.vectorized(PANEL):
            total[row, lane] = T.float32(0)
        for part in range(n.channels // n.width):
            for c in T.vectorized(n.width):
                mixed[row, part * n.width + c] = T.float32(0)


@T.inline
def _fill(n, lanes, number):
    for r in T.unroll(n.rows):
        for lane in T.vectorized(PANEL):
            lanes[r, lane] = T.float32(number)


@T.inline
def _score(n, b, h, query, panel, queries, keys, scores):  # noqa: PLR0917
    """Products of a tile of queries and a panel of keys, in registers."""
    for r in T.unroll(n.rows):
        for lane in T.vectorized(PANEL):
            scores[r, lane] = T.float32(0)
    for d in range(n.depth):
        for r in T.unroll(n.rows):
            for lane in T.vectorized(PANEL):
                scores[r, lane] = scores[r, lane] + queries[b, h, query + r, d] * keys[b, h, panel, d, lane]


@T.inline
def _mask(n, panel, end, places, scores):
    for r in T.unroll(n.rows):
        for lane in T.vectorized(PANEL):
            scores[r, lane] = T.Select(places[panel, lane] < end, scores[r, lane], T.float32(LOWEST))


@T.inline
def _store(n, j, scores, lanes, logits):
    """Keep the scores, and the largest of each lane."""
    for r in T.unroll(n.rows):
        for lane in T.vectorized(PANEL):
            lanes[r, lane] = T.max(lanes[r, lane], scores[r, lane])
    for r in T.unroll(n.rows):
        for lane in T.vectorized(PANEL):
            logits[r, j * PANEL + lane] = scores[r, lane]


@T.inline
def _raise(n, row, lanes, top, peak, shrink):  # noqa: PLR0917
    """The largest score of each query so far, and what is left of sums that were made with the one before."""
    for r in T.unroll(n.rows):
        peak[r] = top[row + r]
    for lane in range(PANEL):
        for r in T.unroll(n.rows):
            peak[r] = T.max(peak[r], lanes[r, lane])
    for r in T.unroll(n.rows):
        shrink[r] = exponential(top[row + r] - peak[r])
        top[row + r] = peak[r]


def _weight(logit: Any, peak: Any, masked: bool) -> Any:
    weight = exponential(logit - peak)
    return T.Select(logit > T.float32(LOWEST), weight, T.float32(0)) if masked else weight


@T.inline
def _weigh(n, row, several, logits, total, lanes, peak, shrink):  # noqa: PLR0917
    """Scores to weights, added up lane by lane; a masked key has none."""
    for r in T.unroll(n.rows):
        for lane in T.vectorized(PANEL):
            lanes[r, lane] = total[row + r, lane] * shrink[r]
        for j in range(several):
            for lane in T.vectorized(PANEL):
                logits[r, j * PANEL + lane] = _weight(logits[r, j * PANEL + lane], peak[r], n.masked)
            for lane in T.vectorized(PANEL):
                lanes[r, lane] = lanes[r, lane] + logits[r, j * PANEL + lane]
        for lane in T.vectorized(PANEL):
            total[row + r, lane] = lanes[r, lane]


@T.inline
def _load(n, row, part, mixed, shrink, mixture):  # noqa: PLR0917
    for r in T.unroll(n.rows):
        for c in T.vectorized(n.width):
            mixture[r, c] = mixed[row + r, part * n.width + c] * shrink[r]


@T.inline
def _mix(n, b, h, j, panel, part, logits, values, mixture):  # noqa: PLR0917
    """Add a panel's values by their weights, in registers."""
    for lane in range(PANEL):
        for r in T.unroll(n.rows):
            for c in T.vectorized(n.width):
                mixture[r, c] = (
                    mixture[r, c] + logits[r, j * PANEL + lane] * values[b, h, panel * PANEL + lane, part * n.width + c]
                )


@T.inline
def _keep(n, row, part, mixture, mixed):
    for r in T.unroll(n.rows):
        for c in T.vectorized(n.width):
            mixed[row + r, part * n.width + c] = mixture[r, c]


@T.inline
def _finish(n, b, h, first, count, rows, total, mixed, peak, result):  # noqa: PLR0917
    """Each query's mixture by the sum of its weights, to its token's place; zeros if it has no key."""
    for row in range(count * n.rows):
        peak[0] = T.float32(0)
        for lane in range(PANEL):
            peak[0] = peak[0] + total[row, lane]
        for c in range(n.depth):
            result[b, rows[first * n.rows + row], h, c] = T.Select(
                peak[0] > T.float32(0), mixed[row, c] / peak[0], T.float32(0)
            )
