"""Contracts of ``intarsia.linear_i4``, of ``quantize_groups``, which makes its weight, and of ``unpack_i4``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.linear_i4 import reference

OPS = ("intarsia.quantize_groups", "intarsia.linear_i4", "intarsia.unpack_i4")

REFERENCES = {
    "intarsia.quantize_groups": reference.quantize_groups,
    "intarsia.linear_i4": reference.linear_i4,
    "intarsia.unpack_i4": reference.unpack,
}

LAUNCHES = {"intarsia.linear_i4": "intarsia.kernels.linear_i4.triton:launch"}

GROUPS = (32, 64, 128, 256)
"""Columns that may share a scale.

The ``block_size`` of ONNX Runtime's MatMulNBits without 16, with which Triton 3.6 multiplies 16-bit tiles wrongly on an
H100 (measured: errors of the size of the result).
"""


@torch.library.custom_op("intarsia::quantize_groups", mutates_args=())
def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weight (R, C) as packed u8 (R, C/2) and f32 scale (R, C/group)."""
    _check_group(group)
    return reference.quantize_groups(weight, group)


@quantize_groups.register_fake
def _(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    _check_group(group)
    torch._check(weight.ndim == 2, lambda: f"quantize_groups: weight is (R, C), found {weight.ndim} axes")
    rows, columns = weight.shape
    torch._check(columns % group == 0, lambda: f"quantize_groups: {columns} columns are no multiple of group {group}")
    packed = weight.new_empty((rows, columns // 2), dtype=torch.uint8)
    return packed, weight.new_empty((rows, columns // group), dtype=torch.float32)


@torch.library.custom_op("intarsia::linear_i4", mutates_args=())
def linear_i4(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Input (..., C), packed u8 (R, C/2), scale f32 (R, C/group), bias (R): (..., R) in input's dtype."""
    _check_group(group)
    return reference.linear_i4(input, packed, scale, bias, group)


@linear_i4.register_fake
def _(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    _check_group(group)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    torch._check(packed.dtype == torch.uint8, lambda: f"linear_i4: packed is uint8, found {packed.dtype}")
    torch._check(input.shape[-1] == columns, lambda: f"linear_i4: input ends in {columns}, found {input.shape[-1]}")
    expected = (rows, columns // group)
    torch._check(scale.shape == expected, lambda: f"linear_i4: scale is {expected}, found {tuple(scale.shape)}")
    torch._check(bias is None or bias.shape == (rows,), lambda: f"linear_i4: bias is ({rows},)")
    return input.new_empty((*input.shape[:-1], rows))


@linear_i4.register_kernel("cuda")
def _(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    _check_group(group)
    arguments = {"input": input, "packed": packed, "scale": scale, "bias": bias, "group": group}
    return launch.run("intarsia.linear_i4", arguments)


@torch.library.custom_op("intarsia::unpack_i4", mutates_args=())
def unpack_i4(packed: Tensor) -> Tensor:
    """Packed u8 (R, C/2), even column in the low nibble: i8 (R, C) in -8..7."""
    return reference.unpack(packed)


@unpack_i4.register_fake
def _(packed: Tensor) -> Tensor:
    torch._check(packed.ndim == 2, lambda: f"unpack_i4: packed is (R, C/2), found {packed.ndim} axes")
    torch._check(packed.dtype == torch.uint8, lambda: f"unpack_i4: packed is uint8, found {packed.dtype}")
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.int8)


def _check_group(group: int) -> None:
    torch._check(group in GROUPS, lambda: f"group is {group}; it is one of {', '.join(map(str, GROUPS))}")


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target, since products are in the input's type."""
    if node.op == "intarsia.unpack_i4":
        return limits.dtype(node, "packed", "u8", graph)
    if node.op == "intarsia.linear_i4":
        return limits.floating(node, "input", graph)
    if reason := limits.weight(node, "weight", graph):
        return reason
    group, columns = node.args["group"], graph.type(node.ref("weight")).shape[1]
    assert isinstance(group, int)
    assert isinstance(columns, int)
    if group not in GROUPS:
        return f"group is {group}; {node.op} takes {', '.join(map(str, GROUPS))}"
    if columns % group:
        return f"{columns} columns are no multiple of group {group}"
    return None


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """The product in the input's element type, the weight read in four bits; quantizing and unpacking are none."""
    if node.op != "intarsia.linear_i4":
        return Work(0.0, "f32", moved_bytes(node, graph, sizes))
    packed = graph.type(node.ref("packed")).shape[1]
    assert isinstance(packed, int)
    return Work(4.0 * node.type.elements(sizes) * packed, node.type.dtype, moved_bytes(node, graph, sizes))
