"""Contract of ``intarsia.linear_i8i8``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.linear_i8i8 import reference

OPS = ("intarsia.linear_i8i8",)

REFERENCES = {"intarsia.linear_i8i8": reference.linear_i8i8}

LAUNCHES = {"intarsia.linear_i8i8": "intarsia.kernels.linear_i8i8.triton:launch"}


@torch.library.custom_op("intarsia::linear_i8i8", mutates_args=())
def linear_i8i8(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Input i8 (..., C), weight i8 (R, C), bias i32 (R), multiplier and shift i32 (R): (..., R).

    Gives the smallest of i8, i16 and i32 that holds ``low`` and ``high``.
    """
    return reference.linear_i8i8(input, weight, bias, multiplier, shift, low, high).contiguous()


@linear_i8i8.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    limits.check_i8("linear_i8i8", input, weight, bias)
    rows, columns = weight.shape
    torch._check(input.shape[-1] == columns, lambda: f"linear_i8i8: input ends in {columns}, found {input.shape[-1]}")
    limits.check_dyadic("linear_i8i8", multiplier, shift, rows)
    return input.new_empty((*input.shape[:-1], rows), dtype=limits.result_dtype("linear_i8i8", low, high))


@linear_i8i8.register_kernel("cuda")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    arguments = {"input": input, "weight": weight, "bias": bias, "multiplier": multiplier, "shift": shift}
    return launch.run("intarsia.linear_i8i8", {**arguments, "low": low, "high": high})


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    return limits.integers(node, graph)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """The product in int8."""
    columns = graph.type(node.ref("weight")).shape[1]
    assert isinstance(columns, int)
    return Work(2.0 * node.type.elements(sizes) * columns, "i8", moved_bytes(node, graph, sizes))
