"""Contract of ``intarsia.avg_pool2d_i8``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.avg_pool2d_i8 import reference
from intarsia.kernels.base import Work, moved_bytes

OPS = ("intarsia.avg_pool2d_i8",)

REFERENCES = {"intarsia.avg_pool2d_i8": reference.avg_pool2d_i8}

LAUNCHES: Mapping[str, str] = {}

TERMS = {"i8": 2**31 // 2**7 - 1, "i16": 2**31 // 2**15 - 1}
"""Numbers of each element type whose sum certainly fits into int32."""


@torch.library.custom_op("intarsia::avg_pool2d_i8", mutates_args=())
def avg_pool2d_i8(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Input i8 or i16 (N, C, H, W), two numbers each for height and width, multiplier and shift i32 (1) or (C).

    Zeros of the padding are counted, as PyTorch's ``count_include_pad`` does; the multiplier holds 1 / (kh * kw). Gives
    (N, C, H', W') in the smallest of i8, i16 and i32 that holds ``low`` and ``high``.
    """
    window = (kernel_size, stride, padding)
    return reference.avg_pool2d_i8(input, *window, multiplier, shift, low, high).contiguous()


@avg_pool2d_i8.register_fake
def _(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    multiplier: Tensor,
    shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    good = input.dtype in (torch.int8, torch.int16)
    torch._check(good, lambda: f"avg_pool2d_i8: input is int8 or int16, found {input.dtype}")
    torch._check(input.ndim == 4, lambda: f"avg_pool2d_i8: input is (N, C, H, W), found {input.ndim} axes")
    for axis in range(2):
        fits = 2 * padding[axis] <= kernel_size[axis]
        torch._check(fits, lambda: f"avg_pool2d_i8: padding is at most half of kernel_size, found {list(padding)}")
    channels = 1 if multiplier.shape == (1,) else input.shape[1]
    limits.check_dyadic("avg_pool2d_i8", multiplier, shift, channels)
    extents = [(input.shape[2 + axis] + 2 * padding[axis] - kernel_size[axis]) // stride[axis] + 1 for axis in range(2)]
    return input.new_empty((*input.shape[:2], *extents), dtype=limits.result_dtype("avg_pool2d_i8", low, high))


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    found, kernel = graph.type(node.ref("input")).dtype, node.args["kernel_size"]
    if found not in TERMS:
        return f"input is {found}; {node.op} takes {', '.join(TERMS)}"
    assert isinstance(kernel, tuple)
    terms = prod(extent for extent in kernel if isinstance(extent, int))
    if terms > TERMS[found]:
        return f"a sum has {terms:,} terms; int32 certainly holds {TERMS[found]:,} of {found}"
    return limits.dyadic(node, graph) or limits.ends(node)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))
