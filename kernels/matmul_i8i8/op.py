"""Contract of ``intarsia.matmul_i8i8``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.matmul_i8i8 import reference

OPS = ("intarsia.matmul_i8i8",)

REFERENCES = {"intarsia.matmul_i8i8": reference.matmul_i8i8}

LAUNCHES: Mapping[str, str] = {}


@torch.library.custom_op("intarsia::matmul_i8i8", mutates_args=())
def matmul_i8i8(input: Tensor, other: Tensor, multiplier: int, shift: int, low: int = -128, high: int = 127) -> Tensor:
    """Input i8 (..., M, K), other i8 (..., K, N), equal in all other axes; K up to 131,071.

    Summed in int32, times multiplier / 2**shift: the smallest of i8, i16 and i32 that holds ``low`` and ``high``, of
    (..., M, N).
    """
    return reference.matmul_i8i8(input, other, multiplier, shift, low, high).contiguous()


@matmul_i8i8.register_fake
def _(input: Tensor, other: Tensor, multiplier: int, shift: int, low: int = -128, high: int = 127) -> Tensor:
    for name, tensor in (("input", input), ("other", other)):
        torch._check(tensor.dtype == torch.int8, lambda: f"matmul_i8i8: {name} is int8, found {tensor.dtype}")  # noqa: B023
    torch._check(input.ndim == other.ndim >= 2, lambda: f"matmul_i8i8: {input.ndim} and {other.ndim} axes")
    for axis in range(input.ndim - 2):
        torch._check(input.shape[axis] == other.shape[axis], lambda: f"matmul_i8i8: axis {axis} differs")  # noqa: B023
    torch._check(input.shape[-1] == other.shape[-2], lambda: f"matmul_i8i8: other has {input.shape[-1]} rows")
    limits.check_number("matmul_i8i8", multiplier, shift)
    dtype = limits.result_dtype("matmul_i8i8", low, high)
    return input.new_empty((*input.shape[:-1], other.shape[-1]), dtype=dtype)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    for arg in ("input", "other"):
        if reason := limits.dtype(node, arg, "i8", graph):
            return reason
    terms = graph.type(node.ref("input")).shape[-1]
    if not isinstance(terms, int) or terms > limits.TERMS:
        return f"a sum has {terms} terms; {node.op} takes a fixed number up to {limits.TERMS:,}"
    return limits.number(node) or limits.ends(node)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """A multiply-add for each number of the result and each term of its sum."""
    terms = graph.type(node.ref("input")).shape[-1]
    assert isinstance(terms, int)
    return Work(2.0 * node.type.elements(sizes) * terms, "i8", moved_bytes(node, graph, sizes))
