"""Integer layers in ONNX, to the same bits as their references, on machines with VNNI and without.

    linear_i8i8   Cast(u8), BitwiseXor(128), MatMulInteger(u8 x u8, both zero points 128), Add(bias), requantized
    conv2d_i8i8   the same on patches: Transpose to channels last, Pad, a Slice a tap, Concat;
                  of few channels, or in groups, ConvInteger(u8 x u8, both zero points 128)
    requantize    Cast(f64), Mul(b / 2**c), Clip, Add(0.5), Floor, Cast(i8)

Products of u8 and i8 saturate on a machine without VNNI; those of u8 and u8 never do, and those of i8 and i8 are slow.
Why these forms, and how fast they are: docs/decisions/007-onnx-integers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from intarsia.backends.onnx_weights import Tape, Weights, constant, value_of

if TYPE_CHECKING:
    import onnx_ir

EXACT_SHIFT = 45
"""Up to this shift c all that does not saturate is exact in f64: |x b| < 2**(c + 8) = 2**53."""

FEW_CHANNELS = 32
"""Below, copying patches costs more than a product with weights packed once saves: 10.2 ms against 4.6 with 3 channels,
1.9 against 2.8 with 512 (docs/decisions/007)."""

_END = 2**31 - 1
"""Of an axis, however long it is."""


class IntegerWeights(Weights):
    """Lays out the weights of all layers; those of integer layers as u8, with 128 for zero."""

    def spellings(self) -> Mapping[str, Callable[[onnx_ir.Node, Tape], onnx_ir.Value]]:
        """What writes each call of the private domain on the tape and gives its answer."""
        return {
            **super().spellings(),
            "linear_i8i8": self.linear,
            "conv2d_i8i8": self.convolution,
            "requantize": self.requantized,
        }

    def linear(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Input i8 (..., C) times weight (R, C) transposed: i8 (..., R)."""
        weight = value_of(node, 1)
        rows, columns = constant(weight).shape.numpy()
        matrix = self._unsigned(weight, (columns, rows), lambda codes: codes.T)
        total = self._product("MatMulInteger", tape, self._shifted(value_of(node, 0), tape), matrix)
        return self._finished(node, tape, total, after=0)

    def convolution(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Input i8 (N, C, H, W) with weight (O, C/groups, kh, kw): i8 (N, O, H', W')."""
        stride, padding, dilation = (node.attributes[key].as_ints() for key in ("stride", "padding", "dilation"))
        weight, groups = value_of(node, 1), node.attributes["groups"].as_int()
        outputs, channels, *taps = constant(weight).shape.numpy()
        if groups > 1 or channels < FEW_CHANNELS:
            codes = self._unsigned(weight, (outputs, channels, *taps), lambda codes: codes)
            window = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
            total = self._product("ConvInteger", tape, self._shifted(value_of(node, 0), tape), codes, **window)
            return self._finished(node, tape, total, after=2)
        shape = (channels * taps[0] * taps[1], outputs)
        matrix = self._unsigned(weight, shape, lambda codes: codes.transpose(2, 3, 1, 0).reshape(shape))
        pixels = self._shifted(tape.op("Transpose", value_of(node, 0), perm=[0, 2, 3, 1]), tape)
        if any(padding):
            edges = self._number("i64", [0, *padding, 0, 0, *padding, 0])
            pixels = tape.op("Pad", pixels, edges, self._number("u8", 128))
        patches = self._patches(pixels, taps, stride, dilation, tape)
        total = self._product("MatMulInteger", tape, patches, matrix)
        return tape.op("Transpose", self._finished(node, tape, total, after=0), perm=[0, 3, 1, 2])

    def requantized(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Input i32 times the dyadic numbers of its axis: i8."""
        input, axis = value_of(node, 0), node.attributes["axis"].as_int()
        assert input.shape is not None
        after = len(input.shape) - 1 - axis % len(input.shape)
        return self._scaled(input, value_of(node, 1), value_of(node, 2), tape, after=after)

    def _unsigned(self, weight: onnx_ir.Value, shape: tuple[int, ...], laid: Callable[[Any], Any]) -> onnx_ir.Value:
        """The codes of ``weight``, ``laid`` out as ``shape``, plus 128: u8."""
        import numpy as np
        import onnx_ir as ir

        tensor = constant(weight)
        what = f"u8.{'x'.join(map(str, shape))}"
        return self.initializer(
            weight, what, ir.DataType.UINT8, shape, lambda: laid(tensor.numpy()).astype(np.uint8) ^ np.uint8(128)
        )

    def _shifted(self, codes: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """Codes i8 plus 128: u8."""
        import onnx_ir as ir

        return tape.op("BitwiseXor", tape.op("Cast", codes, to=int(ir.DataType.UINT8)), self._number("u8", 128))

    def _product(
        self, op_type: str, tape: Tape, input: onnx_ir.Value, weight: onnx_ir.Value, **window: Any
    ) -> onnx_ir.Value:
        """Sums i32 of the products of what both stand for."""
        zero = self._number("u8", 128)
        return tape.op(op_type, input, weight, zero, zero, **window)

    def _patches(
        self, pixels: onnx_ir.Value, taps: Sequence[int], stride: Sequence[int], dilation: Sequence[int], tape: Tape
    ) -> onnx_ir.Value:
        """Of pixels (N, H, W, C) those under each tap: (N, H', W', kh*kw*C)."""
        if tuple(taps) == tuple(stride) == (1, 1):
            return pixels
        axes, steps = self._number("i64", [1, 2]), self._number("i64", stride)
        parts = []
        for place in product(*map(range, taps)):
            first = [tap * gap for tap, gap in zip(place, dilation, strict=True)]
            left = [(count - 1 - tap) * gap for tap, count, gap in zip(place, taps, dilation, strict=True)]
            ends = self._number("i64", [-rest or _END for rest in left])
            parts.append(tape.op("Slice", pixels, self._number("i64", first), ends, axes, steps))
        return tape.op("Concat", *parts, axis=3) if len(parts) > 1 else parts[0]

    def _finished(self, node: onnx_ir.Node, tape: Tape, total: onnx_ir.Value, *, after: int) -> onnx_ir.Value:
        """The sums i32 plus the bias, requantized along the axis that has ``after`` axes behind it: i8."""
        if len(node.inputs) > 4:
            bias = value_of(node, 4)
            spread = self._number("i64", [-1, *[1] * after])
            total = tape.op("Add", total, tape.op("Reshape", bias, spread) if after else bias)
        return self._scaled(total, value_of(node, 2), value_of(node, 3), tape, after=after)

    def _scaled(
        self, total: onnx_ir.Value, multiplier: onnx_ir.Value, shift: onnx_ir.Value, tape: Tape, *, after: int
    ) -> onnx_ir.Value:
        """Sums i32 times multiplier / 2**shift, rounded half up and clipped to i8."""
        import numpy as np
        import onnx_ir as ir

        b, c = (constant(value).numpy().astype(np.int64).reshape(-1, *[1] * after) for value in (multiplier, shift))
        name = f"{multiplier.name}.{shift.name}.{after}"
        types = ir.DataType
        if c.max(initial=0) <= EXACT_SHIFT:
            factor = self._array(f"{name}.factor", np.ldexp(b.astype(np.float64), -c))
            real = tape.op("Mul", tape.op("Cast", total, to=int(types.DOUBLE)), factor)
            real = tape.op("Clip", real, self._number("f64", -128), self._number("f64", 127))
            real = tape.op("Floor", tape.op("Add", real, self._number("f64", 0.5)))
            return tape.op("Cast", real, to=int(types.INT8))
        # BitShift is for unsigned numbers: 2**62 makes every product one, and is taken off again after the shift.
        whole = tape.op("Mul", tape.op("Cast", total, to=int(types.INT64)), self._array(f"{name}.multiplier", b))
        whole = tape.op("Add", whole, self._array(f"{name}.half", (1 << (c - 1)) + (1 << 62)))
        whole = tape.op("Cast", whole, to=int(types.UINT64))
        whole = tape.op("BitShift", whole, self._array(f"{name}.shift", c.astype(np.uint64)), direction="RIGHT")
        whole = tape.op("Cast", whole, to=int(types.INT64))
        whole = tape.op("Sub", whole, self._array(f"{name}.offset", np.int64(1) << (62 - c)))
        whole = tape.op("Clip", whole, self._number("i64", -128), self._number("i64", 127))
        return tape.op("Cast", whole, to=int(types.INT8))

    def _number(self, dtype: str, number: float | Sequence[int]) -> onnx_ir.Value:
        """A number or a short list of them, once however often it is used."""
        import numpy as np

        kinds = {"u8": np.uint8, "i64": np.int64, "f64": np.float64}
        text = str(number).replace(" ", "")
        return self._array(f"{dtype}.{text}", np.array(number, kinds[dtype]))

    def _array(self, name: str, array: Any) -> onnx_ir.Value:
        import onnx_ir as ir

        key = (name, "array")
        if key not in self.made:
            self.made[key] = self.register(name, ir.tensor(array))
        return self.made[key]
