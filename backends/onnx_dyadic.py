"""Integers times dyadic numbers in ONNX: in f32 or f64 where that is exact, in i64 where it is not.

floor((x + bias) * b / 2**c + 1/2) clipped is Cast, Mul(b / 2**c), Add(bias * b / 2**c + 1/2), Clip, Floor. Where u8
holds the result, the sum is moved until nothing is negative, and the cast to u8 is the floor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from intarsia.backends.onnx_codes import Form
from intarsia.backends.onnx_exact import DOUBLE, SINGLE, Scaling, affine, divided, exact_affine
from intarsia.backends.onnx_weights import Tape

if TYPE_CHECKING:
    import onnx_ir

Term = tuple["onnx_ir.Value", Scaling, str]
"""Integers in any type, what becomes of them, and what the initializers of that are called after."""


class Dyadic:
    """Writes dyadic numbers; ``constants`` gives initializers."""

    def __init__(self, constants: Any) -> None:
        self.constants = constants

    def result(self, scaling: Scaling) -> Form:
        """The form, still empty, of what becomes of integers."""
        return Form(scaling.low, scaling.high, max(0, -scaling.low))

    def scaled(
        self,
        x: onnx_ir.Value,
        scaling: Scaling,
        form: Form,
        name: str,
        tape: Tape,
        *,
        after: int,
        last: bool,
        bias: onnx_ir.Value | None = None,
    ) -> None:
        """Put what becomes of ``x`` into ``form``, scaled along the axis that has ``after`` axes behind it.

        ``bias`` is the scaling's bias as an initializer, for the forms that add it in integers.
        """
        import onnx_ir as ir

        narrow = form.high + form.zero <= 255
        offset = form.zero if narrow else 0
        found = affine(scaling, offset) if bias is None or bias.const_value is not None else None
        kind = "f32"
        if found is None:
            kind = "f64"
            if scaling.bits <= DOUBLE and (bias is None or bias.const_value is not None):
                found = exact_affine(scaling, offset)
            else:
                x = self._with_bias(x, scaling, bias, tape, after=after)
                scaling = Scaling.of(
                    scaling.multiplier, scaling.shift, 0, (-(1 << 31), (1 << 31) - 1), (scaling.low, scaling.high)
                )
                if min(scaling.bits, scaling.saturating_bits) > DOUBLE:
                    whole = self._in_integers(x, scaling, name, tape, after=after)
                    ends = (self.constants.number("i64", end) for end in (form.low, form.high))
                    form.real[last], form.kind = tape.op("Clip", whole, *ends), "i64"
                    return
                found = exact_affine(scaling, offset)
        real = self._affine(x, found, f"{name}.{after}.{offset}", kind, tape, after=after)
        real = tape.op("Clip", real, *(self.constants.number(kind, end + offset) for end in (form.low, form.high)))
        if narrow:
            form.unsigned[last] = tape.op("Cast", real, to=int(ir.DataType.UINT8))
        else:
            form.real[last], form.kind = tape.op("Floor", real), kind

    def opened(self, real: onnx_ir.Value, form: Form, tape: Tape, *, last: bool) -> None:
        """Put f32 that are to be clipped and rounded down into ``form``."""
        form.open[last] = real
        clipped = tape.op("Clip", real, *(self.constants.number("f32", end) for end in (form.low, form.high)))
        form.real[last] = tape.op("Floor", clipped)

    def divided(self, x: onnx_ir.Value, scaling: Scaling, form: Form, tape: Tape, *, last: bool) -> bool:
        """Whether one division and rounding gives what becomes of whole numbers ``x`` in f32, put into ``form``."""
        if form.high + form.zero > 255 or (divisor := divided(scaling)) is None:
            return False
        number = self.constants.number
        codes = tape.op("QuantizeLinear", x, number("f32", divisor), number("u8", form.zero))
        reached = scaling.unclipped(np.stack([scaling.lowest, scaling.highest], axis=1))
        if (reached[0, 0] < form.low and form.low + form.zero) or (
            reached[0, 1] > form.high and form.high + form.zero < 255
        ):
            codes = tape.op("Clip", codes, *(number("u8", end + form.zero) for end in (form.low, form.high)))
        form.unsigned[last] = codes
        return True

    def added_alike(self, operands: list[onnx_ir.Value], form: Form, tape: Tape, *, last: bool, open: bool) -> None:
        """Put the sum of f32 of one grid into ``form``; where it is ``open`` it is still to be rounded down."""
        total = tape.op("Add", *operands)
        if open:
            self.opened(total, form, tape, last=last)
            form.open.clear()
        else:
            ends = (self.constants.number("f32", end) for end in (form.low, form.high))
            form.real[last] = tape.op("Clip", total, *ends)

    def added(self, terms: list[Term], form: Form, tape: Tape, *, last: bool) -> None:
        """Put the sum of two tensors, each scaled by one dyadic number and rounded, into ``form``."""
        import onnx_ir as ir

        kind, parts = self._terms(terms, tape)
        narrow = form.high + form.zero <= 255
        total = tape.op("Add", *parts)
        if narrow and form.zero and kind != "i64":
            total = tape.op("Add", total, self.constants.number(kind, form.zero))
        offset = form.zero if narrow and kind != "i64" else 0
        total = tape.op("Clip", total, *(self.constants.number(kind, end + offset) for end in (form.low, form.high)))
        if narrow and kind != "i64":
            form.unsigned[last] = tape.op("Cast", total, to=int(ir.DataType.UINT8))
        else:
            form.real[last], form.kind = total, kind

    def _terms(self, terms: list[Term], tape: Tape) -> tuple[str, list[onnx_ir.Value]]:
        """The operands of a sum, rounded, and the element type of both."""
        terms = [(x, _unclipped(scaling), name) for x, scaling, name in terms]
        found = [affine(scaling, 0) for _, scaling, _ in terms]
        kind = "f32"
        largest = sum(max(-scaling.low, scaling.high) for _, scaling, _ in terms)
        if largest >= SINGLE or any(one is None for one in found):
            if any(scaling.bits > DOUBLE for _, scaling, _ in terms):
                return "i64", [
                    self._in_integers(self._with_bias(x, scaling, None, tape, after=0), scaling, name, tape, after=0)
                    for x, scaling, name in terms
                ]
            kind, found = "f64", [exact_affine(scaling, 0) for _, scaling, _ in terms]
        return kind, [
            tape.op("Floor", self._affine(x, numbers, f"{name}.0.0", kind, tape, after=0))
            for (x, _, name), numbers in zip(terms, found, strict=True)
            if numbers is not None
        ]

    def _affine(
        self, x: onnx_ir.Value, numbers: tuple[Any, Any], name: str, kind: str, tape: Tape, *, after: int
    ) -> onnx_ir.Value:
        import onnx_ir as ir

        dtype = {"f32": ir.DataType.FLOAT, "f64": ir.DataType.DOUBLE}[kind]
        real = x if x.dtype == dtype else tape.op("Cast", x, to=int(dtype))
        factor, summand = (one.reshape(-1, *[1] * after) for one in numbers)
        real = tape.op("Mul", real, self.constants.array(f"{name}.{kind}.factor", factor))
        return tape.op("Add", real, self.constants.array(f"{name}.{kind}.summand", summand))

    def _with_bias(
        self, x: onnx_ir.Value, scaling: Scaling, bias: onnx_ir.Value | None, tape: Tape, *, after: int
    ) -> onnx_ir.Value:
        """``x`` i32 with the bias added in integers."""
        import onnx_ir as ir

        if bias is None and not scaling.bias.any():
            return x
        whole = x if x.dtype == ir.DataType.INT32 else tape.op("Cast", x, to=int(ir.DataType.INT32))
        if bias is None:
            return tape.op("Add", whole, self.constants.number("i32", int(scaling.bias[0])))
        spread = self.constants.number("i64", [-1, *[1] * after])
        return tape.op("Add", whole, tape.op("Reshape", bias, spread) if after else bias)

    def _in_integers(self, x: onnx_ir.Value, scaling: Scaling, name: str, tape: Tape, *, after: int) -> onnx_ir.Value:
        """``x`` times multiplier / 2**shift, rounded half up: i64.

        BitShift is for unsigned numbers: 2**62 makes every product one, and is taken off again after the shift.
        """
        import onnx_ir as ir

        name = f"{name}.{after}.i64"
        b, c = (one.reshape(-1, *[1] * after) for one in (scaling.multiplier, scaling.shift))
        arrays = {
            "multiplier": b,
            "half": (np.int64(1) << (c - 1)) + (1 << 62),
            "shift": c.astype(np.uint64),
            "offset": np.int64(1) << (62 - c),
        }
        known = {key: self.constants.array(f"{name}.{key}", array) for key, array in arrays.items()}
        whole = tape.op("Mul", tape.op("Cast", x, to=int(ir.DataType.INT64)), known["multiplier"])
        whole = tape.op("Cast", tape.op("Add", whole, known["half"]), to=int(ir.DataType.UINT64))
        whole = tape.op("BitShift", whole, known["shift"], direction="RIGHT")
        return tape.op("Sub", tape.op("Cast", whole, to=int(ir.DataType.INT64)), known["offset"])


def _unclipped(scaling: Scaling) -> Scaling:
    """The same with ends outside all that comes up, so that nothing is clipped."""
    lowest, highest = (scaling.unclipped(reach[:, None]) for reach in (scaling.lowest, scaling.highest))
    return replace(scaling, low=int(lowest.min()) - 1, high=int(highest.max()) + 1)
