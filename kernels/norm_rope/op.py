"""Contract of ``intarsia.norm_rope``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.norm_rope import reference

OPS = ("intarsia.norm_rope",)

REFERENCES = {"intarsia.norm_rope": reference.norm_rope}

LAUNCHES = {"intarsia.norm_rope": "intarsia.kernels.norm_rope.triton:launch"}


@torch.library.custom_op("intarsia::norm_rope", mutates_args=())
def norm_rope(input: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    """Input (B, N, heads*D), weight (heads*D), cos and sin f32 (N, D/2): (B, N, heads, D) in input's dtype."""
    return reference.norm_rope(input, weight, cos, sin, heads, eps).contiguous()


@norm_rope.register_fake
def _(input: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    torch._check(input.ndim == 3, lambda: f"norm_rope: input is (B, N, C), found {input.ndim} axes")
    batch, tokens, channels = input.shape
    torch._check(channels % (2 * heads) == 0, lambda: f"norm_rope: {channels} channels are no {heads} heads of pairs")
    torch._check(weight is None or weight.shape == (channels,), lambda: f"norm_rope: weight is ({channels},)")
    expected = (tokens, channels // heads // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        torch._check(table.shape == expected, lambda: f"norm_rope: {name} is {expected}, found {tuple(table.shape)}")  # noqa: B023
        torch._check(table.dtype == torch.float32, lambda: f"norm_rope: {name} is float32, found {table.dtype}")  # noqa: B023
    return input.new_empty((batch, tokens, heads, channels // heads))


@norm_rope.register_kernel("cuda")
def _(input: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    arguments = {"input": input, "weight": weight, "cos": cos, "sin": sin, "heads": heads, "eps": eps}
    return launch.run("intarsia.norm_rope", arguments)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; on GPUs a row must fit into the registers of a block of threads."""
    type_, heads = graph.type(node.ref("input")), node.args["heads"]
    assert isinstance(heads, int)
    if len(type_.shape) != 3 or not isinstance(type_.shape[2], int):
        return f"input is {type_}; {node.op} takes (B, N, C) with C fixed"
    if type_.shape[2] % (2 * heads):
        return f"{type_.shape[2]} channels are no {heads} heads of pairs"
    for arg in ("cos", "sin"):
        if (found := graph.type(node.ref(arg)).dtype) != "f32":
            return f"{arg} is {found}; {node.op} takes f32"
    return limits.rows(node, "input", graph, target)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """No product; moves its operands once."""
    return Work(0.0, node.type.dtype, moved_bytes(node, graph, sizes))
