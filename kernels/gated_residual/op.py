"""Contract of ``intarsia.gated_residual``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.gated_residual import reference

OPS = ("intarsia.gated_residual",)

REFERENCES = {"intarsia.gated_residual": reference.gated_residual}

LAUNCHES = {"intarsia.gated_residual": "intarsia.kernels.gated_residual.triton:launch"}


@torch.library.custom_op("intarsia::gated_residual", mutates_args=())
def gated_residual(residual: Tensor, input: Tensor, gate: Tensor) -> Tensor:
    """Residual and input (B, N, C), gate (B or 1, N or 1, C): (B, N, C) in residual's dtype."""
    return reference.gated_residual(residual, input, gate).contiguous()


@gated_residual.register_fake
def _(residual: Tensor, input: Tensor, gate: Tensor) -> Tensor:
    torch._check(residual.ndim == 3, lambda: f"gated_residual: residual is (B, N, C), found {residual.ndim} axes")
    expected = tuple(residual.shape)
    torch._check(input.shape == expected, lambda: f"gated_residual: input is {expected}, found {tuple(input.shape)}")
    limits.check_broadcast("gated_residual", "gate", gate, residual)
    return residual.new_empty(residual.shape)


@gated_residual.register_kernel("cuda")
def _(residual: Tensor, input: Tensor, gate: Tensor) -> Tensor:
    return launch.run("intarsia.gated_residual", {"residual": residual, "input": input, "gate": gate})


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None."""
    residual, given = graph.type(node.ref("residual")), graph.type(node.ref("input"))
    if residual.shape != given.shape:
        return f"residual is {residual}, input {given}; {node.op} takes equal extents"
    return limits.broadcast(node, "gate", "residual", graph) or limits.rows(node, "residual", graph, target)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, node.type.dtype, moved_bytes(node, graph, sizes))
