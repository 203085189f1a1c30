"""Contracts of ``intarsia.fake_quantize``, ``fake_quantize_channels`` and ``fake_quantize_bias``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.fake_quantize import reference

OPS = ("intarsia.fake_quantize", "intarsia.fake_quantize_channels", "intarsia.fake_quantize_bias")

REFERENCES = {
    "intarsia.fake_quantize": reference.fake_quantize,
    "intarsia.fake_quantize_channels": reference.fake_quantize_channels,
    "intarsia.fake_quantize_bias": reference.fake_quantize_bias,
}

LAUNCHES: Mapping[str, str] = {}


@torch.library.custom_op("intarsia::fake_quantize", mutates_args=())
def fake_quantize(input: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Input of any extents, rounded to the multiples low..high of scale, in its dtype.

    The gradient passes where the code lies in low..high, and is 0 where it was clipped.
    """
    return reference.fake_quantize(input, scale, low, high).contiguous()


@fake_quantize.register_fake
def _(input: Tensor, scale: float, low: int, high: int) -> Tensor:
    torch._check(scale > 0, lambda: f"fake_quantize: scale is a positive number, found {scale}")
    torch._check(low < high, lambda: f"fake_quantize: low is below high, found {low} and {high}")
    return input.new_empty(input.shape)


def _keep_inside(ctx: Any, inputs: tuple[Tensor, float, int, int], output: Tensor) -> None:
    input, scale, low, high = inputs
    code = reference.codes(input, scale)
    ctx.save_for_backward((code >= low) & (code <= high))


def _pass_inside(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (inside,) = ctx.saved_tensors
    return gradient * inside, None, None, None


fake_quantize.register_autograd(_pass_inside, setup_context=_keep_inside)


@torch.library.custom_op("intarsia::fake_quantize_channels", mutates_args=())
def fake_quantize_channels(weight: Tensor, bits: int, grain: float = 0.0) -> Tensor:
    """Weight (O, ...), each channel O rounded to ``bits`` bits, in its dtype; the gradient passes."""
    return reference.fake_quantize_channels(weight, bits, grain).contiguous()


@fake_quantize_channels.register_fake
def _(weight: Tensor, bits: int, grain: float = 0.0) -> Tensor:
    torch._check(weight.ndim >= 2, lambda: f"fake_quantize_channels: weight is (O, ...), found {weight.ndim} axes")
    torch._check(2 <= bits <= 8, lambda: f"fake_quantize_channels: bits are 2 to 8, found {bits}")
    return weight.new_empty(weight.shape)


def _pass_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


fake_quantize_channels.register_autograd(_pass_weight)


@torch.library.custom_op("intarsia::fake_quantize_bias", mutates_args=())
def fake_quantize_bias(bias: Tensor, weight: Tensor, bits: int, input_scale: float, grain: float = 0.0) -> Tensor:
    """Bias (O) rounded to steps of input_scale times those of weight (O, ...) in ``bits`` bits; the gradient passes."""
    return reference.fake_quantize_bias(bias, weight, bits, input_scale, grain).contiguous()


@fake_quantize_bias.register_fake
def _(bias: Tensor, weight: Tensor, bits: int, input_scale: float, grain: float = 0.0) -> Tensor:
    expected = weight.shape[:1]
    torch._check(bias.shape == expected, lambda: f"fake_quantize_bias: bias is {tuple(expected)}")
    torch._check(input_scale > 0, lambda: f"fake_quantize_bias: input_scale is positive, found {input_scale}")
    return bias.new_empty(bias.shape)


def _pass_bias(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return gradient, None, None, None, None


fake_quantize_bias.register_autograd(_pass_bias)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    match node.op:
        case "intarsia.fake_quantize":
            return limits.floating(node, "input", graph) or limits.positive(node, "scale")
        case "intarsia.fake_quantize_channels":
            return limits.floating(node, "weight", graph)
        case _:
            return limits.floating(node, "bias", graph) or limits.positive(node, "input_scale")


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "f32", moved_bytes(node, graph, sizes))
