"""Block-sparse attention in Triton: FlashAttention forward over the blocks of keys that a table lists.

A row of the table is a block of queries and the blocks of keys that it attends to; all heads of a call share it. Tokens
are read, and the result is written, through their order, so that nothing is copied into it. Blocks up to the first that
is cut short, by the end of the keys or by a length, run without masks; those from there on under one.

Sources: Dao et al., FlashAttention-2 (arXiv 2307.08691); block-CSR tables as in FlexAttention (arXiv 2412.05496).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import math
from typing import cast

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.attention.triton import Tile
from intarsia.kernels.launch import POINTERS, Launch, product, strides

TILES = {
    ("sm_80", 32): Tile(128, 64, 4, 3),
    ("sm_80", 64): Tile(128, 32, 4, 3),
    ("sm_80", 128): Tile(128, 64, 8, 3),
    ("sm_90", 32): Tile(128, 64, 4, 3),
    ("sm_90", 64): Tile(128, 128, 8, 3),
    ("sm_90", 128): Tile(128, 64, 8, 3),
    ("gfx942", 32): Tile(128, 64, 4, 1),
    ("gfx942", 64): Tile(128, 64, 4, 1),
    ("gfx942", 128): Tile(128, 64, 4, 1),
}
"""By the oldest architecture that a tile fits, and channels of a head; what fits sm_90 fits what came after.

