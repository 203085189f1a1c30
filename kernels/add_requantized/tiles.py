"""Tiles of ``intarsia.add_requantized``: elements of one program, and its warps."""

from __future__ import annotations

from typing import Any

from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import DTYPES
from intarsia.kernels.launch import product
from intarsia.kernels.tiling import Draw, Footprint, Shape, Space, Tile, blocks, row_footprint

VARIES = {"block": (256, 512, 1024, 2048, 4096), "warps": (1, 2, 4, 8)}

BLOCK = 1024
"""Elements of one program: 8 for each of 128 threads, 16 bytes of i16."""


def space(node: Node, graph: Graph, architecture: str) -> Space:
    """By default ``BLOCK`` elements and four warps."""
    input = graph.type(node.ref("input"))
    return Space({"block": BLOCK, "warps": 4}, VARIES, {"elements": product(input.shape)}, input.dtype)


def footprint(tile: Tile, shape: Shape, dtype: str) -> Footprint:
    """Two numbers read for each written, in one byte."""
    programs = blocks(shape["elements"], tile["block"])
    return row_footprint(programs, tile["block"] * (2.0 * DTYPES[dtype].itemsize + 1))


def example(shape: Shape, draw: Draw) -> dict[str, Any]:
    """Two rows of integers of one width, summed into eight bits."""
    bits = 8 * DTYPES[draw.dtype].itemsize
    operands = {
        name: draw.whole(-(2 ** (bits - 1)), 2 ** (bits - 1), 1, shape["elements"], dtype=draw.dtype)
        for name in ("input", "other")
    }
    numbers = {name: draw.whole(2**29, 2**30, 1, dtype="i32") for name in ("multiplier", "other_multiplier")}
    shifts = {name: draw.whole(22 + bits, 24 + bits, 1, dtype="i32") for name in ("shift", "other_shift")}
    return {**operands, **numbers, **shifts, "low": -128, "high": 127}


def small(tile: Tile, shape: Shape) -> Shape:
    """A block and a bit."""
    return {"elements": min(shape["elements"], tile["block"] + 100)}
