"""What the TVM backend computes itself, as tensor expressions; ``tvm_schedule`` turns them into loops.

The name of a stage says how it is scheduled: a ``product`` is tiled in registers, what a stage called ``lanes`` sums it
sums in the lanes of a vector. Weights come packed, so that a vector of rows lies together in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

VECTOR = 8
"""Lanes of f32 in an AVX2 register; two registers side by side are the width of a tile."""

ROW_TILES = (6, 5, 4)
"""Rows that a register tile may have, the fastest first."""

TILE_OVERHEAD = 1.0
"""What a tile costs beside its rows, in rows: loading vectors of weights for few rows, and starting over."""


def lanes(extent: int) -> int:
    """How many neighbouring channels a tile takes: two registers, or one where the extent is no multiple of two."""
    return 2 * VECTOR if extent % (2 * VECTOR) == 0 else VECTOR


def row_cost(rows: int, tile: int) -> float:
    """What one of ``rows`` costs that are cut into tiles, in rows of one endless tile."""
    full, rest = divmod(rows, tile)
    return (full * (tile + TILE_OVERHEAD) + (rest + TILE_OVERHEAD if rest else 0)) / rows


def pack_rows(weight: Tensor) -> Tensor:
    """Weight (R, ...) as (R/width, ..., width), missing rows zero; width as ``lanes`` says."""
    rows = weight.shape[0]
    width = lanes(rows)
    padded = torch.nn.functional.pad(weight.flatten(1), (0, 0, 0, -rows % width))
    return padded.view(-1, width, *weight.shape[1:]).movedim(1, -1).contiguous()


def linear(input: Any, packed: Any, *, rows: int) -> Any:
    """Input (..., C) times ``packed`` (R/width, C, width): (..., R), without bias."""
    from tvm import te

    _, columns, width = (int(extent) for extent in packed.shape)
    column = te.reduce_axis((0, columns), "column")

    def product(*index: Any) -> Any:
        *row, out = index
        return te.sum(input[(*row, column)] * packed[out // width, column, out % width], axis=column)

    return te.compute((*input.shape[:-1], rows), product, name="product")


def matmul(left: Any, right: Any) -> Any:
    """Left (..., M, K) times right (..., K, N), batch axes equal or 1."""
    from tvm import te

    inner = te.reduce_axis((0, int(left.shape[-1])), "inner")
    rank = max(len(left.shape), len(right.shape))
    batch = [max(_extent(left, axis - rank), _extent(right, axis - rank)) for axis in range(rank - 2)]

    def at(tensor: Any, index: Sequence[Any], *last: Any) -> Any:
        own = index[len(index) - (len(tensor.shape) - 2) :]
        return tensor[(*(0 if int(n) == 1 else i for n, i in zip(tensor.shape, own, strict=False)), *last)]

    def product(*index: Any) -> Any:
        *outer, row, column = index
        return te.sum(at(left, outer, row, inner) * at(right, outer, inner, column), axis=inner)

    return te.compute((*batch, left.shape[-2], right.shape[-1]), product, name="product")


def _extent(tensor: Any, axis: int) -> int:
    return int(tensor.shape[axis]) if len(tensor.shape) >= -axis else 1


def convolution(
    input: Any, packed: Any, *, channels: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Any:
    """Input (N, *spatial, C), ``packed`` (O/width, *kernel, C, width): (N, *spatial, O), without bias."""
    from tvm import te, tirx

    kernel = [int(extent) for extent in packed.shape[1:-2]]
    width = int(packed.shape[-1])
    batch, *spatial, depth = (int(extent) for extent in input.shape)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(spatial, padding, dilation, kernel, stride, strict=True)
    ]
    if any(padding):

        def padded(b: Any, *index: Any) -> Any:
            *place, channel = index
            inside = [(i >= p, i < p + n) for i, p, n in zip(place, padding, spatial, strict=True) if p]
            source = [i - p for i, p in zip(place, padding, strict=True)]
            value = input[(b, *source, channel)]
            return tirx.if_then_else(tirx.all(*(one for pair in inside for one in pair)), value, 0.0)

        wide = [n + 2 * p for n, p in zip(spatial, padding, strict=True)]
        input = te.compute((batch, *wide, depth), padded, name="padded")
    taps = [te.reduce_axis((0, k), f"tap{axis}") for axis, k in enumerate(kernel)]
    inner = te.reduce_axis((0, depth), "channel")

    def product(b: Any, *index: Any) -> Any:
        *place, channel = index
        source = [i * s + tap * d for i, s, tap, d in zip(place, stride, taps, dilation, strict=True)]
        weight = packed[(channel // width, *taps, inner, channel % width)]
        return te.sum(input[(b, *source, inner)] * weight, axis=[*taps, inner])

    return te.compute((batch, *out, channels), product, name="product")


def elementwise(input: Any, *, of: Callable[[Any], Any], name: str) -> Any:
    """``of`` each element."""
    from tvm import te

    return te.compute(input.shape, lambda *i: of(input[i]), name=name)


def places(index: Any, *, count: int) -> Any:
    """Which entry of ``index`` (A) names each of ``count`` places of an axis, the last if several; -1 if none."""
    from tvm import te, tirx

    entry = te.reduce_axis((0, int(index.shape[0])), "entry")

    def named(place: Any) -> Any:
        return te.max(tirx.Select(index[entry] == place.astype("int64"), entry.var.astype("int32"), -1), axis=entry)

    return te.compute((count,), named, name="places")


def index_copy(whole: Any, rows: Any, places: Any, *, axis: int) -> Any:
    """``whole`` with ``rows`` in their places along ``axis``."""
    from tvm import te, tirx

    def written(*index: Any) -> Any:
        place = places[index[axis]]
        row = rows[(*index[:axis], place, *index[axis + 1 :])]
        return tirx.if_then_else(place >= 0, row, whole[index])

    return te.compute(whole.shape, written, name="index_copy")
