"""Tiles of ``intarsia.norm_rope``: the warps that share a token."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import DTYPES
from intarsia.ir.sizes import Dim
from intarsia.kernels.launch import product
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, power_of_two, row_footprint

VARIES = {"warps": (1, 2, 4, 8, 16)}


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default a warp for each 512 channels."""
    input, heads = graph.type(node.ref("input")), node.args["heads"]
    channels = input.shape[2]
    assert isinstance(channels, int)
    assert isinstance(heads, int)
    default = {"warps": min(16, max(1, power_of_two(channels) // 512))}
    extents: dict[str, Dim] = {"tokens": product(input.shape[:2]), "channels": channels, "heads": heads}
    return Space(default, VARIES, extents, input.dtype, exact=("heads",))


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """A token is read and written once."""
    return row_footprint(shape["tokens"], 2.0 * shape["channels"] * DTYPES[dtype].itemsize)


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """One sample, its norm with a weight."""
    tokens, channels, heads = shape["tokens"], shape["channels"], shape["heads"]
    cos, sin = (draw.normal(tokens, channels // heads // 2, dtype="f32") for _ in range(2))
    weight = draw.normal(channels)
    input = draw.normal(1, tokens, channels)
    return {"input": input, "weight": weight, "cos": cos, "sin": sin, "heads": heads, "eps": 1e-6}


def small(tile: Tile, shape: Shape) -> Shape:
    """Three tokens."""
    return {**shape, "tokens": min(shape["tokens"], 3)}
