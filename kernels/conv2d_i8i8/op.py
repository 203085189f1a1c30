"""Contract of ``intarsia.conv2d_i8i8``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.conv2d_i8i8 import reference

OPS = ("intarsia.conv2d_i8i8",)

REFERENCES = {"intarsia.conv2d_i8i8": reference.conv2d_i8i8}

LAUNCHES = {"intarsia.conv2d_i8i8": "intarsia.kernels.conv2d_i8i8.triton:launch"}


@torch.library.custom_op("intarsia::conv2d_i8i8", mutates_args=())
def conv2d_i8i8(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Input i8 (N, C, H, W), weight i8 (O, C/groups, kh, kw), bias i32 (O), multiplier and shift i32 (O).

    Gives (N, O, H', W') in the smallest of i8, i16 and i32 that holds ``low`` and ``high``.
    """
    window = (stride, padding, dilation, groups)
    return reference.conv2d_i8i8(input, weight, bias, multiplier, shift, *window, low, high).contiguous()


@conv2d_i8i8.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    limits.check_i8("conv2d_i8i8", input, weight, bias)
    torch._check(input.ndim == 4, lambda: f"conv2d_i8i8: input is (N, C, H, W), found {input.ndim} axes")
    outputs, channels, *window = weight.shape
    expected = channels * groups
    torch._check(input.shape[1] == expected, lambda: f"conv2d_i8i8: input has {expected} channels")
    limits.check_dyadic("conv2d_i8i8", multiplier, shift, outputs)
    extents = [
        (input.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (window[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(2)
    ]
    return input.new_empty((input.shape[0], outputs, *extents), dtype=limits.result_dtype("conv2d_i8i8", low, high))


@conv2d_i8i8.register_kernel("cuda")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    shift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    arguments = {"input": input, "weight": weight, "bias": bias, "multiplier": multiplier, "shift": shift}
    window = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}
    return launch.run("intarsia.conv2d_i8i8", {**arguments, **window, "low": low, "high": high})


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    return limits.integers(node, graph)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """The product in int8."""
    terms = prod(int(extent) for extent in graph.type(node.ref("weight")).shape[1:])
    return Work(2.0 * node.type.elements(sizes) * terms, "i8", moved_bytes(node, graph, sizes))
