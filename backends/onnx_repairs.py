"""What ONNX allows and ONNX Runtime has no kernel for, spelled with what it has, to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from intarsia.backends.onnx_weights import Tape

if TYPE_CHECKING:
    import onnx_ir

WIDER: Mapping[str, str] = {
    "BOOL": "INT32",
    "INT16": "INT32",
    "UINT16": "INT32",
    "UINT64": "INT64",
    "BFLOAT16": "FLOAT",
}
"""Element types in which ONNX Runtime 1.31 has no ``Where`` on the CPU, and one that holds their values and has it."""

INTEGERS: Mapping[tuple[str, str], str] = {
    ("MaxPool", "INT16"): "FLOAT",
    ("MaxPool", "INT32"): "DOUBLE",
    **{(op_type, "INT16"): "INT32" for op_type in ("Relu", "Pad", "Clip", "Max", "Min")},
}
"""Operators and element types that ONNX Runtime 1.31 has no kernel for on the CPU, and a type that holds all values."""


def widen_selections(graph: onnx_ir.Graph) -> None:
    """Let every ``Where`` choose between values of a type that it has a kernel for.

    Where(%mask, %a, %b): BOOL  ->  Cast(Where(%mask, Cast(%a, INT32), Cast(%b, INT32)), BOOL)

    PyTorch's ``masked_fill``, ``where`` and ``tril`` come here; HunyuanVideo fills a mask of booleans so.
    """
    import onnx_ir as ir

    for node in [node for node in graph if node.op_type == "Where" and not node.domain]:
        dtype = next((value.dtype for value in (*node.outputs, *node.inputs[1:]) if value and value.dtype), None)
        if dtype is None or dtype.name not in WIDER:
            continue
        tape, wider = Tape(node), ir.DataType[WIDER[dtype.name]]
        condition, *branches = node.inputs
        assert condition is not None
        chosen = tape.op("Where", condition, *(tape.op("Cast", value, to=int(wider)) for value in branches if value))
        tape.take_place(tape.op("Cast", chosen, to=int(dtype)))


def widen_integers(graph: onnx_ir.Graph) -> None:
    """Let integers of 16 and 32 bits be pooled, padded and clipped where ONNX Runtime has no kernel for them.

    MaxPool(%a: INT16)  ->  Cast(MaxPool(Cast(%a, FLOAT)), INT16)
    """
    import onnx_ir as ir

    for node in [node for node in graph if not node.domain]:
        dtype = next((value.dtype for value in node.inputs[:1] if value is not None and value.dtype), None)
        wider = INTEGERS.get((node.op_type, dtype.name)) if dtype else None
        if dtype is None or wider is None:
            continue
        tape = Tape(node)
        # Operands of the tensor's own type go along; the counts of a Pad stay.
        given = [
            tape.op("Cast", value, to=int(ir.DataType[wider])) if value is not None and value.dtype == dtype else value
            for value in node.inputs
        ]
        made = tape.again(given)
        tape.take_place(tape.op("Cast", made, to=int(dtype)))
