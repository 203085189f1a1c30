"""Attention in Triton: FlashAttention forward, a block of queries at a time, the softmax kept up as keys pass by.

Sources: Dao et al., FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, cdiv, product, strides


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a block, warps that share it, depth of the pipeline that fetches keys and values."""

    queries: int
    keys: int
    warps: int
    stages: int


TILES = {
    ("sm_80", 32): Tile(128, 64, 4, 3),
    ("sm_80", 64): Tile(128, 32, 4, 3),
    ("sm_80", 128): Tile(128, 64, 8, 2),
    ("sm_90", 32): Tile(128, 128, 8, 3),
    ("sm_90", 64): Tile(128, 128, 8, 3),
    ("sm_90", 128): Tile(128, 128, 8, 2),
    ("gfx942", 32): Tile(128, 64, 4, 1),
    ("gfx942", 64): Tile(128, 64, 4, 1),
    ("gfx942", 128): Tile(128, 64, 4, 1),
}
"""By the oldest architecture that a tile fits, and channels of a head; what fits sm_90 fits what came after.

None of them spills a register. On sm_80 a warp of 16 queries reads shared memory as fast as it can (256 bytes for each
``mma.sync``, which takes two cycles), so that 32 queries a warp are better where the registers suffice.
"""

SINGLE = Tile(64, 32, 4, 1)
"""For f32, which no tensor core multiplies exactly."""


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each block of queries of each head; all blocks of a head run together and share its keys."""
    query, key = graph.type(node.ref("query")), graph.type(node.ref("key"))
    batch, heads, tokens, channels = query.shape
    assert isinstance(channels, int)
    scale, lengths = node.args["scale"], node.args["lengths"]
    assert scale is None or isinstance(scale, int | float)
    tile = _tile(architecture, query.dtype, channels)
    lengths_type = (POINTERS[graph.type(lengths.name).dtype],) if isinstance(lengths, Ref) else ()
    told = [strides(graph, node, operand, (0, 1, 2)) for operand in ("query", "key", "value")]
    return Launch(
        kernel="intarsia.kernels.attention.triton:_attention",
        arguments=(
            *("query", "key", "value"),
            *(("lengths",) if lengths_type else ()),
            "output",
            *(text for texts, _ in told for text in texts),
            *map(str, (heads, tokens, key.shape[2])),
        ),
        types=(
            *(POINTERS[query.dtype],) * 3,
            *lengths_type,
            POINTERS[query.dtype],
            *("i64", "i64", "i32") * 3,
            *("i32",) * 3,
        ),
        constants={
            **({} if lengths_type else {"lengths_ptr": None}),
            "scale": (channels**-0.5 if scale is None else float(scale)) * math.log2(math.e),
            "channels": channels,
            "block_m": tile.queries,
            "block_n": tile.keys,
        },
        grid=(cdiv(tokens, tile.queries), product((batch, heads)), "1"),
        warps=tile.warps,
        stages=tile.stages,
        results={"output": node.type},
        layouts={"output": (0, 2, 1, 3)},
        aligned=tuple(dict.fromkeys(text for _, texts in told for text in texts)),
    )


def _tile(architecture: str, dtype: str, channels: int) -> Tile:
    if dtype == "f32":
        return SINGLE
    if architecture.startswith("gfx"):
        return TILES["gfx942", channels]
    return TILES["sm_90" if int(architecture.removeprefix("sm_")) >= 90 else "sm_80", channels]


@triton.jit
def _attention(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
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
    block_m: tl.constexpr,
    block_n: tl.constexpr,
):
    """One block of queries of one head of y (B, S, H, D); q, k, v (B, H, S or T, D) lie at their strides.

    ``scale`` holds log2(e), so that the softmax is made of powers of two.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    d = tl.arange(0, channels)
    q_rows = q_ptr + batch * q_batch + head * q_head + m.to(tl.int64)[:, None] * q_token
    q = tl.load(q_rows + d[None, :], mask=(m < queries)[:, None], other=0.0)
    end = keys
    if lengths_ptr is not None:
        end = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), keys)
    whole = end // block_n * block_n
    head_keys, head_values = k_ptr + batch * k_batch + head * k_head, v_ptr + batch * v_batch + head * v_head
    state = (
        tl.zeros((block_m, channels), dtype=tl.float32),
        tl.zeros((block_m,), dtype=tl.float32),
        tl.full((block_m,), float("-inf"), dtype=tl.float32),
    )
    state = _attend(q, head_keys, head_values, k_token, v_token, state, 0, whole, end, scale, block_n, False)
    total, weight, _ = _attend(
        q, head_keys, head_values, k_token, v_token, state, whole, end, end, scale, block_n, True
    )
    y = total / tl.where(weight > 0, weight, 1.0)[:, None]
    y_rows = y_ptr + ((batch * queries + m)[:, None] * heads + head) * channels
    tl.store(y_rows + d[None, :], y.to(y_ptr.dtype.element_ty), mask=(m < queries)[:, None])


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    k_token,
    v_token,
    state,
    start,
    stop,
    end,
    scale: tl.constexpr,
    block_n: tl.constexpr,
    ragged: tl.constexpr,
):
    """Let the keys from ``start`` to ``stop`` pass by; a ``ragged`` block reads none from ``end`` on.

    The state, before and after, is the weighted sum of values (M, D), the sum of weights (M), the largest score (M).
    """
    total, weight, largest = state
    d = tl.arange(0, q.shape[1])
    for first in tl.range(start, stop, block_n, num_stages=1 if ragged else None):
        n = tl.arange(0, block_n)
        k_rows = k_ptr + first * tl.cast(k_token, tl.int64) + n[None, :] * k_token
        v_rows = v_ptr + first * tl.cast(v_token, tl.int64) + n[:, None] * v_token
        if ragged:
            k = tl.load(k_rows + d[:, None], mask=(first + n < end)[None, :], other=0.0)
        else:
            k = tl.load(k_rows + d[:, None])
        scores = tl.dot(q, k, input_precision="ieee")
        if ragged:
            scores = tl.where((first + n < end)[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1) * scale)
        shares = tl.math.exp2(scores * scale - highest[:, None])
        fade = tl.math.exp2(largest - highest)
        if ragged:
            v = tl.load(v_rows + d[None, :], mask=(first + n < end)[:, None], other=0.0)
        else:
            v = tl.load(v_rows + d[None, :])
        total = tl.dot(shares.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        weight = weight * fade + tl.sum(shares, 1)
        largest = highest
    return total, weight, largest
