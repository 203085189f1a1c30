"""Contract of ``intarsia.attention``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.sizes import evaluate
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.attention import reference
from intarsia.kernels.base import Work, moved_bytes

OPS = ("intarsia.attention",)

REFERENCES = {"intarsia.attention": reference.attention}

LAUNCHES = {"intarsia.attention": "intarsia.kernels.attention.triton:launch"}

HEAD_DIMS = (32, 64, 128)
"""Channels of a head that the GPU kernel takes: Wan and HunyuanVideo have 128, CogVideoX and LTX 64, wan-mini 32."""


@torch.library.custom_op("intarsia::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scale: float | None) -> Tensor:
    """Query (B, H, S, D), key and value (B, H, T, D), lengths integers (B): (B, H, S, D), heads after tokens in memory.

    That is how the linear layer after it reads the heads side by side without a copy.
    """
    return reference.attention(query, key, value, lengths, scale).transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scale: float | None) -> Tensor:
    torch._check(query.ndim == 4, lambda: f"attention: query is (B, H, S, D), found {query.ndim} axes")
    batch, heads, tokens, channels = query.shape
    expected = (batch, heads, key.shape[2], channels)
    for name, tensor in (("key", key), ("value", value)):
        torch._check(tensor.shape == expected, lambda: f"attention: {name} is {expected}, found {tuple(tensor.shape)}")  # noqa: B023
        torch._check(tensor.dtype == query.dtype, lambda: f"attention: {name} is {query.dtype}, found {tensor.dtype}")  # noqa: B023
    if lengths is not None:
        torch._check(lengths.shape == (batch,), lambda: f"attention: lengths is ({batch},)")
        torch._check(not lengths.is_floating_point(), lambda: f"attention: lengths are integers, not {lengths.dtype}")
    return query.new_empty((batch, tokens, heads, channels)).transpose(1, 2)


@attention.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scale: float | None) -> Tensor:
    arguments = {"query": query, "key": key, "value": value, "lengths": lengths, "scale": scale}
    return launch.run("intarsia.attention", arguments)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; GPUs have a kernel for some head dimensions and element types only."""
    reason = operands(node, graph)
    return reason or (no_kernel(node, graph) if target.kind in limits.GPUS else None)


def operands(node: Node, graph: Graph) -> str | None:
    """Why query, key, value and lengths are none of attention; None if they are."""
    query, key, value = (graph.type(node.ref(arg)) for arg in ("query", "key", "value"))
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; {node.op} takes one element type"
    if len(query.shape) != 4 or key.shape != (*query.shape[:2], key.shape[-2], query.shape[3]) or value != key:
        return f"query is {query}, key {key}, value {value}; {node.op} takes (B, H, S, D) and twice (B, H, T, D)"
    lengths = node.args.get("lengths")
    if isinstance(lengths, Ref) and graph.type(lengths.name).dtype not in ("i32", "i64"):
        return f"lengths is {graph.type(lengths.name).dtype}; {node.op} takes i32, i64"
    return None


def no_kernel(node: Node, graph: Graph) -> str | None:
    """Why there is no kernel for the call on a GPU; None if there is one."""
    channels, scale = graph.type(node.ref("query")).shape[3], node.args.get("scale")
    if channels not in HEAD_DIMS:
        return f"a head has {channels} channels; on a GPU {node.op} takes {', '.join(map(str, HEAD_DIMS))}"
    if isinstance(scale, float) and scale <= 0:
        return f"scale is {scale}; on a GPU {node.op} takes a positive number"
    return limits.floating(node, "query", graph)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """Two products for each query and key; lengths, which are data, are not looked at."""
    keys = evaluate(graph.type(node.ref("key")).shape[2], sizes)
    return Work(4.0 * node.type.elements(sizes) * keys, node.type.dtype, moved_bytes(node, graph, sizes))
