"""Contract of ``intarsia.calibrated``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.calibrated import reference

OPS = ("intarsia.calibrated",)

REFERENCES = {"intarsia.calibrated": reference.calibrated}

LAUNCHES: Mapping[str, str] = {}


@torch.library.custom_op("intarsia::calibrated", mutates_args=())
def calibrated(input: Tensor, low: float, high: float) -> Tensor:
    """Input of any extents, unchanged; low and high are what it was seen to lie between."""
    return input.clone()


@calibrated.register_fake
def _(input: Tensor, low: float, high: float) -> Tensor:
    torch._check(low <= high, lambda: f"calibrated: low is at most high, found {low} and {high}")
    return torch.empty_like(input)


def _pass_on(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


calibrated.register_autograd(_pass_on)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; alike on every target."""
    return limits.floating(node, "input", graph)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operand once, where a backend does not drop it."""
    return Work(0.0, node.type.dtype, moved_bytes(node, graph, sizes))
