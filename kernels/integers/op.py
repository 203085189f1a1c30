"""Contracts of ``intarsia.quantize_static``, ``dequantize_static`` and ``requantize``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.integers import reference

OPS = ("intarsia.quantize_static", "intarsia.dequantize_static", "intarsia.requantize")

REFERENCES = {
    "intarsia.quantize_static": reference.quantize_static,
    "intarsia.dequantize_static": reference.dequantize_static,
    "intarsia.requantize": reference.requantize,
}

LAUNCHES: Mapping[str, str] = {}


@torch.library.custom_op("intarsia::quantize_static", mutates_args=())
def quantize_static(input: Tensor, scale: float, low: int = -128, high: int = 127) -> Tensor:
    """Input of any extents as the nearest whole numbers of ``scale`` in ``low``..``high``: i8, or i16 for wider."""
    return reference.quantize_static(input, scale, low, high).contiguous()


@quantize_static.register_fake
def _(input: Tensor, scale: float, low: int = -128, high: int = 127) -> Tensor:
    torch._check(scale > 0, lambda: f"quantize_static: scale is a positive number, found {scale}")
    return input.new_empty(input.shape, dtype=limits.result_dtype("quantize_static", low, high))


@torch.library.custom_op("intarsia::dequantize_static", mutates_args=())
def dequantize_static(input: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Input i8, i16 or i32 of any extents in ``dtype``."""
    return reference.dequantize_static(input, scale, dtype).contiguous()


@dequantize_static.register_fake
def _(input: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    limits.check_codes("dequantize_static", "input", input)
    return input.new_empty(input.shape, dtype=dtype)


@torch.library.custom_op("intarsia::requantize", mutates_args=())
def requantize(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int, low: int = -128, high: int = 127) -> Tensor:
    """Input i8, i16 or i32 of any extents, C along ``axis``; multiplier i32 and shift i32 in 1..62, both (C) or (1).

    Gives the smallest of i8, i16 and i32 that holds ``low`` and ``high``.
    """
    return reference.requantize(input, multiplier, shift, axis, low, high).contiguous()


@requantize.register_fake
def _(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int, low: int = -128, high: int = 127) -> Tensor:
    limits.check_codes("requantize", "input", input)
    channels = 1 if multiplier.shape == (1,) else input.shape[axis]
    limits.check_dyadic("requantize", multiplier, shift, channels)
    return input.new_empty(input.shape, dtype=limits.result_dtype("requantize", low, high))


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    match node.op:
        case "intarsia.quantize_static":
            reason = limits.floating(node, "input", graph) or limits.positive(node, "scale")
            return reason or limits.ends(node, widest=16)
        case "intarsia.dequantize_static":
            return limits.codes(node, "input", graph) or limits.positive(node, "scale")
        case _:
            return limits.codes(node, "input", graph) or limits.dyadic(node, graph) or limits.ends(node)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))
