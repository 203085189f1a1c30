"""Integer operators for TVM, exact to the bit: products summed in i32, dyadic requantization in i64, packed int4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from intarsia.backends import tvm_operators
from intarsia.backends.tvm_operators import ROW_TILES, row_cost

LANES = 8
"""Sums in an AVX2 register."""

CONSTANTS: Mapping[str, Sequence[str]] = {
    "intarsia.linear_i8i8": ("weight",),
    "intarsia.conv2d_i8i8": ("weight",),
    "intarsia.linear_i8": ("weight", "scale"),
    "intarsia.linear_i4": ("packed", "scale"),
}
"""Arguments that must be parameters, because they are packed when the library is built."""

Values = Mapping[str, Any]
"""What a call is given by name: tensors of the module being built, and plain numbers."""

Known = Mapping[str, "Tensor | None"]
"""The constants among the tensors."""

Call = tuple[Callable[..., Any], Sequence[Any]]
"""A tensor expression and its tensors; constants may still be PyTorch's."""


def wrapping_sum(left: Any, right: Any) -> Any:
    """The sum of two i32 modulo 2**32, as PyTorch adds; TVM takes signed sums to fit and would widen them."""
    from tvm import tirx

    return tirx.reinterpret("int32", tirx.reinterpret("uint32", left) + tirx.reinterpret("uint32", right))


def dyadic(total: Any, multiplier: Any, shift: Any) -> Any:
    """``total`` i32 times ``multiplier`` / 2**``shift``, rounded half up and clipped to int8."""
    from tvm import tirx

    wide = shift.astype("int64")
    one = tirx.const(1, "int64")
    product = total.astype("int64") * multiplier.astype("int64") + (one << (wide - 1))
    low, high = tirx.const(-128, "int64"), tirx.const(127, "int64")
    return tirx.max(tirx.min(product >> wide, high), low).astype("int8")


def quantize_static(input: Any, *, scale: float) -> Any:
    """``input`` / ``scale`` in f32, rounded half to even and clipped to int8."""
    from tvm import tirx

    def code(x: Any) -> Any:
        rounded = tirx.nearbyint(x.astype("float32") / tirx.const(scale, "float32"))
        low, high = tirx.const(-128.0, "float32"), tirx.const(127.0, "float32")
        return tirx.max(tirx.min(rounded, high), low).astype("int8")

    return tvm_operators.elementwise(input, of=code, name="quantize_static")


def dequantize_static(input: Any, *, scale: float, dtype: str) -> Any:
    """``input`` i8 times ``scale``, computed in f32."""
    from tvm import tirx

    def real(x: Any) -> Any:
        return (x.astype("float32") * tirx.const(scale, "float32")).astype(dtype)

    return tvm_operators.elementwise(input, of=real, name="dequantize_static")


def requantize(input: Any, multiplier: Any, shift: Any, *, axis: int) -> Any:
    """``input`` i32 by the dyadic numbers along ``axis``: int8."""
    from tvm import te

    place = axis % len(input.shape)
    return te.compute(
        input.shape, lambda *i: dyadic(input[i], multiplier[i[place]], shift[i[place]]), name="requantize"
    )


def linear_i8i8(input: Any, packed: Any, multiplier: Any, shift: Any, *bias: Any) -> Any:
    """Input i8 (..., M, C) times ``packed`` (R/8, C/2, 8, 2), summed in i32, requantized: i8 (..., M, R)."""
    from tvm import te, tirx

    *outer, lines, columns = (int(extent) for extent in input.shape)
    _, pairs, width, _ = (int(extent) for extent in packed.shape)
    rows = int(multiplier.shape[0])

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
    return _requantized(total, (*input.shape[:-1], rows), multiplier, shift, *bias)


