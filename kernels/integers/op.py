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
def quantize_static(input: Tensor, scale: float) -> Tensor:
    """Input of any extents as int8, for which ``scale`` is one step."""
    return reference.quantize_static(input, scale).contiguous()


@quantize_static.register_fake
def _(input: Tensor, scale: float) -> Tensor:
    torch._check(scale > 0, lambda: f"quantize_static: scale is a positive number, found {scale}")
    return input.new_empty(input.shape, dtype=torch.int8)


@torch.library.custom_op("intarsia::dequantize_static", mutates_args=())
def dequantize_static(input: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Input int8 of any extents in ``dtype``."""
    return reference.dequantize_static(input, scale, dtype).contiguous()


@dequantize_static.register_fake
def _(input: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    torch._check(input.dtype == torch.int8, lambda: f"dequantize_static: input is int8, found {input.dtype}")
    return input.new_empty(input.shape, dtype=dtype)


@torch.library.custom_op("intarsia::requantize", mutates_args=())
def requantize(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Input i32 of any extents, C along ``axis``; multiplier i32 (C) and shift i32 (C) in 1..62: int8."""
    return reference.requantize(input, multiplier, shift, axis).contiguous()


@requantize.register_fake
def _(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int) -> Tensor:
    torch._check(input.dtype == torch.int32, lambda: f"requantize: input is int32, found {input.dtype}")
    limits.check_dyadic("requantize", multiplier, shift, input.shape[axis])
    return input.new_empty(input.shape, dtype=torch.int8)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    match node.op:
        case "intarsia.quantize_static":
            return limits.floating(node, "input", graph) or limits.positive(node, "scale")
        case "intarsia.dequantize_static":
            return limits.dtype(node, "input", "i8", graph) or limits.positive(node, "scale")
        case _:
            return limits.dtype(node, "input", "i32", graph) or limits.dyadic(node, graph)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))
