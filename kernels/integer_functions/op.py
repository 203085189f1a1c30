"""Contracts of ``intarsia.apply_table`` and of ``intarsia.function_table``, which makes tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.integer_functions import reference

OPS = ("intarsia.function_table", "intarsia.apply_table")

REFERENCES = {"intarsia.function_table": reference.function_table, "intarsia.apply_table": reference.apply_table}

LAUNCHES: Mapping[str, str] = {}

ENTRIES = {8: 256, 16: 2049}
"""Length of a table, by the bits of the codes that it is for."""

_BITS = {torch.int8: 8, torch.int16: 16}


@torch.library.custom_op("intarsia::function_table", mutates_args=())
def function_table(function: str, input_scale: float, scale: float, bits: int) -> Tensor:
    """i32 (256) or (2049): ``gelu``, ``gelu_tanh``, ``silu``, ``sigmoid`` or ``tanh`` of codes of 8 or 16 bits.

    The codes are steps of ``input_scale``, entries steps of ``scale``, for 16 bits of 2**-12 of it.
    """
    return reference.function_table(function, input_scale, scale, bits).contiguous()


@function_table.register_fake
def _(function: str, input_scale: float, scale: float, bits: int) -> Tensor:
    known = ", ".join(reference.FUNCTIONS)
    torch._check(function in reference.FUNCTIONS, lambda: f"function_table: function is {known}, found {function}")
    torch._check(bits in ENTRIES, lambda: f"function_table: bits are 8 or 16, found {bits}")
    steps = (input_scale, scale)
    torch._check(min(steps) > 0, lambda: f"function_table: scales are positive numbers, found {steps}")
    return torch.empty(ENTRIES[bits], dtype=torch.int32)


@torch.library.custom_op("intarsia::apply_table", mutates_args=())
def apply_table(input: Tensor, table: Tensor, low: int = -128, high: int = 127) -> Tensor:
    """Input i8 with a table i32 (256), or i16 with one of (2049), of any extents.

    Gives the smallest of i8, i16 and i32 that holds ``low`` and ``high``.
    """
    return reference.apply_table(input, table, low, high).contiguous()


@apply_table.register_fake
def _(input: Tensor, table: Tensor, low: int = -128, high: int = 127) -> Tensor:
    torch._check(input.dtype in _BITS, lambda: f"apply_table: input is int8 or int16, found {input.dtype}")
    entries = ENTRIES[_BITS[input.dtype]]
    good = table.dtype == torch.int32 and table.shape == (entries,)
    torch._check(good, lambda: f"apply_table: table is int32 ({entries}), found {table.dtype} {tuple(table.shape)}")
    return input.new_empty(input.shape, dtype=limits.result_dtype("apply_table", low, high))


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    if node.op == "intarsia.function_table":
        return limits.positive(node, "input_scale") or limits.positive(node, "scale")
    reason = limits.narrow_codes(node, "input", graph) or limits.dtype(node, "table", "i32", graph)
    return reason or limits.ends(node)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))
