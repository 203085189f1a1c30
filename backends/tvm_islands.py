"""Integer softmax, norms, functions and products of activations for TVM, to the same bits as their definition.

What is computed once for a row stands in stages of its own, called ``row_...``: ``tvm_schedule`` keeps these beside the
row, and inlines everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from intarsia.backends.tvm_dyadic import clipped
from intarsia.kernels.integers.golden_islands import FRACTION, NORMED, ONE, SEGMENT

Values = Mapping[str, Any]
"""What a call is given by name: tensors of the module being built, and plain numbers."""

DIGITS = 62
"""Binary digits of the largest number of which a row's reciprocal or root is taken."""


def apply_table(input: Any, table: Any, *, low: int, high: int) -> Any:
    """The table's entry for each code i8, or the line between two of them for i16."""
    from tvm import te

    def code(*index: Any) -> Any:
        x = input[index].astype("int32")
        if str(input.dtype) == "int8":
            return clipped(table[x + 128].astype("int64"), low=low, high=high)
        place, part = (x + 2**15) >> SEGMENT, (x & (2**SEGMENT - 1)).astype("int64")
        total = _wide(table[place]) * (_i64(2**SEGMENT) - part) + _wide(table[place + 1]) * part
        rounded = (total + _i64(2 ** (SEGMENT + FRACTION - 1))) >> _i64(SEGMENT + FRACTION)
        return clipped(rounded, low=low, high=high)

    return te.compute(input.shape, code, name="apply_table")


def integer_softmax(input: Any, table: Any, *, multiplier: int, shift: int, low: int, high: int) -> Any:
    """Softmax of i8 or i16 over the last axis."""
    from tvm import te, tirx

    *outer, extent = (int(n) for n in input.shape)
    k, j = te.reduce_axis((0, extent), "k"), te.reduce_axis((0, extent), "j")
    top = te.compute(tuple(outer), lambda *i: te.max(input[(*i, k)].astype("int32"), axis=k), name="row_max")

    def power(*index: Any) -> Any:
        below = top[index[:-1]] - input[index].astype("int32")
        if str(input.dtype) == "int8":
            return _wide(table[below])
        product = _wide(table[below >> 8]) * _wide(table[256 + (below & 255)])
        return (product + _i64(2 ** (ONE - 1))) >> _i64(ONE)

    powers = te.compute(input.shape, power, name="weights")
    total = te.compute(tuple(outer), lambda *i: te.sum(powers[(*i, j)], axis=j), name="row_sum")
    length = _length(total)
    found = _row(length, "start", lambda *i: total[i] >> (length[i] - _i64(31)))
    number = _reciprocal(found)
    scaled = _row(length, "number", lambda *i: (number[i] * _i64(multiplier)) >> _i64(31))
    digits = _row(length, "digits", lambda *i: tirx.min(length[i] + _i64(shift - 1), _i64(62)))

    def code(*index: Any) -> Any:
        row = index[:-1]
        return clipped(_rounded(powers[index] * scaled[row], digits[row]), low=low, high=high)

    return te.compute(input.shape, code, name=_last(outer))


def integer_norm(
    input: Any, weight: Any, bias: Any, shift: Any, *, epsilon: int, centered: bool, low: int, high: int
) -> Any:
    """Layer norm of i8 or i16 over the last axis; not ``centered``, RMS norm."""
    from tvm import te

    *outer, extent = (int(n) for n in input.shape)
    k, j = te.reduce_axis((0, extent), "k"), te.reduce_axis((0, extent), "j")
    squares = te.compute(
        tuple(outer), lambda *i: te.sum(_wide(input[(*i, k)]) * _wide(input[(*i, k)]), axis=k), name="row_squares"
    )
    total = (
        te.compute(tuple(outer), lambda *i: te.sum(_wide(input[(*i, j)]), axis=j), name="row_sum") if centered else None
    )

    def apart(*row: Any) -> Any:
        whole = squares[row] * _i64(extent) + _i64(epsilon)
        return whole if total is None else whole - total[row] * total[row]

    spread = _row(squares, "spread", apart)
    length = _length(spread)
    half = _row(squares, "half", lambda *i: (length[i] + _i64(1)) >> _i64(1))
    start = _row(squares, "start", lambda *i: (spread[i] << (_i64(62) - half[i] - half[i])) >> _i64(31))
    root = _root(start)

    def code(*index: Any) -> Any:
        row, channel = index[:-1], index[-1]
        value = _wide(input[index]) * _i64(extent)
        value = value if total is None else value - total[row]
        normed = _rounded(value * root[row], half[row] + _i64(ONE - NORMED))
        moved = normed * _wide(weight[channel]) + bias[channel]
        return clipped(_rounded(moved, _wide(shift[0])), low=low, high=high)

    return te.compute(input.shape, code, name=_last(outer))


