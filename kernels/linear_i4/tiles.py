"""Tiles of ``intarsia.linear_i4``: a product of tokens and rows of the weight, whose steps stay inside one group."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.kernels.launch import product, product_tile
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, product_footprint

VARIES = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128),
    "block_k": (32, 64, 128, 256),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default a tile of ``product_tile``; a step along the columns divides the group."""
    input, group = graph.type(node.ref("input")), node.args["group"]
    rows, columns = node.type.shape[-1], input.shape[-1]
    assert isinstance(group, int)
    tokens = product(input.shape[:-1])
    block_m, block_n = product_tile(tokens, 64)
    default = {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": min(group, 32 if input.dtype == "f32" else 64 if block_m > 16 else 128),
        "warps": 4,
        "stages": 3,
    }
    varies = {**VARIES, "block_k": tuple(step for step in VARIES["block_k"] if group % step == 0)}
    extents = {"tokens": tokens, "rows": rows, "columns": columns, "group": group}
    return Space(default, varies, extents, input.dtype, exact=("group",))


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """The weight is read in four bits, its scales left out."""
    return product_footprint(tile, shape, input=dtype, weight=0.5, output=dtype, held=1)


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """A call with a bias."""
    scales = draw.whole(1, 256, shape["rows"], shape["columns"] // shape["group"], dtype="f32")
    return {
        "input": draw.normal(shape["tokens"], shape["columns"]),
        "packed": draw.whole(0, 256, shape["rows"], shape["columns"] // 2, dtype="u8"),
        "scale": scales / (shape["columns"] ** 0.5 * 2**10),
        "bias": draw.normal(shape["rows"]),
        "group": shape["group"],
    }


def small(tile: Tile, shape: Shape) -> Shape:
    """Two tiles in each direction, two groups."""
    return {
        "tokens": min(shape["tokens"], tile["block_m"] + 5),
        "rows": min(shape["rows"], tile["block_n"] + 8),
        "columns": min(shape["columns"], 2 * shape["group"]),
        "group": shape["group"],
    }
