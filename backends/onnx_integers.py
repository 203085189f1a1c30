"""Integer operators in ONNX, to the same bits as their definition, on machines with VNNI and without.

    conv2d_i8i8      QLinearConv, where its factors in f32 are proved to give what is defined (``onnx_exact``); else
                     MatMulInteger of patches, channels last; of few channels, or in groups, ConvInteger; requantized
    linear_i8i8      MatMulInteger, requantized; both MatMulIntegerToFloat, Clip, Floor where f32 loses nothing
    requantize       QuantizeLinear where its division is proved to be exact; else
                     Cast, Mul, Add, Clip, Cast: in f32 where that is proved to be exact, else in f64, else in i64
    add_requantized  QLinearAdd of 8 bits, where that is proved to be exact; Add, Clip of integers of one grid in f32;
                     else as ``requantize`` of each, Floor, then Add, Clip

Products of u8 and i8 are summed in pairs of 16 bits on a machine without VNNI. They are used where no pair can leave
them; else the weight is u8 too. Why these forms, and how fast they are: docs/decisions/007-onnx-integers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from intarsia.backends.onnx_codes import Codes, Form
from intarsia.backends.onnx_dyadic import Dyadic, Term
from intarsia.backends.onnx_exact import SINGLE, Scaling, lossless, whole_scale, whole_sum
from intarsia.backends.onnx_products import Input, Products, Weight
from intarsia.backends.onnx_weights import Tape, Weights, constant, value_of

if TYPE_CHECKING:
    import onnx_ir

    from intarsia.ir.graph import Graph

FEW_CHANNELS = 32
"""Below, copying patches costs more than a product with weights packed once saves: 10.2 ms against 4.6 with 3 channels,
1.9 against 2.8 with 512 (docs/decisions/007)."""


class IntegerWeights(Weights):
    """Lays out the weights of all layers, and writes integer operators."""

    def __init__(self, target: onnx_ir.Graph, graph: Graph) -> None:
        super().__init__(target, graph)
        self.codes = Codes(self)
        self.dyadic = Dyadic(self)
        self.products = Products(self)

    def spellings(self) -> Mapping[str, Callable[[onnx_ir.Node, Tape], onnx_ir.Value]]:
        """What writes each call of the private domain on the tape and gives its answer."""
        return {
            **super().spellings(),
            "linear_i8i8": self.linear,
            "conv2d_i8i8": self.convolution,
            "requantize": self.requantized,
            "add_requantized": self.added,
            "avg_pool2d_i8": self.averaged,
            "quantize_static": self.quantized,
        }

    def linear(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Input i8 (..., C) times weight (R, C) transposed, requantized: (..., R)."""
        weight, input = self._weight(node), self._input(node, tape, last=False)
        scaling = self._layer(node, weight, input)
        form = self.dyadic.result(scaling)
        if (numbers := self._lossless(node, scaling, form)) is not None:
            self.dyadic.opened(self.products.linear(input, weight, tape, numbers), form, tape, last=False)
        else:
            self._finish(node, tape, self.products.linear(input, weight, tape), scaling, form, after=0, last=False)
        return self.codes.answer(form, _dtype(node), tape)

    def convolution(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Input i8 (N, C, H, W) with weight (O, C/groups, kh, kw), requantized: (N, O, H', W')."""
        weight, groups = self._weight(node), node.attributes["groups"].as_int()
        window: dict[str, Any] = {key: node.attributes[key].as_ints() for key in ("stride", "padding", "dilation")}
        input = self._input(node, tape, last=self.codes.is_last(value_of(node, 0)))
        scaling = self._layer(node, weight, input)
        form = self.dyadic.result(scaling)
        if (factors := self._whole(node, scaling, form)) is not None:
            input = self._input(node, tape, last=False)
            window = {**window, "bias": self._bias(node), "factors": factors, "output_zero": form.zero}
            codes = self.products.whole_convolution(input, weight, tape, **window, groups=groups)
            form.unsigned[False] = self._clipped(codes, form, tape)
        elif groups == 1 and weight.codes.shape[1] >= FEW_CHANNELS:
            numbers = self._lossless(node, scaling, form)
            window["numbers"] = numbers
            total = self.products.patches(self._input(node, tape, last=True), weight, tape, **window)
            if numbers is not None:
                self.dyadic.opened(total, form, tape, last=True)
            else:
                self._finish(node, tape, total, scaling, form, after=0, last=True)
        else:
            input = self._input(node, tape, last=False)
            total = self.products.convolution(input, weight, tape, **window, groups=groups)
            self._finish(node, tape, total, scaling, form, after=2, last=False)
        return self.codes.answer(form, _dtype(node), tape)

    def requantized(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Integers times the dyadic numbers of their axis, or of all."""
        input, axis = value_of(node, 0), node.attributes["axis"].as_int()
        assert input.shape is not None
        b, c = (constant(value_of(node, index)).numpy() for index in (1, 2))
        last = self.codes.is_last(input)
        after = len(input.shape) - 1 - axis % len(input.shape) if len(b) > 1 else 0
        if last and len(b) > 1:
            after = (3, 0, 2, 1)[axis % 4]
        whole, zero = self.codes.whole(input, tape, last=last)
        low, high = self.codes.ends(input)
        scaling = Scaling.of(b, c, -zero, (low + zero, high + zero), _ends(node))
        form = self.dyadic.result(scaling)
        real = self._is_single(input) and not zero
        if not (real and self.dyadic.divided(whole, scaling, form, tape, last=last)):
            self.dyadic.scaled(whole, scaling, form, _names(node, 1, 2), tape, after=after, last=last)
        return self.codes.answer(form, _dtype(node), tape)

    def added(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Two tensors of integers, each times its dyadic number."""
        operands = [value_of(node, 0), value_of(node, 1)]
        last = any(map(self.codes.is_last, operands))
        if (form := self._added_narrow(node, operands, tape, last=last)) is not None:
            return self.codes.answer(form, _dtype(node), tape)
        terms = []
        for operand, index in zip(operands, (2, 4), strict=True):
            whole, zero = self.codes.whole(operand, tape, last=last)
            b, c = (constant(value_of(node, index + more)).numpy() for more in (0, 1))
            low, high = self.codes.ends(operand)
            reach = (low + zero, high + zero)
            terms.append((whole, Scaling.of(b, c, -zero, reach, (0, 0)), _names(node, index, index + 1)))
        low, high = _ends(node)
        form = Form(low, high, max(0, -low))
        if not self._added_alike(operands, terms, form, tape, last=last):
            self.dyadic.added(terms, form, tape, last=last)
        return self.codes.answer(form, _dtype(node), tape)

    def _added_narrow(
        self, node: onnx_ir.Node, operands: list[onnx_ir.Value], tape: Tape, *, last: bool
    ) -> Form | None:
        """The sum of two tensors of 8 bits by one operator; None where that is not proved to be exact."""
        import onnx_ir as ir

        low, high = _ends(node)
        form = Form(low, high, max(0, -low))
        if form.high + form.zero > 255 or any(operand.dtype != ir.DataType.INT8 for operand in operands):
            return None
        one, other = (
            Scaling.of(
                constant(value_of(node, place)).numpy(),
                constant(value_of(node, place + 1)).numpy(),
                0,
                reach,
                (low, high),
            )
            for place, reach in zip((2, 4), map(self.codes.ends, operands), strict=True)
        )
        if (scales := whole_sum(one, other, (low, high), form.zero)) is None:
            return None
        given: list[onnx_ir.Value] = []
        for operand, scale in zip(operands, scales, strict=True):
            codes, zero = self.codes.unsigned(operand, tape, last=last)
            given += [codes, self.number("f32", scale), self.number("u8", zero)]
        total = tape.runtime_op("QLinearAdd", *given, self.number("f32", 1.0), self.number("u8", form.zero))
        form.unsigned[last] = self._clipped(total, form, tape)
        return form

    def _added_alike(
        self, operands: list[onnx_ir.Value], terms: list[Term], form: Form, tape: Tape, *, last: bool
    ) -> bool:
        """Whether both operands and the sum are on one grid, in f32, so that they are simply added."""
        ends = [self.codes.ends(one) for one in operands]
        alike = all((scaling.multiplier == 1 << scaling.shift).all() for _, scaling, _ in terms)
        largest = sum(max(-low, high) for low, high in ends)
        if not alike or largest >= SINGLE or form.high + form.zero <= 255 or not all(map(self._is_single, operands)):
            return False
        values = [whole for whole, _, _ in terms]
        for index, (operand, other) in enumerate(zip(operands, reversed(ends), strict=True)):
            real, own = self.codes.open(operand, tape, last=last), ends[index]
            # What the operand's own ends clip off is beyond the sum's ends too.
            if real is not None and own[1] + other[0] >= form.high and own[0] + other[1] <= form.low:
                values[index] = real
                self.dyadic.added_alike(values, form, tape, last=last, open=True)
                return True
        self.dyadic.added_alike(values, form, tape, last=last, open=False)
        return True

    def averaged(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Sums over windows of (N, C, H, W), times a dyadic number."""
        input = value_of(node, 0)
        b, c = (constant(value_of(node, index)).numpy() for index in (1, 2))
        kernel, stride, padding = (node.attributes[key].as_ints() for key in ("kernel_size", "stride", "padding"))
        terms = kernel[0] * kernel[1]
        low, high = self.codes.ends(input)
        total = self.products.sums(input, kernel, stride, padding, tape)
        reach = (min(low, 0) * terms, max(high, 0) * terms)
        scaling = Scaling.of(b, c, 0, reach, _ends(node))
        form = self.dyadic.result(scaling)
        self.dyadic.scaled(total, scaling, form, _names(node, 1, 2), tape, after=2 * (len(b) > 1), last=False)
        return self.codes.answer(form, _dtype(node), tape)

    def quantized(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Floats divided in f32 and rounded: in pieces, as ONNX Runtime puts kernels that round otherwise in the place
        of what stands between DequantizeLinear and QuantizeLinear."""
        import onnx_ir as ir

        low, high = _ends(node)
        real = tape.op("Cast", value_of(node, 0), to=int(ir.DataType.FLOAT))
        real = tape.op("Round", tape.op("Div", real, self.number("f32", node.attributes["scale"].as_float())))
        form = Form(low, high, max(0, -low))
        form.real[False] = tape.op("Clip", real, self.number("f32", low), self.number("f32", high))
        if form.high + form.zero <= 255:
            moved = form.real.pop(False)
            moved = tape.op("Add", moved, self.number("f32", form.zero)) if form.zero else moved
            form.unsigned[False] = tape.op("Cast", moved, to=int(ir.DataType.UINT8))
        return self.codes.answer(form, _dtype(node), tape)

    def number(self, dtype: str, number: float | Sequence[int]) -> onnx_ir.Value:
        """A number or a short list of them, once however often it is used."""
        import numpy as np

        kinds = {"u8": np.uint8, "i8": np.int8, "i32": np.int32, "i64": np.int64, "f32": np.float32, "f64": np.float64}
        text = str(number).replace(" ", "")
        return self.array(f"{dtype}.{text}", np.array(number, kinds[dtype]))

    def array(self, name: str, array: Any) -> onnx_ir.Value:
        """An initializer of about this name, once however often these numbers are used."""
        import onnx_ir as ir

        key = (name, f"{array.dtype}.{array.shape}.{sha256(array.tobytes()).hexdigest()}")
        if key not in self.made:
            count = sum(one == name for one, _ in self.made)
            self.made[key] = self.register(f"{name}.{count + 1}" if count else name, ir.tensor(array))
        return self.made[key]

    def _weight(self, node: onnx_ir.Node) -> Weight:
        value = value_of(node, 1)
        return Weight(value, constant(value).numpy())

    def _input(self, node: onnx_ir.Node, tape: Tape, *, last: bool) -> Input:
        value = value_of(node, 0)
        found, zero = self.codes.unsigned(value, tape, last=last)
        return Input(found, zero, *self.codes.ends(value))

    def _bias(self, node: onnx_ir.Node) -> onnx_ir.Value | None:
        return value_of(node, _BIAS) if len(node.inputs) > _BIAS else None

    def _layer(self, node: onnx_ir.Node, weight: Weight, input: Input) -> Scaling:
        """What becomes of the sums of a layer, and of its bias, where it is constant."""
        b, c = (constant(value_of(node, index)).numpy() for index in (2, 3))
        bias = self._bias(node)
        if bias is None:
            return Scaling.of(b, c, 0, weight.reach(input), _ends(node))
        if bias.const_value is None:
            return Scaling.of(b, c, 0, (-(1 << 31), (1 << 31) - 1), _ends(node))
        return Scaling.of(b, c, bias.const_value.numpy(), weight.reach(input), _ends(node))

    def _lossless(self, node: onnx_ir.Node, scaling: Scaling, form: Form) -> Any:
        """Factors and summands f32 that lose nothing; None where there are none, or u8 holds the result."""
        bias = self._bias(node)
        if (bias is not None and bias.const_value is None) or form.high + form.zero <= 255:
            return None
        return lossless(scaling, 0)

    def _is_single(self, value: onnx_ir.Value) -> bool:
        """Whether the tensor is there as whole numbers in f32."""
        form = self.codes.forms.get(value)
        return form is not None and bool(form.real) and form.kind == "f32"

    def _whole(self, node: onnx_ir.Node, scaling: Scaling, form: Form) -> Any:
        """Factors of an operator that multiplies and requantizes at once; None if there are none."""
        bias = self._bias(node)
        if (bias is not None and bias.const_value is None) or form.high + form.zero > 255:
            return None
        return whole_scale(scaling, form.zero)

    def _finish(
        self,
        node: onnx_ir.Node,
        tape: Tape,
        total: onnx_ir.Value,
        scaling: Scaling,
        form: Form,
        *,
        after: int,
        last: bool,
    ) -> None:
        """Sums i32, with the bias, times the dyadic numbers of the axis that has ``after`` axes behind it."""
        names = _names(node, *range(2, len(node.inputs)))
        self.dyadic.scaled(total, scaling, form, names, tape, after=after, last=last, bias=self._bias(node))

    def _clipped(self, codes: onnx_ir.Value, form: Form, tape: Tape) -> onnx_ir.Value:
        """The codes u8 of an operator that saturates at the ends of u8, at those of ``form``."""
        low, high = form.low + form.zero, form.high + form.zero
        if (low, high) == (0, 255):
            return codes
        return tape.op("Clip", codes, self.number("u8", low), self.number("u8", high))


_BIAS = 4
"""Place of a layer's bias, which is left out where there is none."""


def _ends(node: onnx_ir.Node) -> tuple[int, int]:
    return node.attributes["low"].as_int(), node.attributes["high"].as_int()


def _names(node: onnx_ir.Node, *places: int) -> str:
    return ".".join(str(value_of(node, place).name) for place in places)


def _dtype(node: onnx_ir.Node) -> Any:
    """Of the call's answer, by its ends."""
    import onnx_ir as ir

    low, high = _ends(node)
    types = ((8, ir.DataType.INT8), (16, ir.DataType.INT16), (32, ir.DataType.INT32))
    return next(dtype for bits, dtype in types if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1))
