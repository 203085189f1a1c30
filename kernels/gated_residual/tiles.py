"""Tiles of ``intarsia.gated_residual``: channels of one program, and its warps."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import DTYPES
from intarsia.kernels.launch import product
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, blocks, power_of_two, row_footprint

VARIES = {"block": (256, 512, 1024, 2048, 4096, 8192), "warps": (1, 2, 4, 8)}

BLOCK = 2048
"""Channels of one program: 16 for each of 128 threads, two 16-byte loads of 16-bit numbers."""


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default ``BLOCK`` channels and four warps."""
    residual = graph.type(node.ref("residual"))
    channels = residual.shape[2]
    assert isinstance(channels, int)
    widest = power_of_two(channels)
    varies = {**VARIES, "block": tuple(block for block in VARIES["block"] if block <= widest)}
    default = {"block": min(BLOCK, widest), "warps": 4}
    return Space(default, varies, {"tokens": product(residual.shape[:2]), "channels": channels}, residual.dtype)


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """Two numbers read for each written; the gate stays in caches."""
    programs = shape["tokens"] * blocks(shape["channels"], tile["block"])
    return row_footprint(programs, 3.0 * min(tile["block"], shape["channels"]) * DTYPES[dtype].itemsize)


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """One sample, all of whose tokens share a gate."""
    residual, input = (draw.normal(1, shape["tokens"], shape["channels"]) for _ in range(2))
    return {"residual": residual, "input": input, "gate": draw.normal(1, 1, shape["channels"], dtype="f32")}


def small(tile: Tile, shape: Shape) -> Shape:
    """Three tokens, a block and a bit."""
    return {"tokens": min(shape["tokens"], 3), "channels": min(shape["channels"], tile["block"] + 40)}
