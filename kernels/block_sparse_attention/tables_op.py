"""Contract of ``intarsia.block_sparse_attention_tables``, whose table is arrays, and of what makes these of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.attention.op import no_kernel, operands
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.block_sparse_attention import tables
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable

OPS = ("intarsia.block_tables", "intarsia.block_sparse_attention_tables")

REFERENCES = {
    "intarsia.block_tables": tables.block_tables,
    "intarsia.block_sparse_attention_tables": tables.block_sparse_attention_tables,
}

LAUNCHES = {"intarsia.block_sparse_attention_tables": "intarsia.kernels.block_sparse_attention.triton:launch"}

LEAST = 16
"""Queries and keys that tensor cores multiply at once; a block is a multiple of it."""


@torch.library.custom_op("intarsia::block_tables", mutates_args=())
def block_tables(blocks: str, order: str | None, keys: int, block_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (M, 3), columns (blocks computed), reach (N) and tokens (S or 0), i32, as ``tables.Tables`` says."""
    rows, columns, reach, tokens = tables.block_tables(blocks, order, keys, block_k)
    return rows, columns, reach, tokens


@block_tables.register_fake
def _(blocks: str, order: str | None, keys: int, block_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = BlockTable.parse(blocks)
    tokens = 0 if order is None else TokenOrder.parse(order).count
    shapes = ((len(table.rows), 3), (table.count,), (table.columns,), (tokens,))
    rows, columns, reach, places = (torch.empty(shape, dtype=torch.int32) for shape in shapes)
    return rows, columns, reach, places


@torch.library.custom_op("intarsia::block_sparse_attention_tables", mutates_args=())
def block_sparse_attention_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    reach: Tensor,
    tokens: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float | None,
) -> Tensor:
    """What ``intarsia.block_sparse_attention`` gives, from the arrays of ``intarsia.block_tables``: (B, H, S, D)."""
    found = tables.block_sparse_attention_tables(
        query, key, value, lengths, rows, columns, reach, tokens, block_q, block_k, scale
    )
    return found.transpose(1, 2).contiguous().transpose(1, 2)


@block_sparse_attention_tables.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    reach: Tensor,
    tokens: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float | None,
) -> Tensor:
    torch._check(query.ndim == 4, lambda: "block_sparse_attention_tables: query is (B, H, S, D)")
    torch._check(key.shape == value.shape, lambda: "block_sparse_attention_tables: key and value are alike")
    batch, heads, count, channels = query.shape
    return query.new_empty((batch, count, heads, channels)).transpose(1, 2)


@block_sparse_attention_tables.register_kernel("cuda")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    reach: Tensor,
    tokens: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float | None,
) -> Tensor:
    attention = {"query": query, "key": key, "value": value, "lengths": lengths}
    table = {"rows": rows, "columns": columns, "reach": reach, "tokens": tokens}
    others = {"block_q": block_q, "block_k": block_k, "scale": scale}
    return launch.run("intarsia.block_sparse_attention_tables", {**attention, **table, **others})


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; GPUs have a kernel for blocks of multiples of 16 only."""
    if node.op == "intarsia.block_tables":
        return None
    if reason := operands(node, graph) or _arrays(node, graph):
        return reason
    return (no_kernel(node, graph) or _no_tile(node)) if target.kind in limits.GPUS else None


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """Two products for each pair in the blocks, ends that are cut short counted whole; lengths are not looked at."""
    if node.op == "intarsia.block_tables":
        return Work(0.0, "f32", 0)
    blocks, tokens = (graph.type(node.ref(arg)).shape for arg in ("columns", "query"))
    pairs = cast("int", blocks[0]) * cast("int", node.args["block_q"]) * cast("int", node.args["block_k"])
    flops = 4.0 * pairs * node.type.elements(sizes) / cast("int", tokens[2])
    return Work(flops, node.type.dtype, moved_bytes(node, graph, sizes))


def _arrays(node: Node, graph: Graph) -> str | None:
    """Why the arrays are not of these queries and keys; None if they are."""
    for arg in ("rows", "columns", "reach", "tokens"):
        if isinstance(node.args[arg], Ref) and (reason := limits.dtype(node, arg, "i32", graph)):
            return reason
    for arg, operand, axis in (("rows", "query", "block_q"), ("reach", "key", "block_k")):
        block, found = cast("int", node.args[axis]), graph.type(node.ref(arg)).shape[0]
        tokens = graph.type(node.ref(operand)).shape[2]
        if not isinstance(tokens, int) or found != -(-tokens // block):
            return f"{arg} are {found} blocks of {block}; {operand} has {tokens} tokens"
    return None


def _no_tile(node: Node) -> str | None:
    sizes = (cast("int", node.args["block_q"]), cast("int", node.args["block_k"]))
    if all(size % LEAST == 0 for size in sizes):
        return None
    return f"blocks are {sizes[0]} queries x {sizes[1]} keys; on a GPU {node.op} takes multiples of {LEAST}"
