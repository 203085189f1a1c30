"""Integer softmax, norms, functions and products of activations in ONNX, to the same bits as their definition.

apply_table      Gather; of 16 bits BitShift, Gather twice, Mul, Add, Floor in f64, where every digit is kept
integer_softmax  ReduceMax, Sub, Gather, ReduceSum; of a row GreaterOrEqual and ReduceSum for its digits and Newton's
                 steps for its reciprocal; Mul, Add, BitShift, Clip in i64
integer_norm     ReduceSum twice, the root of a row like the reciprocal; Mul, Add, BitShift, Clip in i64
matmul_i8i8      MatMulInteger of u8 and u8, exact with VNNI and without, requantized
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from intarsia.backends.onnx_codes import Form
from intarsia.backends.onnx_exact import Scaling
from intarsia.backends.onnx_operators import private
from intarsia.backends.onnx_weights import Tape, constant, value_of
from intarsia.kernels.integers.golden_islands import FRACTION, NORMED, ONE, SEGMENT

if TYPE_CHECKING:
    import onnx_ir

DIGITS = 62
"""Binary digits of the largest number of which a row's reciprocal or root is taken."""


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx spells the operators: as calls of the private domain."""
    return {
        torch.ops.intarsia.apply_table.default: _apply_table,
        torch.ops.intarsia.integer_softmax.default: _integer_softmax,
        torch.ops.intarsia.integer_norm.default: _integer_norm,
        torch.ops.intarsia.matmul_i8i8.default: _matmul_i8i8,
    }


class Islands:
    """Writes the operators; ``weights`` gives initializers, forms of codes and dyadic numbers."""

    def __init__(self, weights: Any) -> None:
        self.weights, self.codes = weights, weights.codes

    def spellings(self) -> Mapping[str, Callable[[onnx_ir.Node, Tape], onnx_ir.Value]]:
        """What writes each call of the private domain on the tape and gives its answer."""
        return {
            "apply_table": self.applied,
            "integer_softmax": self.softmax,
            "integer_norm": self.norm,
            "matmul_i8i8": self.product,
        }

    def applied(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """The table's entry for each code, or the line between two of them."""
        input, low, high = value_of(node, 0), *_ends(node)
        table = constant(value_of(node, 1)).numpy().astype(np.int64)
        if _bits(input) == 8:
            unsigned, zero = self.codes.unsigned(input, tape, last=False)
            entries = np.clip(table, low, high)[np.clip(np.arange(256) - zero + 128, 0, 255)]
            index = _cast(tape, unsigned, "INT32")
            offset = max(0, -low)
            entries, dtype = (entries + offset, "u8") if high + offset <= 255 else (entries, "i32")
            name = f"{value_of(node, 1).name}.{low}.{high}.{zero}"
            found = self._gathered(entries, dtype, name, index, tape)
            return self._answer(found, node, tape, zero=offset if dtype == "u8" else None)
        place, part = self._split(self._moved(input, tape), SEGMENT, tape)
        unit = 2.0 ** -(SEGMENT + FRACTION)
        base = (table[:-1] * 2**SEGMENT + 2 ** (SEGMENT + FRACTION - 1)) * unit
        slope = np.diff(table) * unit
        name = str(value_of(node, 1).name)
        start = self._gathered(base, "f64", f"{name}.base", place, tape)
        step = self._gathered(slope, "f64", f"{name}.slope", place, tape)
        line = tape.op("Add", start, tape.op("Mul", step, _cast(tape, part, "DOUBLE")))
        rounded = tape.op("Clip", tape.op("Floor", line), *(self.weights.number("f64", end) for end in (low, high)))
        return self._narrowed(rounded, "f64", node, tape)

    def softmax(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Softmax over the last axis."""
        input, table = value_of(node, 0), constant(value_of(node, 1)).numpy().astype(np.int64)
        multiplier, shift = (node.attributes[key].as_int() for key in ("multiplier", "shift"))
        last = self.weights.number("i64", [-1])
        whole = _cast(tape, input, "INT32")
        below = tape.op("Sub", tape.op("ReduceMax", whole, last, keepdims=1), whole)
        name = str(value_of(node, 1).name)
        if _bits(input) == 8:
            powers = self._gathered(table, "i64", f"{name}.i64", below, tape)
        else:
            parts = self._split(below, 8, tape)
            coarse, fine = (
                self._gathered(table[start : start + 256], "i64", f"{name}.{start}", part, tape)
                for start, part in zip((0, 256), parts, strict=True)
            )
            powers = self._down(self._add(tape.op("Mul", coarse, fine), 2 ** (ONE - 1), tape), ONE, tape)
        total = tape.op("ReduceSum", powers, last, keepdims=1)
        length = self._length(total, tape)
        number = self._reciprocal(self._down(total, self._add(length, -31, tape), tape), tape)
        number = self._down(tape.op("Mul", number, self.weights.number("i64", multiplier)), 31, tape)
        digits = tape.op("Min", self._add(length, shift - 1, tape), self.weights.number("i64", 62))
        half = self._power(self._add(digits, -1, tape), tape)
        rounded = self._down(tape.op("Add", tape.op("Mul", powers, number), half), digits, tape)
        return self._narrowed(self._clipped(rounded, node, tape), "i64", node, tape)

    def norm(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Layer norm or RMS norm over the last axis."""
        input, last = value_of(node, 0), self.weights.number("i64", [-1])
        assert input.shape is not None
        weight, bias, shift = (constant(value_of(node, index)).numpy().astype(np.int64) for index in (1, 2, 3))
        count, digits = self.weights.number("i64", len(weight)), int(shift[0])
        whole = _cast(tape, input, "INT64")
        apart = tape.op("Mul", whole, count)
        squares = tape.op("ReduceSum", tape.op("Mul", whole, whole), last, keepdims=1)
        spread = self._add(tape.op("Mul", squares, count), node.attributes["epsilon"].as_int(), tape)
        if node.attributes["centered"].as_int():
            total = tape.op("ReduceSum", whole, last, keepdims=1)
            apart = tape.op("Sub", apart, total)
            spread = tape.op("Sub", spread, tape.op("Mul", total, total))
        half = self._down(self._add(self._length(spread, tape), 1, tape), 1, tape)
        up = tape.op("Sub", self.weights.number("i64", 62), tape.op("Add", half, half))
        root = self._root(self._down(tape.op("Mul", spread, self._power(up, tape)), 31, tape), tape)
        normed = self._rounded(tape.op("Mul", apart, root), self._add(half, ONE - NORMED, tape), tape)
        names = [str(value_of(node, index).name) for index in (1, 2)]
        scaled = tape.op("Mul", normed, self.weights.array(f"{names[0]}.i64", weight))
        moved = tape.op("Add", scaled, self.weights.array(f"{names[1]}.half", bias + (1 << (digits - 1))))
        result = self._signed(moved, self.weights.number("i64", digits), tape)
        return self._narrowed(self._clipped(result, node, tape), "i64", node, tape)

    def product(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Codes (..., M, K) times codes (..., K, N), requantized."""
        values = [value_of(node, index) for index in (0, 1)]
        shape = values[0].shape
        assert shape is not None
        found = [self.codes.unsigned(value, tape, last=False) for value in values]
        zeros = [self.weights.number("u8", zero) for _, zero in found]
        total = tape.op("MatMulInteger", *(value for value, _ in found), *zeros)
        largest = [max(-low, high) for low, high in map(self.codes.ends, values)]
        reach = int(shape[-1]) * largest[0] * largest[1]
        b, c = (np.array([node.attributes[key].as_int()]) for key in ("multiplier", "shift"))
        scaling = Scaling.of(b, c, 0, (-reach, reach), _ends(node))
        form = self.weights.dyadic.result(scaling)
        name = f"number.{b[0]}.{c[0]}"
        self.weights.dyadic.scaled(total, scaling, form, name, tape, after=0, last=False)
        return self.codes.answer(form, node.outputs[0].dtype, tape)

    def _reciprocal(self, x: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """1 / x as ``golden_islands.reciprocal`` has it."""
        found = self._from(
            3031741621, self._down(tape.op("Mul", x, self.weights.number("i64", 2021161080)), 31, tape), tape
        )
        for _ in range(3):
            left = self._down(self._from(2**62, tape.op("Mul", x, found), tape), 31, tape)
            found = self._down(tape.op("Mul", found, left), ONE, tape)
        return found

    def _root(self, x: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """1 / sqrt(x) as ``golden_islands.inverse_root`` has it."""
        found = self._from(
            2290047081, self._down(tape.op("Mul", x, self.weights.number("i64", 1308598332)), 31, tape), tape
        )
        for _ in range(4):
            square = self._down(tape.op("Mul", found, found), ONE, tape)
            left = self._down(self._from(3 * 2**61, tape.op("Mul", x, square), tape), 31, tape)
            found = self._down(tape.op("Mul", found, left), 31, tape)
        return found

    def _length(self, x: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """Binary digits of positive numbers (..., 1)."""
        powers = self.weights.array("powers", np.int64(1) << np.arange(DIGITS))
        reached = _cast(tape, tape.op("GreaterOrEqual", x, powers), "INT64")
        return tape.op("ReduceSum", reached, self.weights.number("i64", [-1]), keepdims=1)

    def _power(self, digits: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """2**digits."""
        one = self.weights.array("u64.1", np.array(1, np.uint64))
        return _cast(tape, tape.op("BitShift", one, _cast(tape, digits, "UINT64"), direction="LEFT"), "INT64")

    def _down(self, x: onnx_ir.Value, digits: onnx_ir.Value | int, tape: Tape) -> onnx_ir.Value:
        """x / 2**digits, rounded down, of numbers that are not negative: BitShift is for unsigned ones."""
        amount = (
            self.weights.array(f"u64.{digits}", np.array(digits, np.uint64))
            if isinstance(digits, int)
            else _cast(tape, digits, "UINT64")
        )
        return _cast(tape, tape.op("BitShift", _cast(tape, x, "UINT64"), amount, direction="RIGHT"), "INT64")

    def _signed(self, x: onnx_ir.Value, digits: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """The same of numbers of either sign from -2**62 on, which is added first and taken off after the shift."""
        moved = self._down(self._add(x, 2**62, tape), digits, tape)
        offset = self._power(tape.op("Sub", self.weights.number("i64", 62), digits), tape)
        return tape.op("Sub", moved, offset)

    def _rounded(self, x: onnx_ir.Value, digits: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """x / 2**digits of numbers of either sign, rounded half up."""
        return self._signed(tape.op("Add", x, self._power(self._add(digits, -1, tape), tape)), digits, tape)

    def _add(self, x: onnx_ir.Value, number: int, tape: Tape) -> onnx_ir.Value:
        return tape.op("Add", x, self.weights.number("i64", number))

    def _from(self, number: int, x: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        return tape.op("Sub", self.weights.number("i64", number), x)

    def _moved(self, input: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        """Codes of 16 bits from 0 on: i32."""
        return tape.op("Add", _cast(tape, input, "INT32"), self.weights.number("i32", 2**15))

    def _split(self, x: onnx_ir.Value, digits: int, tape: Tape) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """x / 2**digits, and what is left, of i32 that are not negative: i32."""
        amount = self.weights.array(f"u32.{digits}", np.array(digits, np.uint32))
        shifted = tape.op("BitShift", _cast(tape, x, "UINT32"), amount, direction="RIGHT")
        rest = tape.op("BitwiseAnd", x, self.weights.number("i32", 2**digits - 1))
        return _cast(tape, shifted, "INT32"), rest

    def _gathered(self, entries: Any, dtype: str, name: str, index: onnx_ir.Value, tape: Tape) -> onnx_ir.Value:
        kinds = {"u8": np.uint8, "i32": np.int32, "i64": np.int64, "f64": np.float64}
        return tape.op("Gather", self.weights.array(f"{name}.{dtype}", entries.astype(kinds[dtype])), index, axis=0)

    def _clipped(self, x: onnx_ir.Value, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        return tape.op("Clip", x, *(self.weights.number("i64", end) for end in _ends(node)))

    def _narrowed(self, x: onnx_ir.Value, kind: str, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Whole numbers between the call's ends as its answer: as u8 too, where they fit."""
        low, high = _ends(node)
        zero = max(0, -low)
        if high + zero > 255:
            return _cast(tape, x, node.outputs[0].dtype.name)
        moved = tape.op("Add", x, self.weights.number(kind, zero)) if zero else x
        return self._answer(_cast(tape, moved, "UINT8"), node, tape, zero=zero)

    def _answer(self, x: onnx_ir.Value, node: onnx_ir.Node, tape: Tape, *, zero: int | None) -> onnx_ir.Value:
        """u8 that ``zero`` was added to, or integers as they are, as the call's answer."""
        dtype = node.outputs[0].dtype
        if zero is None:
            return _cast(tape, x, dtype.name)
        form = Form(*_ends(node), zero)
        form.unsigned[False] = x
        return self.codes.answer(form, dtype, tape)


def _cast(tape: Tape, x: onnx_ir.Value, dtype: str) -> onnx_ir.Value:
    import onnx_ir as ir

    return tape.op("Cast", x, to=int(ir.DataType[dtype]))


def _bits(value: onnx_ir.Value) -> int:
    assert value.dtype is not None
    return 8 if value.dtype.name == "INT8" else 16


def _ends(node: onnx_ir.Node) -> tuple[int, int]:
    return node.attributes["low"].as_int(), node.attributes["high"].as_int()


def _apply_table(input: Any, table: Any, low: int = -128, high: int = 127) -> Any:
    return private("apply_table", ("input", "table"), "low", "high")(input, table, low=low, high=high)


def _integer_softmax(  # noqa: PLR0917
    input: Any, table: Any, multiplier: int, shift: int, low: int = -128, high: int = 127
) -> Any:
    call = private("integer_softmax", ("input", "table"), "multiplier", "shift", "low", "high")
    return call(input, table, multiplier=multiplier, shift=shift, low=low, high=high)


def _integer_norm(  # noqa: PLR0917
    input: Any, weight: Any, bias: Any, shift: Any, epsilon: int, centered: bool, low: int = -128, high: int = 127
) -> Any:
    call = private("integer_norm", ("input", "weight", "bias", "shift"), "epsilon", "centered", "low", "high")
    return call(input, weight, bias, shift, epsilon=epsilon, centered=int(centered), low=low, high=high)


def _matmul_i8i8(  # noqa: PLR0917
    input: Any, other: Any, multiplier: int, shift: int, low: int = -128, high: int = 127
) -> Any:
    call = private("matmul_i8i8", ("input", "other"), "multiplier", "shift", "low", "high")
    return call(input, other, multiplier=multiplier, shift=shift, low=low, high=high)
