"""What the TVM backend computes itself, as tensor expressions; ``tvm_schedule`` turns them into loops.

The name of a stage says how it is scheduled: a ``product`` is tiled in registers, what a stage called ``lanes`` sums it
sums in the lanes of a vector. Weights come packed, so that a vector of rows lies together in memory.
"""

from __future__ import annotations

import math
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

LOWEST = -3.0e38
"""Stands for minus infinity where an exponential follows."""


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


Layout = str
"""``heads first`` for (B, H, S, D), ``heads beside channels`` for (B, S, H, D)."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    lengths: Any | None = None,
    *,
    scale: float,
    heads_first: tuple[bool, bool, bool, bool],
) -> Any:
    """Softmax attention, scores of a few rows at a time; ``heads_first`` of query, key, value and result.

    With heads first a tensor is (B, H, S, D), otherwise (B, S, H, D). Keys from ``lengths`` (B) on do not count.
    """
    from tvm import te, tirx

    def sizes(tensor: Any, first: bool) -> tuple[int, int, int, int]:
        b, x, y, d = (int(extent) for extent in tensor.shape)
        return (b, x, y, d) if first else (b, y, x, d)

    def at(tensor: Any, first: bool, b: Any, h: Any, s: Any, d: Any) -> Any:
        return tensor[b, h, s, d] if first else tensor[b, s, h, d]

    query_first, key_first, value_first, result_first = heads_first
    batch, heads, rows, depth = sizes(query, query_first)
    _, key_heads, keys, _ = sizes(key, key_first)
    channels = sizes(value, value_first)[3]
    shared = heads // key_heads
    width = 2 * VECTOR
    blocks = -(-keys // width)
    bare = keys % width != 0

    def transposed(b: Any, h: Any, block: Any, d: Any, lane: Any) -> Any:
        place = block * width + lane
        read = at(key, key_first, b, h, tirx.min(place, keys - 1) if bare else place, d)
        return read

    packed = te.compute((batch, key_heads, blocks, depth, width), transposed, name="packed_keys")
    d = te.reduce_axis((0, depth), "d")
    scores = te.compute(
        (batch, heads, rows, blocks, width),
        lambda b, h, i, block, lane: te.sum(
            at(query, query_first, b, h, i, d) * packed[b, h // shared, block, d, lane], axis=d
        ),
        name="scores",
    )

    def masked(b: Any, h: Any, i: Any, block: Any, lane: Any) -> Any:
        score = scores[b, h, i, block, lane] * tirx.const(scale, "float32")
        if lengths is None and not bare:
            return score
        end = tirx.min(lengths[b].astype("int32"), keys) if lengths is not None else keys
        return tirx.Select(block * width + lane < end, score, tirx.const(LOWEST, "float32"))

    logits = te.compute((batch, heads, rows, blocks, width), masked, name="logits")
    by_lane, by_block = te.reduce_axis((0, width), "lane"), te.reduce_axis((0, blocks), "block")
    lane_max = te.compute(
        (batch, heads, rows, width),
        lambda b, h, i, lane: te.max(logits[b, h, i, by_block, lane], axis=by_block),
        name="lanes_max",
    )
    top = te.compute(
        (batch, heads, rows), lambda b, h, i: te.max(lane_max[b, h, i, by_lane], axis=by_lane), name="row_max"
    )
    weights = te.compute(
        (batch, heads, rows, blocks, width),
        lambda b, h, i, block, lane: exponential(logits[b, h, i, block, lane] - top[b, h, i]),
        name="weights",
    )
    sum_block, sum_lane = te.reduce_axis((0, blocks), "block"), te.reduce_axis((0, width), "lane")
    lane_sum = te.compute(
        (batch, heads, rows, width),
        lambda b, h, i, lane: te.sum(weights[b, h, i, sum_block, lane], axis=sum_block),
        name="lanes_sum",
    )
    total = te.compute(
        (batch, heads, rows), lambda b, h, i: te.sum(lane_sum[b, h, i, sum_lane], axis=sum_lane), name="row_sum"
    )
    j = te.reduce_axis((0, keys), "j")
    mixed = te.compute(
        (batch, heads, rows, channels),
        lambda b, h, i, c: te.sum(
            weights[b, h, i, j // width, j % width] * at(value, value_first, b, h // shared, j, c), axis=j
        ),
        name="mixed",
    )

    def answer(b: Any, h: Any, i: Any, c: Any) -> Any:
        value = mixed[b, h, i, c] / total[b, h, i]
        return value if lengths is None else tirx.Select(lengths[b] > 0, value, tirx.const(0.0, "float32"))

    if result_first:
        return te.compute((batch, heads, rows, channels), answer, name="attention")
    return te.compute((batch, rows, heads, channels), lambda b, i, h, c: answer(b, h, i, c), name="attention")


def normalized(
    input: Any,
    *,
    eps: float,
    centred: bool,
    finish: Callable[..., Any],
    shape: Sequence[int] | None = None,
    name: str = "normalized",
) -> Any:
    """``finish(y, index)`` over rows of ``input`` (..., C), where ``y(channel)`` is a channel brought to unit size.

    Centred it is layer normalization, otherwise RMS normalization. ``index`` runs over ``shape``, by default input's;
    its leading axes are those of the rows.
    """
    from tvm import te, tirx

    *outer, channels = (int(extent) for extent in input.shape)
    width = next(lanes for lanes in (16, 8, 4, 2, 1) if channels % lanes == 0)
    inverse = tirx.const(1.0 / channels, "float32")

    def row_sum(term: Callable[..., Any], name: str) -> Any:
        block, lane = te.reduce_axis((0, channels // width), "block"), te.reduce_axis((0, width), "lane")
        partial = te.compute(
            (*outer, width), lambda *i: te.sum(term(*i[:-1], block * width + i[-1]), axis=block), name=f"lanes_{name}"
        )
        return te.compute(tuple(outer), lambda *i: te.sum(partial[(*i, lane)], axis=lane), name=f"row_{name}")

    if centred:
        total = row_sum(lambda *i: input[i], "mean")
        mean = te.compute(tuple(outer), lambda *i: total[i] * inverse, name="row_mean_of")
        squares = row_sum(lambda *i: (input[i] - mean[i[:-1]]) * (input[i] - mean[i[:-1]]), "variance")
    else:
        squares = row_sum(lambda *i: input[i] * input[i], "square")
    factor = te.compute(
        tuple(outer), lambda *i: 1.0 / tirx.sqrt(squares[i] * inverse + tirx.const(eps, "float32")), name="row_factor"
    )

    def body(*index: Any) -> Any:
        row = index[: len(outer)]

        def unit(channel: Any) -> Any:
            value = input[(*row, channel)]
            return (value - mean[row] if centred else value) * factor[row]

        return finish(unit, index)

    return te.compute(tuple(shape or input.shape), body, name=name)


def softmax(input: Any) -> Any:
    """Softmax over the last axis."""
    from tvm import te

    *outer, extent = (int(n) for n in input.shape)
    k, j = te.reduce_axis((0, extent), "k"), te.reduce_axis((0, extent), "j")
    top = te.compute(tuple(outer), lambda *i: te.max(input[(*i, k)], axis=k), name="row_max")
    weights = te.compute(input.shape, lambda *i: exponential(input[i] - top[i[:-1]]), name="weights")
    total = te.compute(tuple(outer), lambda *i: te.sum(weights[(*i, j)], axis=j), name="row_sum")
    return te.compute(input.shape, lambda *i: weights[i] / total[i[:-1]], name="normalized")


def exponential(x: Any) -> Any:
    """e**x for f32, relative error below 3e-7: the power of two by its exponent bits, the rest by a polynomial.

    Coefficients: Cephes, expf.c (S. Moshier). LLVM's own exponential is a call for each lane.
    """
    from tvm import tirx

    def f(value: float) -> Any:
        return tirx.const(value, "float32")

    x = tirx.max(tirx.min(x, f(88.0)), f(-87.0))
    n = tirx.floor(x * f(math.log2(math.e)) + f(0.5))
    r = x - n * f(0.693359375) - n * f(-2.12194440e-4)
    p = f(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f(coefficient)
    p = p * r * r + r + f(1.0)
    return p * tirx.reinterpret("float32", (n.astype("int32") + 127) << 23)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return 1.0 / (1.0 + exponential(-x))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent, by the sigmoid of twice the argument."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


def erf(x: Any) -> Any:
    """Error function, absolute error below 2e-7 (Abramowitz and Stegun, 7.1.26)."""
    from tvm import tirx

    size = tirx.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1.0 - p * exponential(-size * size)
    return tirx.Select(x < 0.0, -value, value)


def elementwise(input: Any, *, of: Callable[[Any], Any], name: str) -> Any:
    """``of`` each element."""
    from tvm import te

    return te.compute(input.shape, lambda *i: of(input[i]), name=name)


def silu(x: Any) -> Any:
    """x times its sigmoid."""
    return x * sigmoid(x)


def gelu_tanh(x: Any) -> Any:
    """GELU by the hyperbolic tangent, written as a sigmoid: one exponential."""
    return x * sigmoid(x * (1.5957691216 + 0.0713548162726 * x * x))


def gelu(x: Any) -> Any:
    """GELU by the error function."""
    return 0.5 * x * (1.0 + erf(x * (2.0**-0.5)))


def layer_norm(input: Any, *affine: Any, eps: float, biased: bool) -> Any:
    """Layer normalization over the last axis; ``affine`` is nothing, or weight, or weight and bias (C)."""

    def finish(unit: Callable[[Any], Any], index: Sequence[Any]) -> Any:
        value = unit(index[-1])
        if affine:
            value = value * affine[0][index[-1]]
        return value + affine[1][index[-1]] if biased else value

    return normalized(input, eps=eps, centred=True, finish=finish)


def rms_norm(input: Any, *weight: Any, eps: float) -> Any:
    """RMS normalization over the last axis; ``weight`` is nothing or one tensor (C)."""

    def finish(unit: Callable[[Any], Any], index: Sequence[Any]) -> Any:
        return unit(index[-1]) * weight[0][index[-1]] if weight else unit(index[-1])

    return normalized(input, eps=eps, centred=False, finish=finish)


def modulated_norm(input: Any, scale: Any, shift: Any, *affine: Any, eps: float, weighted: bool) -> Any:
    """Layer normalization of input (B, N, C), then times 1 + scale plus shift, which broadcast to it."""
    weight, bias = ([*affine, None] if weighted else [None, *affine, None])[:2]

    def finish(unit: Callable[[Any], Any], index: Sequence[Any]) -> Any:
        value = unit(index[-1])
        value = value if weight is None else value * weight[index[-1]]
        value = value if bias is None else value + bias[index[-1]]
        return value * (1.0 + _broadcast(scale, index)) + _broadcast(shift, index)

    return normalized(input, eps=eps, centred=True, finish=finish)


def _broadcast(tensor: Any, index: Sequence[Any]) -> Any:
    own = index[len(index) - len(tensor.shape) :]
    return tensor[tuple(0 if int(extent) == 1 else i for extent, i in zip(tensor.shape, own, strict=True))]


def norm_rope(input: Any, cos: Any, sin: Any, *weight: Any, heads: int, eps: float) -> Any:
    """RMS normalization of input (B, N, C) over C, then neighbouring pairs turned by tables (N, D/2): (B, N, H, D)."""
    from tvm import tirx

    batch, tokens, channels = (int(extent) for extent in input.shape)
    depth = channels // heads

    def finish(unit: Callable[[Any], Any], index: Sequence[Any]) -> Any:
        _, token, head, d = index

        def value(channel: Any) -> Any:
            return unit(channel) * weight[0][channel] if weight else unit(channel)

        pair = d // 2
        even, odd = value(head * depth + pair * 2), value(head * depth + pair * 2 + 1)
        c, s = cos[token, pair], sin[token, pair]
        return tirx.Select(d % 2 == 0, even * c - odd * s, even * s + odd * c)

    shape = (batch, tokens, heads, depth)
    return normalized(input, eps=eps, centred=False, finish=finish, shape=shape, name="rotated")
