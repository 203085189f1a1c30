"""Tiles of ``intarsia.block_sparse_attention_tables``: powers of two that divide the blocks of its table."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.operators import DTYPES
from intarsia.kernels.attention.tiles import oldest, tile
from intarsia.kernels.block_sparse_attention.tables import NEVER
from intarsia.kernels.launch import product
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, blocks

VARIES = {
    "queries": (16, 32, 64, 128),
    "keys": (16, 32, 64, 128),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
}

DEFAULTS = {
    ("sm_80", 32): tile(128, 64, 4, 3),
    ("sm_80", 64): tile(128, 32, 4, 3),
    ("sm_80", 128): tile(128, 64, 8, 3),
    ("sm_90", 32): tile(128, 64, 4, 3),
    ("sm_90", 64): tile(128, 128, 8, 3),
    ("sm_90", 128): tile(128, 64, 8, 3),
    ("gfx942", 32): tile(128, 64, 4, 1),
    ("gfx942", 64): tile(128, 64, 4, 1),
    ("gfx942", 128): tile(128, 64, 4, 1),
}
"""By the oldest architecture that a tile fits, and channels of a head; what fits sm_90 fits what came after.

None of them spills a register. Which is the fastest of those that do not has not been measured.
"""

ORDERED = {
    **DEFAULTS,
    ("sm_80", 128): tile(128, 32, 8, 2),
    ("gfx942", 32): tile(128, 32, 4, 1),
    ("gfx942", 64): tile(128, 32, 4, 1),
    ("gfx942", 128): tile(128, 32, 4, 1),
}
"""The same where tokens are read through an order: addresses and masks then take registers of their own."""

SINGLE = {32: tile(32, 32, 4, 1), 64: tile(32, 32, 4, 1), 128: tile(32, 16, 8, 1)}
"""For f32, which no tensor core multiplies exactly, by channels of a head."""

ROWS = {"sm_80": 8, "sm_90": 16, "gfx942": 8, "f32": 4}
"""Queries for each warp of a tile that the table makes smaller; with more, those for sm_80, gfx942 and f32 spill."""


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default the best tile, cut down to the blocks, and to as few warps as it then keeps busy."""
    query, key = graph.type(node.ref("query")), graph.type(node.ref("key"))
    batch, heads, queries, channels = query.shape
    block_q, block_k = (cast("int", node.args[axis]) for axis in ("block_q", "block_k"))
    ordered = isinstance(node.args["tokens"], Ref)
    widest_q, widest_k = block_q & -block_q, block_k & -block_k
    varies = {
        **VARIES,
        "queries": tuple(side for side in VARIES["queries"] if side <= widest_q),
        "keys": tuple(side for side in VARIES["keys"] if side <= widest_k),
    }
    extents = {
        "heads": product((batch, heads)),
        "queries": queries,
        "keys": key.shape[2],
        "blocks": graph.type(node.ref("columns")).shape[0],
        "channels": channels,
        "block_q": block_q,
        "block_k": block_k,
        "ordered": int(ordered),
    }
    default = _default(oldest(architecture), query.dtype, cast("int", channels), ordered, (widest_q, widest_k))
    return Space(default, varies, extents, query.dtype, exact=("channels", "block_q", "block_k", "ordered"))


def _default(architecture: str, dtype: str, channels: int, ordered: bool, widest: tuple[int, int]) -> Tile:
    single = dtype == "f32"
    best = SINGLE[channels] if single else (ORDERED if ordered else DEFAULTS)[architecture, channels]
    rows = ROWS["f32" if single else architecture]
    queries = min(best["queries"], widest[0])
    keys = min(best["keys"], widest[1], queries)  # a small tile has too few threads to hold more
    # Where to read comes out of memory first: twice the depth keeps as many keys under way.
    stages = 2 * best["stages"] - 1 if ordered else best["stages"]
    return tile(queries, keys, min(best["warps"], max(1, queries // rows)), stages)


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """Rows of the table are taken for equally long."""
    channels, size = shape["channels"], DTYPES[dtype].itemsize
    rows = blocks(shape["queries"], shape["block_q"])
    keys = max(1, shape["blocks"] // rows) * shape["block_k"]
    steps = keys // tile["keys"]
    return Footprint(
        programs=rows * (shape["block_q"] // tile["queries"]) * shape["heads"],
        flops=4.0 * tile["queries"] * channels * keys,
        bytes=2.0 * channels * size * (tile["queries"] + keys),
        steps=steps,
        shared=channels * size * (tile["queries"] + 2 * tile["stages"] * tile["keys"]),
        kept=tile["queries"] * (channels + tile["keys"]),
        dtype=dtype,
    )


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """One sample; rows attend to blocks that lie evenly spread, each row's one further than those of the row before."""
    heads, channels = shape["heads"], shape["channels"]
    query, key, value = (
        draw.normal(1, shape[tokens], heads, channels).transpose(1, 2) for tokens in ("queries", "keys", "keys")
    )
    table: dict[str, Any] = {name: array.to(draw.device) for name, array in _table(shape).items()}
    if not shape["ordered"]:
        table["tokens"] = None
    sides = {"block_q": shape["block_q"], "block_k": shape["block_k"], "scale": None}
    return {"query": query, "key": key, "value": value, "lengths": None, **table, **sides}


def _table(shape: Shape) -> dict[str, Tensor]:
    """Rows, columns, reach and tokens as ``tables.Tables`` has them; an order is back to front."""
    rows, columns = blocks(shape["queries"], shape["block_q"]), blocks(shape["keys"], shape["block_k"])
    total = min(shape["blocks"], rows * columns)
    counts = torch.full((rows,), total // rows)
    counts[: total % rows] += 1
    ends = counts.cumsum(0)
    attended = [((torch.arange(count) * columns // max(1, count) + row) % columns).sort()[0]
                for row, count in enumerate(counts.tolist())]  # fmt: skip
    tokens = torch.arange(shape["keys"]).flip(0) if shape["ordered"] else torch.arange(shape["keys"])
    padded = torch.full((columns * shape["block_k"],), NEVER)
    padded[: shape["keys"]] = tokens
    arrays = {
        "rows": torch.stack([torch.arange(rows), ends - counts, ends], dim=1),
        "columns": torch.cat(attended),
        "reach": padded.reshape(columns, -1).amax(1),
        "tokens": tokens,
    }
    return {name: array.int() for name, array in arrays.items()}


def small(tile: Tile, shape: Shape) -> Shape:
    """One head, a block of queries and a bit, two blocks of keys and a bit, half of them attended to."""
    queries, keys = min(shape["queries"], shape["block_q"] + 5), min(shape["keys"], 2 * shape["block_k"] + 3)
    if shape["ordered"]:
        queries = keys = min(queries, keys)
    rows, columns = blocks(queries, shape["block_q"]), blocks(keys, shape["block_k"])
    return {**shape, "heads": 1, "queries": queries, "keys": keys, "blocks": -(-rows * columns * 2 // 3)}
