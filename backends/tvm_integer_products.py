"""Products and sums of integers for TVM, exact to the bit: int8 times int8 in i32, then a dyadic number and a clamp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.backends.tvm_dyadic import Numbers, clipped, rounded
from intarsia.backends.tvm_operators import ROW_TILES, row_cost

LANES = 8
"""Sums in an AVX2 register."""


def wrapping_sum(left: Any, right: Any) -> Any:
    """The sum of two i32 modulo 2**32, as PyTorch adds; TVM takes signed sums to fit and would widen them."""
    from tvm import tirx

    return tirx.reinterpret("int32", tirx.reinterpret("uint32", left) + tirx.reinterpret("uint32", right))


def linear_i8i8(input: Any, packed: Any, *dyadic_and_bias: Any, rows: int, biased: bool, low: int, high: int) -> Any:
    """Input i8 (..., M, C) times ``packed`` (R/8, C/2, 8, 2), summed in i32, requantized: (..., M, R)."""
    from tvm import te, tirx

    *outer, lines, columns = (int(extent) for extent in input.shape)
    _, pairs, width, _ = (int(extent) for extent in packed.shape)
    tiled = whole_tiles(lines)

    def wide(*i: Any) -> Any:
        *batch, line, column = i
        value = input[(*batch, line, column)].astype("int16")
        inside = [line < lines] * (tiled > lines) + [column < columns] * (columns % 2)
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, "int16")) if inside else value

    widened = te.compute((*outer, tiled, 2 * pairs), wide, name="padded")
    column = te.reduce_axis((0, 2 * pairs), "column")

    def term(*i: Any) -> Any:
        *row, out = i
        weight = packed[out // width, column // 2, out % width, column % 2]
        return te.sum(widened[(*row, column)].astype("int32") * weight.astype("int32"), axis=column)

    total = te.compute((*outer, tiled, _up(rows, width)), term, name="product_i8")
    shape = (*input.shape[:-1], rows)
    return _requantized(total, shape, dyadic_and_bias, biased=biased, low=low, high=high)


def conv2d_i8i8(
    input: Any,
    packed: Any,
    *dyadic_and_bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rows: int,
    biased: bool,
    low: int,
    high: int,
) -> Any:
    """Input i8 (N, H, W, C) with ``packed`` (O/8, kh, kw, C/2, 8, 2), summed in i32, requantized: (N, H, W, O)."""
    from tvm import te, tirx

    batch, *places, channels = (int(extent) for extent in input.shape)
    _, *window, pairs, width, _ = (int(extent) for extent in packed.shape)
    extents = _extents(places, window, stride, padding, dilation)

    def wide(b: Any, y: Any, x: Any, c: Any) -> Any:
        y, x = y - padding[0], x - padding[1]
        inside = [y >= 0, y < places[0], x >= 0, x < places[1], *([c < channels] * (channels % 2))]
        value = input[b, y, x, c].astype("int16")
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, "int16"))

    tiled = whole_tiles(extents[1])
    beyond = (tiled - extents[1]) * stride[1]
    shape = (batch, places[0] + 2 * padding[0], places[1] + 2 * padding[1] + beyond, 2 * pairs)
    widened = te.compute(shape, wide, name="padded")
    down, across = te.reduce_axis((0, window[0]), "down"), te.reduce_axis((0, window[1]), "across")
    channel = te.reduce_axis((0, 2 * pairs), "channel")

    def term(b: Any, y: Any, x: Any, out: Any) -> Any:
        place = (y * stride[0] + down * dilation[0], x * stride[1] + across * dilation[1])
        weight = packed[out // width, down, across, channel // 2, out % width, channel % 2]
        value = widened[b, place[0], place[1], channel].astype("int32")
        return te.sum(value * weight.astype("int32"), axis=[down, across, channel])

    total = te.compute((batch, extents[0], tiled, _up(rows, width)), term, name="product_i8")
    return _requantized(total, (batch, *extents, rows), dyadic_and_bias, biased=biased, low=low, high=high)


def grouped_conv2d_i8i8(
    input: Any,
    weight: Any,
    *dyadic_and_bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    biased: bool,
    low: int,
    high: int,
) -> Any:
    """Input i8 (N, H, W, C) with weight i8 (kh, kw, C/groups, O), each group on its own: (N, H, W, O)."""
    from tvm import te, tirx

    batch, *places, _ = (int(extent) for extent in input.shape)
    *window, depth, rows = (int(extent) for extent in weight.shape)
    extents = _extents(places, window, stride, padding, dilation)
    down, across = te.reduce_axis((0, window[0]), "down"), te.reduce_axis((0, window[1]), "across")
    channel = te.reduce_axis((0, depth), "channel")

    def term(b: Any, y: Any, x: Any, out: Any) -> Any:
        place = [
            i * s + tap * d - p
            for i, s, tap, d, p in zip((y, x), stride, (down, across), dilation, padding, strict=True)
        ]
        inside = [one for i, n in zip(place, places, strict=True) for one in (i >= 0, i < n)]
        source = out if depth == 1 and rows == groups else out // (rows // groups) * depth + channel
        value = input[b, place[0], place[1], source].astype("int32")
        product = value * weight[down, across, channel, out].astype("int32")
        return te.sum(tirx.if_then_else(tirx.all(*inside), product, 0), axis=[channel, down, across])

    total = te.compute((batch, *extents, rows), term, name="grouped")
    return _requantized(total, total.shape, dyadic_and_bias, biased=biased, low=low, high=high)


def avg_pool2d_i8(
    input: Any,
    *dyadic: Any,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    axes: tuple[int, int],
    low: int,
    high: int,
) -> Any:
    """Input i8 or i16, height and width at ``axes``: sums of windows in i32, padding as zeros, requantized."""
    from tvm import te, tirx

    places = [int(input.shape[axis]) for axis in axes]
    shape = [int(extent) for extent in input.shape]
    extents = _extents(places, window, stride, padding, (1, 1))
    for axis, extent in zip(axes, extents, strict=True):
        shape[axis] = extent
    taps = [te.reduce_axis((0, extent), name) for extent, name in zip(window, ("down", "across"), strict=True)]

    def term(*i: Any) -> Any:
        place = [i[axis] * s + tap - p for axis, s, tap, p in zip(axes, stride, taps, padding, strict=True)]
        inside = [one for at, n, p in zip(place, places, padding, strict=True) for one in (at >= 0, at < n) if p]
        source = list(i)
        for axis, at in zip(axes, place, strict=True):
            source[axis] = at
        value = input[tuple(source)].astype("int32")
        return te.sum(tirx.if_then_else(tirx.all(*inside), value, 0) if inside else value, axis=taps)

    total = te.compute(shape, term, name="window")
    (channel_axis,) = {1, 2, 3} - set(axes)
    return _requantized(total, shape, dyadic, channel_axis=channel_axis, biased=False, low=low, high=high)


def pack_pairs(weight: Tensor) -> Tensor:
    """Weight i8 (R, ..., C) as (R/8, ..., C/2, 8, 2): the pairs of columns that an instruction takes of 8 rows."""
    rows, columns = weight.shape[0], weight.shape[-1]
    flat = weight.reshape(rows, -1, columns)
    padded = torch.nn.functional.pad(flat, (0, columns % 2, 0, 0, 0, -rows % LANES))
    pairs = padded.view(-1, LANES, flat.shape[1], (columns + 1) // 2, 2)
    return pairs.permute(0, 2, 3, 1, 4).reshape(-1, *weight.shape[1:-1], (columns + 1) // 2, LANES, 2).contiguous()


def largest_sums(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The largest magnitude of each row's sum for weight i8 (R, ...) and any input i8; at most what i32 holds."""
    sums = 128 * weight.flatten(1).to(torch.int64).abs().sum(1)
    return (sums if bias is None else sums + bias.to(torch.int64).abs()).clamp(max=1 << 31)


def whole_tiles(rows: int) -> int:
    """``rows`` and as many more as fill whole tiles: TVM puts no instruction of ours where rows are left over."""
    tile = min(
        (tile for tile in ROW_TILES if tile <= rows),
        key=lambda tile: row_cost(_up(rows, tile), tile) * _up(rows, tile),
        default=rows,
    )
    return _up(rows, tile)


def _requantized(
    total: Any,
    shape: Sequence[Any],
    dyadic_and_bias: Numbers,
    *,
    biased: bool,
    low: int,
    high: int,
    channel_axis: int = -1,
) -> Any:
    from tvm import te

    *dyadic, bias = dyadic_and_bias if biased else (*dyadic_and_bias, None)

    def answer(*i: Any) -> Any:
        channel = i[channel_axis]
        summed = wrapping_sum(total[i], bias[channel]) if bias is not None else total[i]
        return clipped(rounded(summed, dyadic, channel), low=low, high=high)

    return te.compute(tuple(shape), answer, name="requantized")


def _extents(
    places: Sequence[int], window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(places, padding, dilation, window, stride, strict=True)
    ]


def _up(extent: int, width: int) -> int:
    return -(-extent // width) * width