def matmul_i8i8(input: Any, other: Any, *, multiplier: int, shift: int, low: int, high: int) -> Any:
    """Codes (..., M, K) times codes (..., K, N), summed in i32, requantized."""
    from tvm import te

    *outer, rows, inner = (int(n) for n in input.shape)
    k = te.reduce_axis((0, inner), "k")

    def product(*index: Any) -> Any:
        *batch, row, column = index
        return te.sum(input[(*batch, row, k)].astype("int32") * other[(*batch, k, column)].astype("int32"), axis=k)

    total = te.compute((*outer, rows, other.shape[-1]), product, name="sums")
    half = _i64(1 << (shift - 1))

    def code(*index: Any) -> Any:
        return clipped((_wide(total[index]) * _i64(multiplier) + half) >> _i64(shift), low=low, high=high)

    return te.compute(total.shape, code, name="matmul_i8i8")


def _length(x: Any) -> Any:
    """Binary digits of positive numbers."""
    from tvm import te, tirx

    k = te.reduce_axis((0, DIGITS), "digit")

    def reached(*row: Any) -> Any:
        return te.sum(tirx.Select(x[row] >= (_i64(1) << k.astype("int64")), _i64(1), _i64(0)), axis=k)

    return te.compute(x.shape, reached, name="row_length")


def _reciprocal(x: Any) -> Any:
    """1 / x as ``golden_islands.reciprocal`` has it, a stage for each step."""
    found = _row(x, "step0", lambda *i: _i64(3031741621) - ((_i64(2021161080) * x[i]) >> _i64(31)))

    def better(before: Any, *i: Any) -> Any:
        return (before[i] * ((_i64(2**62) - x[i] * before[i]) >> _i64(31))) >> _i64(ONE)

    for step in (1, 2, 3):
        found = _row(x, f"step{step}", partial(better, found))
    return found


def _root(x: Any) -> Any:
    """1 / sqrt(x) as ``golden_islands.inverse_root`` has it, a stage for each step."""
    found = _row(x, "step0", lambda *i: _i64(2290047081) - ((_i64(1308598332) * x[i]) >> _i64(31)))

    def better(before: Any, *i: Any) -> Any:
        square = (before[i] * before[i]) >> _i64(ONE)
        return (before[i] * ((_i64(3 * 2**61) - x[i] * square) >> _i64(31))) >> _i64(31)

    for step in (1, 2, 3, 4):
        found = _row(x, f"step{step}", partial(better, found))
    return found


def _row(like: Any, name: str, of: Callable[..., Any]) -> Any:
    """A stage that is computed once for each row."""
    from tvm import te

    return te.compute(like.shape, of, name=f"row_{name}")


def _rounded(x: Any, digits: Any) -> Any:
    """x / 2**digits, rounded half up."""
    return (x + (_i64(1) << (digits - _i64(1)))) >> digits


def _last(outer: Sequence[int]) -> str:
    """What the last stage is called: rows are scheduled as such where there are several."""
    return "normalized" if outer else "row"


def _wide(x: Any) -> Any:
    return x.astype("int64")


def _i64(number: int) -> Any:
    from tvm import tirx

    return tirx.const(number, "int64")


def _call(function: Callable[..., Any], tensors: Sequence[str], *numbers: str) -> Callable[[Values, Any], Any]:
    """What ``tvm_integers`` does with a call: the function of its numbers, and its tensors."""

    def made(values: Values, known: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
        return partial(function, **{key: values[key] for key in (*numbers, "low", "high")}), [
            values[k] for k in tensors
        ]

    return made


OPERATORS: Mapping[str, Callable[[Values, Any], Any]] = {
    "apply_table": _call(apply_table, ("input", "table")),
    "integer_softmax": _call(integer_softmax, ("input", "table"), "multiplier", "shift"),
    "integer_norm": _call(integer_norm, ("input", "weight", "bias", "shift"), "epsilon", "centered"),
    "matmul_i8i8": _call(matmul_i8i8, ("input", "other"), "multiplier", "shift"),
}
"""The function and the tensors for a call of each operator, by its name."""
