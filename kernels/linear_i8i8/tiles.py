"""Tiles of ``intarsia.linear_i8i8``: a product of integers."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.kernels.launch import product, product_tile
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, product_footprint

VARIES = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (32, 64, 128, 256),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default a tile of ``product_tile``; steps are shorter on AMD's GPUs, whose programs share less memory."""
    input, (rows, columns) = graph.type(node.ref("input")), graph.type(node.ref("weight")).shape
    tokens = product(input.shape[:-1])
    block_m, block_n = product_tile(tokens, 128)
    amd = architecture.startswith("gfx")
    default = {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": 64 if amd else 128 if block_m > 16 else 256,
        "warps": 8 if block_m > 16 else 4,
        "stages": 2 if amd else 3,
    }
    return Space(default, VARIES, {"tokens": tokens, "rows": rows, "columns": columns}, "i8")


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """All in eight bits."""
    return product_footprint(tile, shape, input=dtype, weight=1, output=dtype, held=1)


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """A call with a bias, whose results fill the range of int8."""
    return {
        "input": draw.whole(-128, 128, shape["tokens"], shape["columns"], dtype="i8"),
        "weight": draw.whole(-128, 128, shape["rows"], shape["columns"], dtype="i8"),
        "bias": draw.whole(-(2**16), 2**16, shape["rows"], dtype="i32"),
        "multiplier": draw.whole(2**29, 2**30, shape["rows"], dtype="i32"),
        "shift": draw.whole(40, 43, shape["rows"], dtype="i32"),
    }


def small(tile: Tile, shape: Shape) -> Shape:
    """Two tiles in each direction, two steps and a bit."""
    return {
        "tokens": min(shape["tokens"], tile["block_m"] + 5),
        "rows": min(shape["rows"], tile["block_n"] + 8),
        "columns": min(shape["columns"], 2 * tile["block_k"] + 16),
    }
