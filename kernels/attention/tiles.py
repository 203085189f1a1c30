"""Tiles of ``intarsia.attention``: queries and keys of a block."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import DTYPES
from intarsia.kernels.launch import product
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, blocks

VARIES = {"queries": (32, 64, 128, 256), "keys": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3, 4)}


def tile(queries: int, keys: int, warps: int, stages: int) -> Tile:
    """Queries and keys of a block, warps that share it, depth of the pipeline that fetches keys and values."""
    return {"queries": queries, "keys": keys, "warps": warps, "stages": stages}


DEFAULTS = {
    ("sm_80", 32): tile(128, 64, 4, 3),
    ("sm_80", 64): tile(128, 32, 4, 3),
    ("sm_80", 128): tile(128, 64, 8, 2),
    ("sm_90", 32): tile(128, 128, 8, 3),
    ("sm_90", 64): tile(128, 128, 8, 3),
    ("sm_90", 128): tile(128, 128, 8, 2),
    ("gfx942", 32): tile(128, 64, 4, 1),
    ("gfx942", 64): tile(128, 64, 4, 1),
    ("gfx942", 128): tile(128, 64, 4, 1),
}
"""By the oldest architecture that a tile fits, and channels of a head; what fits sm_90 fits what came after.

None of them spills a register. On sm_80 a warp of 16 queries reads shared memory as fast as it can (256 bytes for each
``mma.sync``, which takes two cycles), so that 32 queries a warp are better where the registers suffice.
"""

SINGLE = tile(64, 32, 4, 1)
"""For f32, which no tensor core multiplies exactly."""


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default the tile of ``DEFAULTS``."""
    query, key = graph.type(node.ref("query")), graph.type(node.ref("key"))
    batch, heads, tokens, channels = query.shape
    assert isinstance(channels, int)
    default = SINGLE if query.dtype == "f32" else DEFAULTS[oldest(architecture), channels]
    extents = {"heads": product((batch, heads)), "queries": tokens, "keys": key.shape[2], "channels": channels}
    return Space(default, VARIES, extents, query.dtype, exact=("channels",))


def oldest(architecture: str) -> str:
    """The oldest architecture whose tiles fit."""
    if architecture.startswith("gfx"):
        return "gfx942"
    return "sm_90" if int(architecture.removeprefix("sm_")) >= 90 else "sm_80"


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """Every block of queries reads all keys and values."""
    channels, size = shape["channels"], DTYPES[dtype].itemsize
    steps = blocks(shape["keys"], tile["keys"])
    return Footprint(
        programs=blocks(shape["queries"], tile["queries"]) * shape["heads"],
        flops=4.0 * tile["queries"] * channels * steps * tile["keys"],
        bytes=2.0 * channels * size * (tile["queries"] + shape["keys"]),
        steps=steps,
        shared=channels * size * (tile["queries"] + 2 * tile["stages"] * tile["keys"]),
        kept=tile["queries"] * (channels + tile["keys"]),
        dtype=dtype,
    )


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """One sample, tokens before heads in memory as a model's projections leave them."""
    heads, channels = shape["heads"], shape["channels"]
    query, key, value = (
        draw.normal(1, shape[tokens], heads, channels).transpose(1, 2) for tokens in ("queries", "keys", "keys")
    )
    return {"query": query, "key": key, "value": value, "lengths": None, "scale": None}


def small(tile: Tile, shape: Shape) -> Shape:
    """One head, two blocks of queries, two of keys and a bit."""
    queries, keys = min(shape["queries"], tile["queries"] + 5), min(shape["keys"], 2 * tile["keys"] + 3)
    return {**shape, "heads": 1, "queries": queries, "keys": keys}