def conv2d_i8i8(
    input: Any,
    packed: Any,
    multiplier: Any,
    shift: Any,
    *bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """Input i8 (N, H, W, C) with ``packed`` (O/8, kh, kw, C/2, 8, 2), summed in i32, requantized: i8 (N, H, W, O)."""
    from tvm import te, tirx

    batch, *places, channels = (int(extent) for extent in input.shape)
    _, *window, pairs, width, _ = (int(extent) for extent in packed.shape)
    rows = int(multiplier.shape[0])
    extents = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(places, padding, dilation, window, stride, strict=True)
    ]

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
    return _requantized(total, (batch, *extents, rows), multiplier, shift, *bias)


def whole_tiles(rows: int) -> int:
    """``rows`` and as many more as fill whole tiles: TVM puts no instruction of ours where rows are left over."""
    tile = min(
        (tile for tile in ROW_TILES if tile <= rows),
        key=lambda tile: row_cost(_up(rows, tile), tile) * _up(rows, tile),
        default=rows,
    )
    return _up(rows, tile)


def _requantized(total: Any, shape: Sequence[int], multiplier: Any, shift: Any, *bias: Any) -> Any:
    from tvm import te

    def answer(*i: Any) -> Any:
        summed = wrapping_sum(total[i], bias[0][i[-1]]) if bias else total[i]
        return dyadic(summed, multiplier[i[-1]], shift[i[-1]])

    return te.compute(tuple(shape), answer, name="requantized")


