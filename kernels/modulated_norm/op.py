"""Contract of ``intarsia.modulated_norm``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.modulated_norm import reference

OPS = ("intarsia.modulated_norm",)

REFERENCES = {"intarsia.modulated_norm": reference.modulated_norm}

LAUNCHES = {"intarsia.modulated_norm": "intarsia.kernels.modulated_norm.triton:launch"}


@torch.library.custom_op("intarsia::modulated_norm", mutates_args=())
def modulated_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Input (B, N, C), weight and bias (C), scale and shift (B or 1, N or 1, C): (B, N, C) in input's dtype."""
    return reference.modulated_norm(input, weight, bias, scale, shift, eps).contiguous()


@modulated_norm.register_fake
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    torch._check(input.ndim == 3, lambda: f"modulated_norm: input is (B, N, C), found {input.ndim} axes")
    channels = input.shape[2]
    for name, tensor in (("weight", weight), ("bias", bias)):
        torch._check(tensor is None or tensor.shape == (channels,), lambda: f"modulated_norm: {name} is ({channels},)")  # noqa: B023
    for name, tensor in (("scale", scale), ("shift", shift)):
        limits.check_broadcast("modulated_norm", name, tensor, input)
    return input.new_empty(input.shape)


@modulated_norm.register_kernel("cuda")
def _(input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    arguments = {"input": input, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "eps": eps}
    return launch.run("intarsia.modulated_norm", arguments)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; on GPUs a row must fit into the registers of a block of threads."""
    for arg in ("scale", "shift"):
        if reason := limits.broadcast(node, arg, "input", graph):
            return reason
    return limits.rows(node, "input", graph, target)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, node.type.dtype, moved_bytes(node, graph, sizes))
