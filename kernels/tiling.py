"""What may vary in how a kernel is launched: the sides of its tiles, warps and stages; and what a tile costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import DTYPES
from intarsia.ir.sizes import Dim

Tile = Mapping[str, int]
"""One way to launch a kernel: ``{"block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 3}``."""

Shape = Mapping[str, int]
"""A kernel's extents by the names that its ``Space`` gives them: ``{"tokens": 32760, "rows": 1536, ...}``."""

TILINGS: Mapping[str, str] = {
    "intarsia.linear_i8": "intarsia.kernels.linear_i8.tiles",
    "intarsia.linear_i4": "intarsia.kernels.linear_i4.tiles",
    "intarsia.linear_i8i8": "intarsia.kernels.linear_i8i8.tiles",
    "intarsia.attention": "intarsia.kernels.attention.tiles",
    "intarsia.block_sparse_attention_tables": "intarsia.kernels.block_sparse_attention.tiles",
    "intarsia.norm_rope": "intarsia.kernels.norm_rope.tiles",
    "intarsia.modulated_norm": "intarsia.kernels.modulated_norm.tiles",
    "intarsia.gated_residual": "intarsia.kernels.gated_residual.tiles",
    "intarsia.add_requantized": "intarsia.kernels.add_requantized.tiles",
}
"""By operator, the module beside its kernel that is a ``Tiling``; a kernel without one is launched one way only."""


@dataclass(frozen=True)
class Space:
    """The tiles that a call may be launched with, and what tells calls apart.

    Attributes:
        default: The tile without tuning.
        varies: Values of each part of a tile, beside the default's own.
        extents: What decides which tile is best, by name; numbers, or expressions of the graph's sizes.
        exact: Extents that are compared as they are, because the code depends on them; others by powers of two.
        dtype: Element type of the call, with which its code differs.
    """

    default: Tile
    varies: Mapping[str, tuple[int, ...]]
    extents: Mapping[str, Dim]
    dtype: str
    exact: tuple[str, ...] = ()

    @property
    def bucket(self) -> str:
        """The shapes that share a tile: ``columns<=2048 group=128 rows<=8192 tokens<=32768``.

        An extent is rounded up to a power of two, stands as it is if it is ``exact``, and is ``*`` where the graph
        leaves it open.
        """
        return " ".join(self._rounded(name) for name in sorted(self.extents))

    def offers(self, tile: Mapping[str, object]) -> bool:
        """Whether the tile is one of the space."""
        return tile.keys() == self.default.keys() and all(
            value == self.default[name] or value in self.varies[name] for name, value in tile.items()
        )

    def tiles(self) -> Iterator[dict[str, int]]:
        """Every tile, the default first."""
        yield dict(self.default)
        names = list(self.default)
        for values in product(*(sorted({*self.varies[name], self.default[name]}) for name in names)):
            tile = dict(zip(names, values, strict=True))
            if tile != self.default:
                yield tile

    def _rounded(self, name: str) -> str:
        extent = self.extents[name]
        if isinstance(extent, str) and not extent.isdecimal():
            return f"{name}=*"
        return f"{name}={int(extent)}" if name in self.exact else f"{name}<={power_of_two(int(extent))}"


@dataclass(frozen=True)
class Footprint:
    """What the programs of a launch do, for an estimate of its time.

    Attributes:
        programs: How many there are.
        flops: Operations of one on matrix units, whatever a mask throws away included.
        bytes: Bytes that one reads and writes.
        steps: Steps of its loop, each of which waits for memory.
        shared: Bytes that the pipeline of one keeps in shared memory.
        kept: Numbers of 32 bits that one keeps in registers throughout.
        dtype: What matrix units multiply.
    """

    programs: int
    flops: float
    bytes: float
    steps: int
    shared: int
    kept: int
    dtype: str


class Tiling(Protocol):
    """The module ``kernels/<operator>/tiles.py``."""

    def space(self, node: Node, graph: Graph, architecture: str) -> Space:
        """The tiles that the call may be launched with."""

    def footprint(self, tile: Tile, shape: Shape, dtype: str) -> Footprint:
        """What the launch does for such extents."""

    def example(self, shape: Shape, draw: Draw) -> dict[str, Any]:
        """Arguments of a call of the operator with these extents, in ``draw.dtype``."""

    def small(self, tile: Tile, shape: Shape) -> Shape:
        """Extents for which the tile is ragged on all sides, and a slow interpreter soon done."""


def tiling_of(op: str) -> Tiling | None:
    """What may vary in the operator's kernel; None where nothing does."""
    path = TILINGS.get(op)
    return None if path is None else cast(Tiling, importlib.import_module(path))


def require_tiling(op: str) -> Tiling:
    """The same; Unsupported if nothing varies, with the operators of which something does."""
    found = tiling_of(op)
    if found is None:
        raise Unsupported(f"{op} has no tiles to choose from; those are {', '.join(TILINGS)}")
    return found


class Draw:
    """Makes a call's operands: numbers of seed 0 on a device, or types alone on the meta device."""

    def __init__(self, dtype: str, device: str = "meta") -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._generator = None if device == "meta" else torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, dtype: str | None = None) -> Tensor:
        """Normal numbers, in the call's element type unless another is given."""
        return self._made(torch.randn, shape, DTYPES[dtype or self.dtype])

    def whole(self, low: int, high: int, *shape: int, dtype: str) -> Tensor:
        """Whole numbers from ``low`` to below ``high``."""

        def draw(shape: tuple[int, ...], **where: Any) -> Tensor:
            return torch.randint(low, high, shape, **where)

        return self._made(draw, shape, DTYPES[dtype])

    def _made(self, draw: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return draw(shape, generator=self._generator, device=self.device).to(dtype)


def power_of_two(extent: int) -> int:
    """The least power of two that is not below ``extent``; 1 for 0."""
    return 1 << max(0, extent - 1).bit_length()


def blocks(extent: int, block: int) -> int:
    """How many blocks cover the extent."""
    return -(-extent // block)


def product_footprint(tile: Tile, shape: Shape, *, input: str, weight: float, output: str, held: int) -> Footprint:
    """Of a product of (tokens, columns) and (rows, columns), in tiles of block_m x block_n and steps of block_k.

    Args:
        input: Element type of the input, in which matrix units multiply.
        weight: Bytes of one number of the weight in memory.
        output: Element type of the result.
        held: Bytes of one number of the weight in shared memory.
    """
    block_m, block_n, block_k = tile["block_m"], tile["block_n"], tile["block_k"]
    read, written = DTYPES[input].itemsize, DTYPES[output].itemsize
    return Footprint(
        programs=blocks(shape["tokens"], block_m) * blocks(shape["rows"], block_n),
        flops=2.0 * block_m * block_n * blocks(shape["columns"], block_k) * block_k,
        bytes=shape["columns"] * (block_m * read + block_n * weight) + block_m * block_n * written,
        steps=blocks(shape["columns"], block_k),
        shared=tile["stages"] * block_k * (block_m * read + block_n * held),
        kept=block_m * block_n,
        dtype=input,
    )


def row_footprint(programs: int, bytes: float) -> Footprint:
    """Of programs that move bytes and multiply no matrices."""
    return Footprint(programs, 0.0, bytes, 1, 0, 0, "f32")