def _up(extent: int, width: int) -> int:
    return -(-extent // width) * width


def pack_pairs(weight: Tensor) -> Tensor:
    """Weight i8 (R, ..., C) as (R/8, ..., C/2, 8, 2): the pairs of columns that an instruction takes of 8 rows."""
    rows, columns = weight.shape[0], weight.shape[-1]
    flat = weight.reshape(rows, -1, columns)
    padded = torch.nn.functional.pad(flat, (0, columns % 2, 0, 0, 0, -rows % LANES))
    pairs = padded.view(-1, LANES, flat.shape[1], (columns + 1) // 2, 2)
    return pairs.permute(0, 2, 3, 1, 4).reshape(-1, *weight.shape[1:-1], (columns + 1) // 2, LANES, 2).contiguous()


def grouped_conv2d_i8i8(
    input: Any,
    weight: Any,
    multiplier: Any,
    shift: Any,
    *bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """Input i8 (N, H, W, C) with weight i8 (O, C/groups, kh, kw), each group on its own: i8 (N, H, W, O)."""
    from tvm import te, tirx

    batch, *places, _ = (int(extent) for extent in input.shape)
    rows, depth, *window = (int(extent) for extent in weight.shape)
    extents = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(places, padding, dilation, window, stride, strict=True)
    ]
    down, across = te.reduce_axis((0, window[0]), "down"), te.reduce_axis((0, window[1]), "across")
    channel = te.reduce_axis((0, depth), "channel")

    def term(b: Any, y: Any, x: Any, out: Any) -> Any:
        place = [
            i * s + tap * d - p
            for i, s, tap, d, p in zip((y, x), stride, (down, across), dilation, padding, strict=True)
        ]
        inside = [one for i, n in zip(place, places, strict=True) for one in (i >= 0, i < n)]
        value = input[b, place[0], place[1], out // (rows // groups) * depth + channel].astype("int32")
        product = value * weight[out, channel, down, across].astype("int32")
        return te.sum(tirx.if_then_else(tirx.all(*inside), product, 0), axis=[channel, down, across])

    total = te.compute((batch, *extents, rows), term, name="grouped")
    return _requantized(total, total.shape, multiplier, shift, *bias)


def linear_i8(input: Any, packed: Any, scale: Any, *, rows: int) -> Any:
    """Input f32 (..., C) times ``packed`` i8 (R/width, C, width), scaled by (R/width, width): (..., R)."""
    from tvm import te

    real = te.compute(
        packed.shape, lambda r, c, lane: packed[r, c, lane].astype("float32") * scale[r, lane], name="unpacked"
    )
    return tvm_operators.linear(input, real, rows=rows)


def linear_i4(input: Any, packed: Any, scale: Any, *, rows: int, group: int) -> Any:
    """Input f32 (..., C) times ``packed`` u8 (R/width, C/2, width), scaled by (R/width, C/group, width): (..., R)."""
    from tvm import te

    blocks, half, width = (int(extent) for extent in packed.shape)

    def weight(r: Any, c: Any, lane: Any) -> Any:
        return nibble(packed[r, c // 2, lane], c % 2).astype("float32") * scale[r, c // group, lane]

    return tvm_operators.linear(input, te.compute((blocks, 2 * half, width), weight, name="unpacked"), rows=rows)


def unpack_i4(packed: Any) -> Any:
    """Packed u8 (R, C/2) as i8 (R, C), even column in the low nibble."""
    from tvm import te

    rows, half = (int(extent) for extent in packed.shape)
    return te.compute((rows, 2 * half), lambda r, c: nibble(packed[r, c // 2], c % 2), name="unpack_i4")


def nibble(byte: Any, odd: Any) -> Any:
    """The low or the high half of a byte as a signed four-bit number, i8."""
    code = (byte.astype("int32") >> (odd.astype("int32") * 4)) & 15
    return ((code ^ 8) - 8).astype("int8")


def _quantize_static(values: Values, known: Known) -> Call:
    return partial(quantize_static, scale=values["scale"]), [values["input"]]


def _dequantize_static(values: Values, known: Known) -> Call:
    dtype = str(values["dtype"]).removeprefix("torch.")
    return partial(dequantize_static, scale=values["scale"], dtype=dtype), [values["input"]]


def _requantize(values: Values, known: Known) -> Call:
    return partial(requantize, axis=values["axis"]), [values[key] for key in ("input", "multiplier", "shift")]


def _linear_i8i8(values: Values, known: Known) -> Call:
    return linear_i8i8, [values["input"], pack_pairs(_weight(known, "weight")), *_dyadic_and_bias(values)]


def _conv2d_i8i8(values: Values, known: Known) -> Call:
    sides = {key: tuple(values[key]) for key in ("stride", "padding", "dilation")}
    weight, groups = _weight(known, "weight"), values["groups"]
    if groups == 1:
        packed = pack_pairs(weight.movedim(1, -1))
        return partial(conv2d_i8i8, **sides), [values["input"], packed, *_dyadic_and_bias(values)]
    function = partial(grouped_conv2d_i8i8, **sides, groups=groups)
    return function, [values["input"], weight, *_dyadic_and_bias(values)]


def _dyadic_and_bias(values: Values) -> list[Any]:
    bias = [] if values["bias"] is None else [values["bias"]]
    return [values["multiplier"], values["shift"], *bias]


def _weight(known: Known, key: str) -> Tensor:
    found = known[key]
    assert found is not None, "why_not lets no computed weight through"
    return found


def _linear_i8(values: Values, known: Known) -> Call:
    weight, scale = _weight(known, "weight"), _weight(known, "scale")
    packed = tvm_operators.pack_rows(weight)
    tensors = [values["input"], packed, tvm_operators.pack_rows(scale[:, None])[:, 0].contiguous()]
    return partial(linear_i8, rows=weight.shape[0]), tensors


def _linear_i4(values: Values, known: Known) -> Call:
    weight, scale = _weight(known, "packed"), _weight(known, "scale")
    tensors = [values["input"], tvm_operators.pack_rows(weight), tvm_operators.pack_rows(scale)]
    return partial(linear_i4, rows=weight.shape[0], group=values["group"]), tensors


def _unpack_i4(values: Values, known: Known) -> Call:
    return unpack_i4, [values["packed"]]


OPERATORS: Mapping[str, Callable[[Values, Known], Call]] = {
    "quantize_static": _quantize_static,
    "dequantize_static": _dequantize_static,
    "requantize": _requantize,
    "linear_i8i8": _linear_i8i8,
    "conv2d_i8i8": _conv2d_i8i8,
    "linear_i8": _linear_i8,
    "linear_i4": _linear_i4,
    "unpack_i4": _unpack_i4,
}
"""The function and the tensors for a call of each operator, by its name."""
