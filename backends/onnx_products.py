"""Sums of products of integers in ONNX, exact with VNNI and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from intarsia.backends.onnx_exact import SINGLE
from intarsia.backends.onnx_weights import Tape
from intarsia.kernels.integer_weights.sums import reach

if TYPE_CHECKING:
    import onnx_ir

Array = np.ndarray[Any, np.dtype[Any]]

PAIR = 2**15 - 1
"""What two products may sum up to: without VNNI, u8 times i8 is summed in pairs that saturate at 16 bits."""

_END = 2**31 - 1
"""Of an axis, however long it is."""


@dataclass(frozen=True, eq=False)
class Input:
    """Integers low..high as u8: ``value`` is what they are plus ``zero``."""

    value: onnx_ir.Value
    zero: int
    low: int
    high: int

    @property
    def largest(self) -> int:
        """As u8."""
        return self.high + self.zero


@dataclass(frozen=True, eq=False)
class Weight:
    """A layer's weight: the value that the graph knows it by, and its codes i8 (O, ...)."""

    value: onnx_ir.Value
    codes: Array

    def is_signed_for(self, input: Input) -> bool:
        """Whether its products with the input as u8 are exact in every runtime while it stays i8."""
        largest = max(abs(int(self.codes.min(initial=0))), abs(int(self.codes.max(initial=0))))
        return 2 * input.largest * largest <= PAIR

    def reach(self, input: Input) -> tuple[Array, Array]:
        """The lowest and the highest sum of each row: i64 (O)."""
        return reach(self.codes, input.low, input.high)

    @cached_property
    def is_narrow(self) -> bool:
        """Whether four bits hold its codes."""
        return bool(self.codes.min(initial=0) >= -8 and self.codes.max(initial=0) <= 7)


