"""Contracts of what makes codes, dyadic numbers and biases of parameters: ``intarsia.quantize_channels`` and others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.integer_weights import reference

OPS = ("intarsia.quantize_channels", "intarsia.dyadic", "intarsia.exact_dyadic", "intarsia.quantize_bias")

REFERENCES = {
    "intarsia.quantize_channels": reference.quantize_channels,
    "intarsia.dyadic": reference.dyadic,
    "intarsia.exact_dyadic": reference.exact_dyadic,
    "intarsia.quantize_bias": reference.quantize_bias,
}

LAUNCHES: Mapping[str, str] = {}


@torch.library.custom_op("intarsia::quantize_channels", mutates_args=())
def quantize_channels(weight: Tensor, bits: int, grain: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weight (O, ...) in 2 to 8 bits: codes i8 (O, ...), and one step of each channel, f32 (O).

    Steps are multiples of ``grain`` if that is not 0.
    """
    codes, scale = reference.quantize_channels(weight, bits, grain)
    return codes.contiguous(), scale.contiguous()


@quantize_channels.register_fake
def _(weight: Tensor, bits: int, grain: float = 0.0) -> tuple[Tensor, Tensor]:
    torch._check(weight.ndim >= 2, lambda: f"quantize_channels: weight is (O, ...), found {weight.ndim} axes")
    torch._check(2 <= bits <= 8, lambda: f"quantize_channels: bits are 2 to 8, found {bits}")
    return (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[:1], dtype=torch.float32),
    )


@torch.library.custom_op("intarsia::dyadic", mutates_args=())
def dyadic(scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Scale f32 (O): multiplier i32 (O) and shift i32 (O) in 1..62 of the real numbers scale * factor.

    Raises:
        UsageError: A number is none, or beyond what a shift of 1 reaches.
    """
    real = scale.double() * factor
    if bad := [found for found in real.tolist() if not 0 <= found < 2.0**30]:
        raise UsageError(
            f"intarsia.dyadic: a multiplier and a shift stand for numbers from 0 to 2**30, found {bad[0]}; "
            "calibrate on data and weights without NaN and infinity"
        )
    return reference.dyadic(scale, factor)


@dyadic.register_fake
def _(scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    torch._check(scale.ndim == 1, lambda: f"dyadic: scale is (O), found {scale.ndim} axes")
    torch._check(factor > 0, lambda: f"dyadic: factor is a positive number, found {factor}")
    return scale.new_empty(scale.shape, dtype=torch.int32), scale.new_empty(scale.shape, dtype=torch.int32)


@torch.library.custom_op("intarsia::exact_dyadic", mutates_args=())
def exact_dyadic(
    multiplier: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_low: int,
    input_high: int,
    low: int = -128,
    high: int = 127,
) -> tuple[Tensor, Tensor]:
    """Multiplier i32 (O) and shift i32 (O) for weight i8 (O, ...) and bias i32 (O): the same, moved by 1.2e-4 at most.

    So that f32 and halves to even give results low..high of eight bits of all sums that the weight makes of integers
    input_low..input_high, of these integers themselves where there is no weight; for wider results, with fewer bits.
    """
    return reference.exact_dyadic(multiplier, shift, weight, bias, input_low, input_high, low, high)


@exact_dyadic.register_fake
def _(
    multiplier: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_low: int,
    input_high: int,
    low: int = -128,
    high: int = 127,
) -> tuple[Tensor, Tensor]:
    channels = multiplier.shape[0] if weight is None else weight.shape[0]
    limits.check_dyadic("exact_dyadic", multiplier, shift, channels)
    torch._check(input_low <= input_high, lambda: f"exact_dyadic: inputs rise, found {input_low} to {input_high}")
    limits.result_dtype("exact_dyadic", low, high)
    return torch.empty_like(multiplier), torch.empty_like(shift)


@torch.library.custom_op("intarsia::quantize_bias", mutates_args=())
def quantize_bias(bias: Tensor, scale: Tensor, input_scale: float, largest: int = reference.LARGEST) -> Tensor:
    """Bias (O) in steps of scale f32 (O) times input_scale: i32 (O), saturating at ``largest``."""
    return reference.quantize_bias(bias, scale, input_scale, largest).contiguous()


@quantize_bias.register_fake
def _(bias: Tensor, scale: Tensor, input_scale: float, largest: int = reference.LARGEST) -> Tensor:
    torch._check(bias.shape == scale.shape, lambda: f"quantize_bias: bias is {tuple(scale.shape)}")
    torch._check(input_scale > 0, lambda: f"quantize_bias: input_scale is a positive number, found {input_scale}")
    return bias.new_empty(bias.shape, dtype=torch.int32)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    match node.op:
        case "intarsia.quantize_channels":
            return limits.floating(node, "weight", graph)
        case "intarsia.dyadic":
            return limits.dtype(node, "scale", "f32", graph) or limits.positive(node, "factor")
        case "intarsia.exact_dyadic":
            return limits.dyadic(node, graph) or limits.ends(node)
        case _:
            reason = limits.floating(node, "bias", graph) or limits.dtype(node, "scale", "f32", graph)
            return reason or limits.positive(node, "input_scale")


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))
