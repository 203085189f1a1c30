"""Contract of ``intarsia.linear_i8`` and of ``intarsia.quantize_rows``, which makes its weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.linear_i8 import reference

OPS = ("intarsia.quantize_rows", "intarsia.linear_i8")

REFERENCES = {"intarsia.quantize_rows": reference.quantize_rows, "intarsia.linear_i8": reference.linear_i8}

LAUNCHES = {"intarsia.linear_i8": "intarsia.kernels.linear_i8.triton:launch"}


@torch.library.custom_op("intarsia::quantize_rows", mutates_args=())
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (R, C) as int8 (R, C) and f32 scale (R)."""
    return reference.quantize_rows(weight)


@quantize_rows.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(weight.ndim == 2, lambda: f"quantize_rows: weight is (R, C), found {weight.ndim} axes")
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[:1], dtype=torch.float32)


@torch.library.custom_op("intarsia::linear_i8", mutates_args=())
def linear_i8(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Input (..., C), weight int8 (R, C), scale f32 (R), bias (R): (..., R) in input's dtype."""
    return reference.linear_i8(input, weight, scale, bias)


@linear_i8.register_fake
def _(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    torch._check(weight.dtype == torch.int8, lambda: f"linear_i8: weight is int8, found {weight.dtype}")
    torch._check(input.shape[-1] == columns, lambda: f"linear_i8: input ends in {columns}, found {input.shape[-1]}")
    torch._check(scale.shape == (rows,), lambda: f"linear_i8: scale is ({rows},), found {tuple(scale.shape)}")
    torch._check(bias is None or bias.shape == (rows,), lambda: f"linear_i8: bias is ({rows},)")
    return input.new_empty((*input.shape[:-1], rows))


@linear_i8.register_kernel("cuda")
def _(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    arguments = {"input": input, "weight": weight, "scale": scale, "bias": bias}
    return launch.run("intarsia.linear_i8", arguments)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target, since products are in the input's type."""
    if node.op == "intarsia.quantize_rows":
        return limits.weight(node, "weight", graph)
    return limits.floating(node, "input", graph)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """The product in the input's element type, the weight read in eight bits; quantizing is no product."""
    if node.op == "intarsia.quantize_rows":
        return Work(0.0, "f32", moved_bytes(node, graph, sizes))
    columns = graph.type(node.ref("weight")).shape[1]
    assert isinstance(columns, int)
    return Work(2.0 * node.type.elements(sizes) * columns, node.type.dtype, moved_bytes(node, graph, sizes))
