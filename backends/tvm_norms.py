"""Layer, RMS and softmax normalization for TVM: sums of a row in the lanes of a vector, then every channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from intarsia.backends.tvm_functions import exponential


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