None of them spills a register. Which is the fastest of those that do not has not been measured.
"""

ORDERED = {
    **TILES,
    ("sm_80", 128): Tile(128, 32, 8, 2),
    ("gfx942", 32): Tile(128, 32, 4, 1),
    ("gfx942", 64): Tile(128, 32, 4, 1),
    ("gfx942", 128): Tile(128, 32, 4, 1),
}
"""The same where tokens are read through an order: addresses and masks then take registers of their own."""

SINGLE = {32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 8, 1)}
"""For f32, which no tensor core multiplies exactly, by channels of a head."""

ROWS = {"sm_80": 8, "sm_90": 16, "gfx942": 8, "f32": 4}
"""Queries for each warp of a tile that the table makes smaller; with more, those for sm_80, gfx942 and f32 spill."""


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each tile of queries of each head, those of a head together, the longest rows first."""
    query, key = graph.type(node.ref("query")), graph.type(node.ref("key"))
    batch, heads, queries, channels = query.shape
    rows, scale = graph.type(node.ref("rows")).shape[0], node.args["scale"]
    block_q, block_k = (cast("int", node.args[axis]) for axis in ("block_q", "block_k"))
    assert isinstance(channels, int)
    assert isinstance(rows, int)
    assert scale is None or isinstance(scale, int | float)
    tile = _tile(node, graph, architecture)
    absent = [arg for arg in ("lengths", "tokens") if not isinstance(node.args[arg], Ref)]
    given = ("query", "key", "value", "lengths", "rows", "columns", "reach", "tokens")
    read = [arg for arg in given if arg not in absent]
    told = [strides(graph, node, operand, (0, 1, 2)) for operand in ("query", "key", "value")]
    return Launch(
        kernel="intarsia.kernels.block_sparse_attention.triton:_block_sparse_attention",
        arguments=(
            *read,
            "output",
            *(text for texts, _ in told for text in texts),
            *map(str, (heads, queries, key.shape[2])),
        ),
        types=(
            *(POINTERS[graph.type(node.ref(arg)).dtype] for arg in read),
            POINTERS[query.dtype],
            *("i64", "i64", "i32") * 3,
            *("i32",) * 3,
        ),
        constants={
            **{f"{arg}_ptr": None for arg in absent},
            "scale": (channels**-0.5 if scale is None else float(scale)) * math.log2(math.e),
            "channels": channels,
            "block_q": block_q,
            "block_k": block_k,
            "tile_q": tile.queries,
            "tile_k": tile.keys,
        },
        grid=(str(rows * (block_q // tile.queries)), product((batch, heads)), "1"),
        warps=tile.warps,
        stages=tile.stages,
        results={"output": node.type},
        layouts={"output": (0, 2, 1, 3)},
        aligned=tuple(dict.fromkeys(text for _, texts in told for text in texts)),
    )


def _tile(node: Node, graph: Graph, architecture: str) -> Tile:
    """The best tile, cut down to powers of two that divide the blocks, and to as few warps as it then keeps busy."""
    query, ordered, oldest = graph.type(node.ref("query")), isinstance(node.args["tokens"], Ref), _oldest(architecture)
    channels, single = cast("int", query.shape[3]), query.dtype == "f32"
    best = SINGLE[channels] if single else (ORDERED if ordered else TILES)[oldest, channels]
    rows = ROWS["f32" if single else oldest]
    block_q, block_k = (cast("int", node.args[axis]) for axis in ("block_q", "block_k"))
    queries = min(best.queries, block_q & -block_q)
    keys = min(best.keys, block_k & -block_k, queries)  # a small tile has too few threads to hold more
    # Where to read comes out of memory first: twice the depth keeps as many keys under way.
    stages = 2 * best.stages - 1 if ordered else best.stages
    return Tile(queries, keys, min(best.warps, max(1, queries // rows)), stages)


def _oldest(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx942"
    return "sm_90" if int(architecture.removeprefix("sm_")) >= 90 else "sm_80"


@triton.jit
def _block_sparse_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    rows_ptr,
    columns_ptr,
    reach_ptr,
    tokens_ptr,
    y_ptr,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    queries,
    keys,
    scale: tl.constexpr,
    channels: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    """A tile of queries of one head of y (B, S, H, D); q, k, v (B, H, S or T, D) lie at their strides.

    ``scale`` holds log2(e), so that the softmax is made of powers of two.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    parts: tl.constexpr = block_q // tile_q
    row = rows_ptr + tl.program_id(0) // parts * 3
    number, start, stop = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    m = number * block_q + tl.program_id(0) % parts * tile_q + tl.arange(0, tile_q)
    token = m
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + m, mask=m < queries, other=0)
    d = tl.arange(0, channels)
    q_rows = q_ptr + batch * q_batch + head * q_head + token.to(tl.int64)[:, None] * q_token
    q = tl.load(q_rows + d[None, :], mask=(m < queries)[:, None], other=0.0)
    end = keys
    if lengths_ptr is not None:
        end = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), keys)
    whole = _whole(columns_ptr, reach_ptr, start, stop, end)
    head_keys, head_values = k_ptr + batch * k_batch + head * k_head, v_ptr + batch * v_batch + head * v_head
    state = (
        tl.zeros((tile_q, channels), dtype=tl.float32),
        tl.zeros((tile_q,), dtype=tl.float32),
        tl.full((tile_q,), float("-inf"), dtype=tl.float32),
    )
    state = _attend(
        q, head_keys, head_values, k_token, v_token, columns_ptr, tokens_ptr, state, start, whole, end, keys,
        scale, block_k, tile_k, False,
    )  # fmt: skip
    total, weight, _ = _attend(
        q, head_keys, head_values, k_token, v_token, columns_ptr, tokens_ptr, state, whole, stop, end, keys,
        scale, block_k, tile_k, True,
    )  # fmt: skip
    y = total / tl.where(weight > 0, weight, 1.0)[:, None]
    y_rows = y_ptr + ((batch * queries + token)[:, None] * heads + head) * channels
    tl.store(y_rows + d[None, :], y.to(y_ptr.dtype.element_ty), mask=(m < queries)[:, None])


@triton.jit
def _whole(columns_ptr, reach_ptr, start, stop, end):
    """Where in ``columns`` the first block of the row stands that is cut short; ``stop`` if none is."""
    found = stop
    for first in tl.range(start, stop, 256, num_stages=1):
        at = first + tl.arange(0, 256)
        block = tl.load(columns_ptr + at, mask=at < stop, other=0)
        reach = tl.load(reach_ptr + block)
        found = tl.minimum(found, tl.min(tl.where((reach >= end) & (at < stop), at, stop), 0))
    return found


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    k_token,
    v_token,
    columns_ptr,
    tokens_ptr,
    state,
    start,
    stop,
    end,
    keys,
    scale: tl.constexpr,
    block_k: tl.constexpr,
    tile_k: tl.constexpr,
    ragged: tl.constexpr,
):
    """Let the blocks of keys from ``start`` to ``stop`` pass by; in ``ragged`` ones no token from ``end`` on is read.

    The state, before and after, is the weighted sum of values (M, D), the sum of weights (M), the largest score (M).
    """
    total, weight, largest = state
    d = tl.arange(0, q.shape[1])
    parts: tl.constexpr = block_k // tile_k
    block = tl.load(columns_ptr + start, mask=start < stop, other=0)
    for step in tl.range(start * parts, stop * parts, num_stages=1 if ragged else None):
        first = block * block_k + step % parts * tile_k
        following = (step + 1) // parts
        block = tl.load(columns_ptr + following, mask=following < stop, other=0)
        n = tl.arange(0, tile_k)
        if tokens_ptr is None:
            token = first + n
            k_rows = k_ptr + first.to(tl.int64) * k_token + n[None, :] * k_token
            v_rows = v_ptr + first.to(tl.int64) * v_token + n[:, None] * v_token
        else:
            if ragged:
                token = tl.load(tokens_ptr + first + n, mask=first + n < keys, other=keys)
            else:
                token = tl.load(tokens_ptr + first + n)
            k_rows = k_ptr + token.to(tl.int64)[None, :] * k_token
            v_rows = v_ptr + token.to(tl.int64)[:, None] * v_token
        kept = token < end
        k = tl.load(k_rows + d[:, None], mask=kept[None, :], other=0.0) if ragged else tl.load(k_rows + d[:, None])
        scores = tl.dot(q, k, input_precision="ieee")
        if ragged:
            scores = tl.where(kept[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1) * scale)
        pivot = tl.where(highest > float("-inf"), highest, 0.0) if ragged else highest
        shares = tl.math.exp2(scores * scale - pivot[:, None])
        fade = tl.math.exp2(largest - pivot)
        v = tl.load(v_rows + d[None, :], mask=kept[:, None], other=0.0) if ragged else tl.load(v_rows + d[None, :])
        total = tl.dot(shares.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        weight = weight * fade + tl.sum(shares, 1)
        largest = highest
    return total, weight, largest
