"""Integer operators for TVM by their names, exact to the bit: scalings, and what products and packed weights take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from intarsia.backends import tvm_integer_products as products
from intarsia.backends import tvm_operators
from intarsia.backends.tvm_dyadic import Numbers, clipped, numbers, rounded

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

LARGEST: Mapping[str, int] = {"int8": 1 << 7, "int16": 1 << 15, "int32": 1 << 31}
"""The largest magnitude of each element type."""


def quantize_static(input: Any, *, scale: float, low: int, high: int) -> Any:
    """``input`` / ``scale`` in f32, rounded half to even and clipped to ``low`` and ``high``."""
    from tvm import tirx

    def code(x: Any) -> Any:
        rounded = tirx.nearbyint(x.astype("float32") / tirx.const(scale, "float32"))
        return clipped(rounded, low=low, high=high)

    return tvm_operators.elementwise(input, of=code, name="quantize_static")


def dequantize_static(input: Any, *, scale: float, dtype: str) -> Any:
    """``input`` i8, i16 or i32 times ``scale``, computed in f32."""
    from tvm import tirx

    def real(x: Any) -> Any:
        return (x.astype("float32") * tirx.const(scale, "float32")).astype(dtype)

    return tvm_operators.elementwise(input, of=real, name="dequantize_static")


def requantize(input: Any, *dyadic: Any, axis: int, low: int, high: int) -> Any:
    """``input`` i8, i16 or i32 by the dyadic numbers along ``axis``, or by one, clipped to ``low`` and ``high``."""
    from tvm import te

    def code(*i: Any) -> Any:
        return clipped(rounded(input[i], dyadic, i[axis]), low=low, high=high)

    return te.compute(input.shape, code, name="requantize")


def add_requantized(input: Any, other: Any, *dyadic: Any, low: int, high: int) -> Any:
    """The sum of two tensors of integers, each by its dyadic number, rounded each on its own, and clipped."""
    from tvm import te

    half = len(dyadic) // 2

    def code(*i: Any) -> Any:
        terms = rounded(input[i], dyadic[:half], 0), rounded(other[i], dyadic[half:], 0)
        return clipped(terms[0] + terms[1], low=low, high=high)

    return te.compute(input.shape, code, name="add_requantized")


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
    return partial(quantize_static, scale=values["scale"], **_ends(values)), [values["input"]]


def _dequantize_static(values: Values, known: Known) -> Call:
    dtype = str(values["dtype"]).removeprefix("torch.")
    return partial(dequantize_static, scale=values["scale"], dtype=dtype), [values["input"]]


def _requantize(values: Values, known: Known) -> Call:
    ends = _ends(values)
    dyadic = _numbers(values, known, largest=_largest(values["input"]), ends=ends)
    axis = values["axis"] % len(values["input"].ty.shape)
    return partial(requantize, axis=axis, **ends), [values["input"], *dyadic]


def _add_requantized(values: Values, known: Known) -> Call:
    """Both terms in one form: the sum is in f64 or in i64."""
    terms = [
        _numbers(values, known, prefix=prefix, largest=_largest(values[key]))
        for prefix, key in (("", "input"), ("other_", "other"))
    ]
    if len({len(one) for one in terms}) == 2:
        terms = [[values[f"{prefix}{key}"] for key in ("multiplier", "shift")] for prefix in ("", "other_")]
    tensors = [values["input"], values["other"], *terms[0], *terms[1]]
    return partial(add_requantized, **_ends(values)), tensors


def _linear_i8i8(values: Values, known: Known) -> Call:
    weight = _weight(known, "weight")
    function = partial(products.linear_i8i8, rows=weight.shape[0], biased=values["bias"] is not None, **_ends(values))
    return function, [values["input"], products.pack_pairs(weight), *_dyadic_and_bias(values, known)]


def _conv2d_i8i8(values: Values, known: Known) -> Call:
    sides = {key: tuple(values[key]) for key in ("stride", "padding", "dilation")}
    weight, groups = _weight(known, "weight"), values["groups"]
    rest = _dyadic_and_bias(values, known)
    given: dict[str, Any] = {**sides, **_ends(values), "biased": values["bias"] is not None}
    if groups == 1:
        packed = products.pack_pairs(weight.movedim(1, -1))
        return partial(products.conv2d_i8i8, rows=weight.shape[0], **given), [values["input"], packed, *rest]
    function = partial(products.grouped_conv2d_i8i8, groups=groups, **given)
    return function, [values["input"], weight.permute(2, 3, 1, 0).contiguous(), *rest]


def _avg_pool2d_i8(values: Values, known: Known) -> Call:
    window = tuple(values["kernel_size"])
    largest = min(_largest(values["input"]) * window[0] * window[1], 1 << 31)
    ends = _ends(values)
    dyadic = _numbers(values, known, largest=largest, ends=ends)
    given: dict[str, Any] = {
        **ends,
        "stride": tuple(values["stride"]),
        "padding": tuple(values["padding"]),
        "axes": values.get("axes", (2, 3)),
    }
    return partial(products.avg_pool2d_i8, window=window, **given), [values["input"], *dyadic]


def _dyadic_and_bias(values: Values, known: Known) -> list[Any]:
    bias = [] if values["bias"] is None else [values["bias"]]
    stored = known.get("bias")
    certain = values["bias"] is None or stored is not None
    largest = products.largest_sums(_weight(known, "weight"), stored) if certain else 1 << 31
    return [*_numbers(values, known, largest=largest, ends=_ends(values)), *bias]


def _numbers(
    values: Values, known: Known, *, largest: Tensor | int, ends: Mapping[str, int] | None = None, prefix: str = ""
) -> Numbers:
    keys = (f"{prefix}multiplier", f"{prefix}shift")
    clip = None if ends is None else (ends["low"], ends["high"])
    multiplier, shift = (values[key] for key in keys)
    return numbers(multiplier, shift, [known.get(key) for key in keys], largest=largest, ends=clip)


def _largest(input: Any) -> int:
    return LARGEST[str(input.ty.dtype)]


def _ends(values: Values) -> dict[str, int]:
    return {"low": values["low"], "high": values["high"]}


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
    "add_requantized": _add_requantized,
    "avg_pool2d_i8": _avg_pool2d_i8,
    "linear_i8i8": _linear_i8i8,
    "conv2d_i8i8": _conv2d_i8i8,
    "linear_i8": _linear_i8,
    "linear_i4": _linear_i4,
    "unpack_i4": _unpack_i4,
}
"""The function and the tensors for a call of each operator, by its name."""
