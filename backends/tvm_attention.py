"""Attention for TVM: all scores of a few queries, their softmax, and the mixture of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from intarsia.backends.tvm_functions import exponential
from intarsia.backends.tvm_operators import VECTOR

LOWEST = -3.0e38
"""Stands for minus infinity where an exponential follows."""


def attention(
    query: Any, key: Any, value: Any, *lengths: Any, scale: float, swapped: tuple[bool, bool, bool, bool]
) -> Any:
    """Softmax attention, a few queries at a time; keys from ``lengths`` (B) on do not count, and no key gives zeros.

    Query, key, value and result are (B, H, S, D), or (B, S, H, D) where ``swapped`` says so of each.
    """
    from tvm import te, tirx

    (batch, heads, rows, depth), query_at = by_head(query, swapped[0])
    (_, key_heads, keys, _), key_at = by_head(key, swapped[1])
    (*_, channels), value_at = by_head(value, swapped[2])
    shared = heads // key_heads
    width = 2 * VECTOR
    blocks = -(-keys // width)
    ragged = keys % width != 0

    def transposed(b: Any, h: Any, block: Any, d: Any, lane: Any) -> Any:
        place = block * width + lane
        return key_at(b, h, tirx.min(place, keys - 1) if ragged else place, d)

    packed = te.compute((batch, key_heads, blocks, depth, width), transposed, name="packed_keys")
    d = te.reduce_axis((0, depth), "d")
    scores = te.compute(
        (batch, heads, rows, blocks, width),
        lambda b, h, i, block, lane: te.sum(query_at(b, h, i, d) * packed[b, h // shared, block, d, lane], axis=d),
        name="scores",
    )

    def masked(b: Any, h: Any, i: Any, block: Any, lane: Any) -> Any:
        score = scores[b, h, i, block, lane] * tirx.const(scale, "float32")
        if not lengths and not ragged:
            return score
        end = tirx.min(lengths[0][b].astype("int32"), keys) if lengths else keys
        return tirx.Select(block * width + lane < end, score, tirx.const(LOWEST, "float32"))

    logits = te.compute((batch, heads, rows, blocks, width), masked, name="logits")
    by_lane, by_block = te.reduce_axis((0, width), "lane"), te.reduce_axis((0, blocks), "block")
    lane_max = te.compute(
        (batch, heads, rows, width),
        lambda b, h, i, lane: te.max(logits[b, h, i, by_block, lane], axis=by_block),
        name="lanes_max",
    )
    top = te.compute(
        (batch, heads, rows), lambda b, h, i: te.max(lane_max[b, h, i, by_lane], axis=by_lane), name="row_max"
    )
    weights = te.compute(
        (batch, heads, rows, blocks, width),
        lambda b, h, i, block, lane: exponential(logits[b, h, i, block, lane] - top[b, h, i]),
        name="weights",
    )
    sum_block, sum_lane = te.reduce_axis((0, blocks), "block"), te.reduce_axis((0, width), "lane")
    lane_sum = te.compute(
        (batch, heads, rows, width),
        lambda b, h, i, lane: te.sum(weights[b, h, i, sum_block, lane], axis=sum_block),
        name="lanes_sum",
    )
    total = te.compute(
        (batch, heads, rows), lambda b, h, i: te.sum(lane_sum[b, h, i, sum_lane], axis=sum_lane), name="row_sum"
    )
    j = te.reduce_axis((0, keys), "j")
    mixed = te.compute(
        (batch, heads, rows, channels),
        lambda b, h, i, c: te.sum(weights[b, h, i, j // width, j % width] * value_at(b, h // shared, j, c), axis=j),
        name="mixed",
    )

    def answer(b: Any, h: Any, i: Any, c: Any) -> Any:
        value = mixed[b, h, i, c] / total[b, h, i]
        return tirx.Select(lengths[0][b] > 0, value, tirx.const(0.0, "float32")) if lengths else value

    if swapped[3]:
        return te.compute((batch, rows, heads, channels), lambda b, i, h, c: answer(b, h, i, c), name="attention")
    return te.compute((batch, heads, rows, channels), answer, name="attention")


def by_head(tensor: Any, swapped: bool) -> tuple[tuple[int, ...], Callable[..., Any]]:
    """Sizes as (B, H, S, D), and how to read an element by its place among them."""
    b, first, second, d = (int(extent) for extent in tensor.shape)
    if swapped:
        return (b, second, first, d), lambda b, h, s, d: tensor[b, s, h, d]
    return (b, first, second, d), lambda b, h, s, d: tensor[b, h, s, d]