class Products:
    """Writes sums of products; ``constants`` lays weights out."""

    def __init__(self, constants: Any) -> None:
        self.constants = constants

    def linear(
        self, input: Input, weight: Weight, tape: Tape, numbers: tuple[Array, Array] | None = None
    ) -> onnx_ir.Value:
        """Input (..., C) times weight (R, C) transposed: i32 (..., R); times and plus ``numbers`` f32 (R) if given."""
        return self._matrix(
            input, input.value, weight, tape, numbers, shape=weight.codes.shape[::-1], laid=lambda codes: codes.T
        )

    def patches(
        self,
        input: Input,
        weight: Weight,
        tape: Tape,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        numbers: tuple[Array, Array] | None = None,
    ) -> onnx_ir.Value:
        """Input (N, H, W, C) with weight (O, C, kh, kw), a product of what lies under each tap: i32 (N, H', W', O).

        Times and plus ``numbers`` f32 (O) if given.
        """
        outputs, channels, *taps = weight.codes.shape
        pixels = input.value
        if any(padding):
            edges = self.constants.number("i64", [0, *padding, 0, 0, *padding, 0])
            pixels = tape.op("Pad", pixels, edges, self.constants.number("u8", input.zero))
        found = self._under_taps(pixels, taps, stride, dilation, tape)
        shape = (channels * taps[0] * taps[1], outputs)

        def laid(codes: Array) -> Array:
            return codes.transpose(2, 3, 1, 0).reshape(shape)

        return self._matrix(input, found, weight, tape, numbers, shape=shape, laid=laid)

    def convolution(
        self,
        input: Input,
        weight: Weight,
        tape: Tape,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> onnx_ir.Value:
        """Input (N, C, H, W) with weight (O, C/groups, kh, kw): i32, or exact f32 in groups, (N, O, H', W')."""
        if groups > 1 and max(abs(one).max(initial=0) for one in weight.reach(input)) < SINGLE:
            return self._in_floats(input, weight, tape, _window(stride, padding, dilation, groups))
        codes = self._unsigned(weight, weight.codes.shape, lambda codes: codes)
        zeros = self.constants.number("u8", input.zero), self.constants.number("u8", 128)
        window = _window(stride, padding, dilation, groups)
        return tape.op("ConvInteger", input.value, codes, *zeros, **window)

    def whole_convolution(
        self,
        input: Input,
        weight: Weight,
        tape: Tape,
        *,
        bias: onnx_ir.Value | None,
        factors: Array,
        output_zero: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> onnx_ir.Value:
        """The same, plus the bias, times factors f32 (O), rounded and saturated: u8, plus ``output_zero``."""
        number, outputs = self.constants.number, len(weight.codes)
        if weight.is_signed_for(input):
            codes, zero = self._signed(weight, weight.codes.shape, lambda codes: codes, tape), ("i8", 0)
        else:
            codes, zero = self._unsigned(weight, weight.codes.shape, lambda codes: codes), ("u8", 128)
        scale = self.constants.array(f"{weight.value.name}.factor", factors.astype(np.float32))
        zeros = self.constants.array(
            f"{zero[0]}.{zero[1]}x{outputs}", np.full(outputs, zero[1], np.int8 if zero[0] == "i8" else np.uint8)
        )
        one = number("f32", 1.0)
        operands = [input.value, one, number("u8", input.zero), codes, scale, zeros, one, number("u8", output_zero)]
        more = [] if bias is None else [bias]
        return tape.op("QLinearConv", *operands, *more, **_window(stride, padding, dilation, groups))

    def sums(
        self,
        input: onnx_ir.Value,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        tape: Tape,
    ) -> onnx_ir.Value:
        """Of integers (N, C, H, W) those under each place of a window, summed: f32, or i32 of a whole picture."""
        import onnx_ir as ir

        assert input.shape is not None
        if list(input.shape)[2:] == list(kernel) and not any(padding):
            whole = tape.op("Cast", input, to=int(ir.DataType.INT32))
            return tape.op("ReduceSum", whole, self.constants.number("i64", [2, 3]))
        channels = input.shape[1]
        assert isinstance(channels, int)
        real = tape.op("Cast", input, to=int(ir.DataType.FLOAT))
        ones = self.constants.array(
            f"ones.{channels}x{kernel[0]}x{kernel[1]}", np.ones((channels, 1, *kernel), np.float32)
        )
        return tape.op("Conv", real, ones, **_window(stride, padding, (1, 1), channels))

    def _in_floats(self, input: Input, weight: Weight, tape: Tape, window: dict[str, Any]) -> onnx_ir.Value:
        """A convolution in f32, in which every sum on the way is a whole number that f32 holds."""
        import onnx_ir as ir

        real = tape.op("Cast", input.value, to=int(ir.DataType.FLOAT))
        if input.zero:
            real = tape.op("Sub", real, self.constants.number("f32", input.zero))
        codes = self._signed(weight, weight.codes.shape, lambda codes: codes, tape)
        return tape.op("Conv", real, tape.op("Cast", codes, to=int(ir.DataType.FLOAT)), **window)

    def _matrix(
        self,
        input: Input,
        rows: onnx_ir.Value,
        weight: Weight,
        tape: Tape,
        numbers: tuple[Array, Array] | None,
        *,
        shape: tuple[int, ...],
        laid: Callable[[Array], Array],
    ) -> onnx_ir.Value:
        zero = self.constants.number("u8", input.zero)
        if numbers is not None:
            return self._scaled_matrix(input, rows, weight, tape, numbers, shape=shape, laid=laid)
        if weight.is_signed_for(input):
            matrix = self._signed(weight, shape, laid, tape)
            return tape.op("MatMulInteger", rows, matrix, *([zero] if input.zero else []))
        return tape.op(
            "MatMulInteger", rows, self._unsigned(weight, shape, laid), zero, self.constants.number("u8", 128)
        )

    def _scaled_matrix(
        self,
        input: Input,
        rows: onnx_ir.Value,
        weight: Weight,
        tape: Tape,
        numbers: tuple[Array, Array],
        *,
        shape: tuple[int, ...],
        laid: Callable[[Array], Array],
    ) -> onnx_ir.Value:
        """Sums times factors plus summands in f32, while they are at hand: ONNX Runtime's own operator."""
        number = self.constants.number
        if weight.is_signed_for(input):
            codes, zero = self._signed(weight, shape, laid, tape), number("i8", 0)
        else:
            codes, zero = self._unsigned(weight, shape, laid), number("u8", 128)
        factor, summand = (
            self.constants.array(f"{weight.value.name}.{key}", one)
            for key, one in zip(("factor", "summand"), numbers, strict=True)
        )
        operands = [rows, codes, number("f32", 1.0), factor, number("u8", input.zero), zero, summand]
        return tape.runtime_op("MatMulIntegerToFloat", *operands)

    def _unsigned(self, weight: Weight, shape: tuple[int, ...], laid: Callable[[Array], Array]) -> onnx_ir.Value:
        """The codes plus 128, ``laid`` out as ``shape``: u8."""
        import onnx_ir as ir

        made: onnx_ir.Value = self.constants.initializer(
            weight.value,
            f"u8.{'x'.join(map(str, shape))}",
            ir.DataType.UINT8,
            shape,
            lambda: laid(weight.codes).astype(np.uint8) ^ np.uint8(128),
        )
        return made

    def _signed(
        self, weight: Weight, shape: tuple[int, ...], laid: Callable[[Array], Array], tape: Tape
    ) -> onnx_ir.Value:
        """The codes i8, ``laid`` out as ``shape``; in the file four bits each where these hold them."""
        import ml_dtypes
        import onnx_ir as ir

        what = "x".join(map(str, shape))
        if not weight.is_narrow:
            made: onnx_ir.Value = self.constants.initializer(
                weight.value, f"i8.{what}", ir.DataType.INT8, shape, lambda: laid(weight.codes)
            )
            return made
        packed = self.constants.initializer(
            weight.value, f"i4.{what}", ir.DataType.INT4, shape, lambda: laid(weight.codes).astype(ml_dtypes.int4)
        )
        return tape.op("Cast", packed, to=int(ir.DataType.INT8))

    def _under_taps(
        self, pixels: onnx_ir.Value, taps: Sequence[int], stride: Sequence[int], dilation: Sequence[int], tape: Tape
    ) -> onnx_ir.Value:
        """Of pixels (N, H, W, C) those under each tap: (N, H', W', kh*kw*C)."""
        if tuple(taps) == tuple(stride) == (1, 1):
            return pixels
        number = self.constants.number
        axes, steps = number("i64", [1, 2]), number("i64", stride)
        parts = []
        for place in product(*map(range, taps)):
            first = [tap * gap for tap, gap in zip(place, dilation, strict=True)]
            left = [(count - 1 - tap) * gap for tap, count, gap in zip(place, taps, dilation, strict=True)]
            ends = number("i64", [-rest or _END for rest in left])
            parts.append(tape.op("Slice", pixels, number("i64", first), ends, axes, steps))
        return tape.op("Concat", *parts, axis=3) if len(parts) > 1 else parts[0]


def _window(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> dict[str, Any]:
    return {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
