"""Integer operators for TVM, exact to the bit: products summed in i32, dyadic requantization in i64, packed int4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from intarsia.backends import tvm_operators

Values = Mapping[str, Any]
"""What a call is given by name: tensors of the module being built, and plain numbers."""

Known = Mapping[str, "Tensor | None"]
"""The constants among the tensors."""

Call = tuple[Callable[..., Any], Sequence[Any]]
"""A tensor expression and its tensors; constants may still be PyTorch's."""


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


def linear_i8i8(input: Any, weight: Any, multiplier: Any, shift: Any, *bias: Any) -> Any:
    """Input i8 (..., C) times weight i8 (R, C) transposed, summed in i32, requantized: i8 (..., R)."""
    from tvm import te

    rows, columns = (int(extent) for extent in weight.shape)
    column = te.reduce_axis((0, columns), "column")
    total = te.compute(
        (*input.shape[:-1], rows),
        lambda *i: te.sum(
            input[(*i[:-1], column)].astype("int32") * weight[i[-1], column].astype("int32"), axis=column
        ),
        name="product",
    )

    def answer(*i: Any) -> Any:
        summed = total[i] + bias[0][i[-1]] if bias else total[i]
        return dyadic(summed, multiplier[i[-1]], shift[i[-1]])

    return te.compute(total.shape, answer, name="requantized")


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
    bias = [] if values["bias"] is None else [values["bias"]]
    return linear_i8i8, [*(values[key] for key in ("input", "weight", "multiplier", "shift")), *bias]


def _unpack_i4(values: Values, known: Known) -> Call:
    return unpack_i4, [values["packed"]]


OPERATORS: Mapping[str, Callable[[Values, Known], Call]] = {
    "quantize_static": _quantize_static,
    "dequantize_static": _dequantize_static,
    "requantize": _requantize,
    "linear_i8i8": _linear_i8i8,
    "unpack_i4": _unpack_i4,
}
"""The function and the tensors for a call of each operator, by its name."""
