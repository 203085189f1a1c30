"""Contracts of ``intarsia.integer_softmax`` and ``integer_norm``, and of what makes their constants."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.integer_islands import reference

OPS = ("intarsia.exponentials", "intarsia.integer_softmax", "intarsia.norm_numbers", "intarsia.integer_norm")

REFERENCES = {
    "intarsia.exponentials": reference.exponentials,
    "intarsia.integer_softmax": reference.integer_softmax,
    "intarsia.norm_numbers": reference.norm_numbers,
    "intarsia.integer_norm": reference.integer_norm,
}

LAUNCHES: Mapping[str, str] = {}

MOST_CHANNELS = 2**15
"""Channels of a row whose sums of squares, times the channels, stay below 2**60."""

LARGEST_EPSILON = 2**61
"""What may stand beside such sums."""

_ENTRIES = {torch.int8: 256, torch.int16: 512}


@torch.library.custom_op("intarsia::exponentials", mutates_args=())
def exponentials(scale: float, bits: int) -> Tensor:
    """e**(-scale * d) in 2**-30, for the distances d of codes of 8 bits: i32 (256); of 16: (512), see ``golden``."""
    return reference.exponentials(scale, bits).contiguous()


@exponentials.register_fake
def _(scale: float, bits: int) -> Tensor:
    torch._check(scale > 0, lambda: f"exponentials: scale is a positive number, found {scale}")
    torch._check(bits in (8, 16), lambda: f"exponentials: bits are 8 or 16, found {bits}")
    return torch.empty(256 if bits == 8 else 512, dtype=torch.int32)


@torch.library.custom_op("intarsia::integer_softmax", mutates_args=())
def integer_softmax(
    input: Tensor, table: Tensor, multiplier: int, shift: int, low: int = -128, high: int = 127
) -> Tensor:
    """Softmax over the last axis of input i8 or i16; ``table`` of ``intarsia.exponentials``, i32 (256) or (512).

    The result is in steps of 2**shift / multiplier, the multiplier below 2**31, the shift 1 to 62: the smallest of i8,
    i16 and i32 that holds ``low`` and ``high``.
    """
    return reference.integer_softmax(input, table, multiplier, shift, low, high).contiguous()


@integer_softmax.register_fake
def _(input: Tensor, table: Tensor, multiplier: int, shift: int, low: int = -128, high: int = 127) -> Tensor:
    torch._check(input.dtype in _ENTRIES, lambda: f"integer_softmax: input is int8 or int16, found {input.dtype}")
    entries = _ENTRIES[input.dtype]
    good = table.dtype == torch.int32 and table.shape == (entries,)
    torch._check(good, lambda: f"integer_softmax: table is int32 ({entries}), found {table.dtype} {tuple(table.shape)}")
    limits.check_number("integer_softmax", multiplier, shift)
    return input.new_empty(input.shape, dtype=limits.result_dtype("integer_softmax", low, high))


@torch.library.custom_op("intarsia::norm_numbers", mutates_args=())
def norm_numbers(
    weight: Tensor | None, bias: Tensor | None, scale: float, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight i32 (C), bias i64 (C) and shift i32 (1) of ``intarsia.integer_norm``, in steps of ``scale``.

    Raises:
        UsageError: A weight or a bias is no number, or 2**50 steps or more.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        largest = 0.0 if tensor is None else float(tensor.abs().max()) / scale
        if not largest < 2.0**50:
            raise UsageError(
                f"intarsia.norm_numbers: {name} reaches {largest:.3g} steps of the result, below 2**50 are possible; "
                "look for NaN and infinity in the weights, and at the calibrated range"
            )
    return reference.norm_numbers(weight, bias, scale, channels)


@norm_numbers.register_fake
def _(weight: Tensor | None, bias: Tensor | None, scale: float, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(scale > 0, lambda: f"norm_numbers: scale is a positive number, found {scale}")
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    for tensor in given:
        torch._check(tensor.shape == (channels,), lambda: f"norm_numbers: weight and bias are ({channels})")
    like = given[0] if given else torch.empty(0)
    extents = ((channels,), (channels,), (1,))
    dtypes = (torch.int32, torch.int64, torch.int32)
    codes, summand, shift = (like.new_empty(one, dtype=dtype) for one, dtype in zip(extents, dtypes, strict=True))
    return codes, summand, shift


@torch.library.custom_op("intarsia::integer_norm", mutates_args=())
def integer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    epsilon: int,
    centered: bool,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Layer norm of input i8 or i16 (..., C) over the last axis; not ``centered``, RMS norm.

    Weight i32 (C), bias i64 (C) and shift i32 (1) are of ``intarsia.norm_numbers``; ``epsilon`` is C**2 times that of
    the float norm, in the input's steps squared, 1 to 2**61. Gives the smallest of i8, i16 and i32 that holds ``low``
    and ``high``.
    """
    return reference.integer_norm(input, weight, bias, shift, epsilon, centered, low, high).contiguous()


@integer_norm.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    epsilon: int,
    centered: bool,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    torch._check(input.dtype in _ENTRIES, lambda: f"integer_norm: input is int8 or int16, found {input.dtype}")
    channels = input.shape[-1]
    for name, tensor, dtype in (("weight", weight, torch.int32), ("bias", bias, torch.int64)):
        good = tensor.dtype == dtype and tensor.shape == (channels,)
        torch._check(good, lambda: f"integer_norm: {name} is {dtype} ({channels})")  # noqa: B023
    torch._check(shift.dtype == torch.int32 and shift.shape == (1,), lambda: "integer_norm: shift is int32 (1)")
    torch._check(channels <= MOST_CHANNELS, lambda: f"integer_norm: {channels} channels, {MOST_CHANNELS} are possible")
    held = 1 <= epsilon <= LARGEST_EPSILON
    torch._check(held, lambda: f"integer_norm: epsilon is 1 to 2**61, found {epsilon}")
    return input.new_empty(input.shape, dtype=limits.result_dtype("integer_norm", low, high))


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    match node.op:
        case "intarsia.exponentials" | "intarsia.norm_numbers":
            return limits.positive(node, "scale")
        case "intarsia.integer_softmax":
            reason = limits.narrow_codes(node, "input", graph) or limits.dtype(node, "table", "i32", graph)
            return reason or limits.number(node) or limits.ends(node)
        case _:
            return limits.narrow_codes(node, "input", graph) or _norm(node, graph) or limits.ends(node)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product of matrices; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))


def _norm(node: Node, graph: Graph) -> str | None:
    channels, epsilon = graph.type(node.ref("input")).shape[-1], node.args["epsilon"]
    if not isinstance(channels, int) or channels > MOST_CHANNELS:
        return f"input has {channels} channels; {node.op} takes a fixed number up to {MOST_CHANNELS:,}"
    if not isinstance(epsilon, int) or not 1 <= epsilon <= LARGEST_EPSILON:
        return f"epsilon is {epsilon}; {node.op} takes 1 to 2**61"
    return None
