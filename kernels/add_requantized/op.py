"""Contract of ``intarsia.add_requantized``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.add_requantized import reference
from intarsia.kernels.base import Work, moved_bytes

OPS = ("intarsia.add_requantized",)

REFERENCES = {"intarsia.add_requantized": reference.add_requantized}

LAUNCHES = {"intarsia.add_requantized": "intarsia.kernels.add_requantized.triton:launch"}


@torch.library.custom_op("intarsia::add_requantized", mutates_args=())
def add_requantized(
    input: Tensor,
    other: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    other_multiplier: Tensor,
    other_shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Input and other i8, i16 or i32 of the same extents, their multipliers and shifts i32 (1), shifts in 1..62.

    Gives the smallest of i8, i16 and i32 that holds ``low`` and ``high``.
    """
    numbers = (multiplier, shift, other_multiplier, other_shift)
    return reference.add_requantized(input, other, *numbers, low, high).contiguous()


@add_requantized.register_fake
def _(
    input: Tensor,
    other: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    other_multiplier: Tensor,
    other_shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    limits.check_codes("add_requantized", "input", input)
    limits.check_codes("add_requantized", "other", other)
    torch._check(input.ndim == other.ndim, lambda: f"add_requantized: other has {input.ndim} axes, found {other.ndim}")
    for one, two in zip(input.shape, other.shape, strict=True):
        torch._check(one == two, lambda: f"add_requantized: other is {tuple(input.shape)}, found {tuple(other.shape)}")
    limits.check_dyadic("add_requantized", multiplier, shift, 1)
    limits.check_dyadic("add_requantized", other_multiplier, other_shift, 1)
    return input.new_empty(input.shape, dtype=limits.result_dtype("add_requantized", low, high))


@add_requantized.register_kernel("cuda")
def _(
    input: Tensor,
    other: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    other_multiplier: Tensor,
    other_shift: Tensor,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    numbers = {"multiplier": multiplier, "shift": shift}
    others = {"other_multiplier": other_multiplier, "other_shift": other_shift}
    arguments = {"input": input, "other": other, **numbers, **others, "low": low, "high": high}
    return launch.run("intarsia.add_requantized", arguments)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    reason = limits.codes(node, "input", graph) or limits.codes(node, "other", graph)
    return reason or limits.dyadic(node, graph) or limits.dyadic(node, graph, prefix="other_") or limits.ends(node)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, "i8", moved_bytes(node, graph, sizes))
