"""Tiles of ``intarsia.linear_i8``: a product of tokens and rows of the weight."""

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
    """By default a tile of ``product_tile``; steps are shorter for f32, whose operands take more registers."""
    input, (rows, columns) = graph.type(node.ref("input")), graph.type(node.ref("weight")).shape
    tokens = product(input.shape[:-1])
    block_m, block_n = product_tile(tokens, 128)
    default = {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": 32 if input.dtype == "f32" else 64 if block_m > 16 else 256,
        "warps": 8 if block_m > 16 else 4,
        "stages": 3,
    }
    return Space(default, VARIES, {"tokens": tokens, "rows": rows, "columns": columns}, input.dtype)


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """The weight is read in eight bits."""
    return product_footprint(tile, shape, input=dtype, weight=1, output=dtype, held=1)


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """A call with a bias."""
    return {
        "input": draw.normal(shape["tokens"], shape["columns"]),
        "weight": draw.whole(-127, 128, shape["rows"], shape["columns"], dtype="i8"),
        "scale": draw.whole(1, 256, shape["rows"], dtype="f32") / (shape["columns"] ** 0.5 * 2**14),
        "bias": draw.normal(shape["rows"]),
    }


def small(tile: Tile, shape: Shape) -> Shape:
    """Two tiles in each direction, two steps and a bit."""
    return {
        "tokens": min(shape["tokens"], tile["block_m"] + 5),
        "rows": min(shape["rows"], tile["block_n"] + 8),
        "columns": min(shape["columns"], 2 * tile["block_k"] + 16),
    }
