"""Tiles of ``intarsia.modulated_norm``: the warps that share a token."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import DTYPES
from intarsia.kernels.launch import product
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, power_of_two, row_footprint

VARIES = {"warps": (1, 2, 4, 8, 16)}


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default a warp for each 512 channels."""
    input = graph.type(node.ref("input"))
    channels = input.shape[2]
    assert isinstance(channels, int)
    default = {"warps": min(16, max(1, power_of_two(channels) // 512))}
    return Space(default, VARIES, {"tokens": product(input.shape[:2]), "channels": channels}, input.dtype)


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """A token is read and written once; scale and shift stay in caches."""
    return row_footprint(shape["tokens"], 2.0 * shape["channels"] * DTYPES[dtype].itemsize)


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """One sample, all of whose tokens share scale and shift."""
    channels = shape["channels"]
    scale, shift = (draw.normal(1, 1, channels, dtype="f32") for _ in range(2))
    input = draw.normal(1, shape["tokens"], channels)
    return {"input": input, "weight": None, "bias": None, "scale": scale, "shift": shift, "eps": 1e-6}


def small(tile: Tile, shape: Shape) -> Shape:
    """Three tokens."""
    return {**shape, "tokens": min(shape["tokens"], 3)}
