"""Integers on a grid between two calls of ours, in the form in which the next one reads them.

What our calls give is i8, i16 or i32, rows of a picture last. Between two of them that would be three passes over
memory for nothing: to i8, to u8 with another zero point, and channels last. So each call leaves its answer in the form
in which it comes about, beside what every other operator reads, which goes where nobody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from intarsia.backends.onnx_weights import Tape

if TYPE_CHECKING:
    import onnx_ir

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
"""Axes of a picture (N, C, H, W) with its channels last, and back."""

_ALIKE = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Identity"}
)
"""Operators whose result is made of the numbers of their first operand."""


@dataclass
class Form:
    """One tensor of integers low..high.

    Attributes:
        unsigned: As u8, plus ``zero``, by whether channels are last.
        real: As whole numbers in f32 or f64, by whether channels are last.
        kind: Element type of ``real``.
        open: As f32 that are neither clipped nor rounded down yet, by whether channels are last.
    """

    low: int
    high: int
    zero: int = 0
    unsigned: dict[bool, onnx_ir.Value] = field(default_factory=dict)
    real: dict[bool, onnx_ir.Value] = field(default_factory=dict)
    kind: str = "f32"
    open: dict[bool, onnx_ir.Value] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether it came about with channels last alone."""
        return not any(False in known for known in (self.unsigned, self.real))


class Codes:
    """The forms of all tensors of integers in a model, made where they are first asked for."""

    def __init__(self, constants: Any) -> None:
        self.constants = constants
        self.forms: dict[onnx_ir.Value, Form] = {}

    def ends(self, value: onnx_ir.Value) -> tuple[int, int]:
        """Integers between which all of the tensor certainly lie."""
        if value in self.forms:
            return self.forms[value].low, self.forms[value].high
        node = value.producer()
        parts = [] if node is None else _parts(node)
        if node is not None and parts:
            low, high = min(self.ends(one)[0] for one in parts), max(self.ends(one)[1] for one in parts)
            if node.op_type == "Relu":
                return max(low, 0), max(high, 0)
            return (min(low, 0), max(high, 0)) if node.op_type == "Pad" else (low, high)
        bits = {"INT8": 8, "INT16": 16}.get(value.dtype.name if value.dtype else "", 32)
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def is_last(self, value: onnx_ir.Value) -> bool:
        """Whether the tensor is there with channels last alone."""
        return value in self.forms and self.forms[value].is_last

    def unsigned(self, value: onnx_ir.Value, tape: Tape, *, last: bool) -> tuple[onnx_ir.Value, int]:
        """The tensor as u8, and what stands for zero there; for integers that u8 holds."""
        import onnx_ir as ir

        form = self._form(value)
        known = form.unsigned
        if not known:
            codes = tape.op("Cast", value, to=int(ir.DataType.UINT8))
            form.zero = 128 if form.low < 0 else 0
            known[False] = tape.op("BitwiseXor", codes, self.constants.number("u8", 128)) if form.zero else codes
        return self._turned(known, tape, last=last), form.zero

    def whole(self, value: onnx_ir.Value, tape: Tape, *, last: bool) -> tuple[onnx_ir.Value, int]:
        """The tensor in whatever it is there, and what stands for zero in that: u8, a signed integer or a float."""
        form = self._form(value)
        if form.real:
            return self._turned(form.real, tape, last=last), 0
        if form.unsigned:
            return self._turned(form.unsigned, tape, last=last), form.zero
        return (tape.op("Transpose", value, perm=LAST) if last else value), 0

    def open(self, value: onnx_ir.Value, tape: Tape, *, last: bool) -> onnx_ir.Value | None:
        """The tensor before it is clipped and rounded down, if it is there so."""
        form = self.forms.get(value)
        return self._turned(form.open, tape, last=last) if form and form.open else None

    def answer(self, form: Form, dtype: onnx_ir.DataType, tape: Tape) -> onnx_ir.Value:
        """The tensor as all operators read it, remembered with its form."""
        import onnx_ir as ir

        if form.real:
            codes = self._turned(dict(form.real), tape, last=False)
        else:
            codes = self._turned(dict(form.unsigned), tape, last=False)
            if form.zero == 128 and dtype == ir.DataType.INT8:
                codes = tape.op("BitwiseXor", codes, self.constants.number("u8", 128))
            elif form.zero:
                codes = tape.op("Cast", codes, to=int(ir.DataType.INT32))
                codes = tape.op("Sub", codes, self.constants.number("i32", form.zero))
        made = tape.op("Cast", codes, to=int(dtype))
        self.forms[made] = form
        return made

    def _form(self, value: onnx_ir.Value) -> Form:
        if value not in self.forms:
            self.forms[value] = Form(*self.ends(value))
        return self.forms[value]

    def _turned(self, known: dict[bool, onnx_ir.Value], tape: Tape, *, last: bool) -> onnx_ir.Value:
        if last not in known:
            known[last] = tape.op("Transpose", known[not last], perm=LAST if last else FIRST)
        return known[last]


def _parts(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """The operands whose numbers, and zeros of a Pad and a Relu, the result is made of; none if of others too."""
    if node.op_type == "Concat":
        return [one for one in node.inputs if one is not None]
    if node.op_type == "Pad":
        filled = node.inputs[2] if len(node.inputs) > 2 else None
        if filled is not None and (filled.const_value is None or filled.const_value.numpy().any()):
            return []
    elif node.op_type not in (*_ALIKE, "Relu"):
        return []
    return [one for one in node.inputs[:1] if one is not None]
