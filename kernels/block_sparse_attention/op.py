"""Contract of ``intarsia.block_sparse_attention``, and of ``intarsia.integers``, which names heads and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from intarsia.ir.errors import SpecError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels import launch, limits
from intarsia.kernels.attention.op import no_kernel, operands
from intarsia.kernels.base import Work, moved_bytes
from intarsia.kernels.block_sparse_attention import reference
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.kernels.block_sparse_attention.tables import tables_on

OPS = ("intarsia.block_sparse_attention", "intarsia.integers")

REFERENCES = {
    "intarsia.block_sparse_attention": reference.block_sparse_attention,
    "intarsia.integers": reference.integers,
}

LAUNCHES: Mapping[str, str] = {}


@torch.library.custom_op("intarsia::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    blocks: str,
    order: str | None,
    block_q: int,
    block_k: int,
    scale: float | None,
    mean: float = 0.0,
) -> Tensor:
    """Attention that computes the blocks of a table only: (B, H, S, D), heads after tokens in memory.

    Shapes and meaning are those of ``reference.block_sparse_attention``.
    """
    found = reference.block_sparse_attention(query, key, value, lengths, blocks, order, block_q, block_k, scale, mean)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


@block_sparse_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    blocks: str,
    order: str | None,
    block_q: int,
    block_k: int,
    scale: float | None,
    mean: float = 0.0,
) -> Tensor:
    torch._check(query.ndim == 4, lambda: f"block_sparse_attention: query is (B, H, S, D), found {query.ndim} axes")
    batch, heads, tokens, channels = query.shape
    torch._check(key.shape == value.shape, lambda: "block_sparse_attention: key and value are alike")
    torch._check(key.shape[1] == heads, lambda: f"block_sparse_attention: {heads} heads, {key.shape[1]} of keys")
    reason = _misfit(blocks, order, (int(tokens), int(key.shape[2])), (block_q, block_k))
    torch._check(reason is None, lambda: f"block_sparse_attention: {reason}")
    return query.new_empty((batch, tokens, heads, channels)).transpose(1, 2)


@block_sparse_attention.register_kernel("cuda")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    blocks: str,
    order: str | None,
    block_q: int,
    block_k: int,
    scale: float | None,
    mean: float = 0.0,
) -> Tensor:
    if reason := _misfit(blocks, order, (query.shape[2], key.shape[2]), (block_q, block_k)):
        raise ValueError(f"block_sparse_attention: {reason}")
    tables = tables_on(query.device, blocks, order, key.shape[2], block_k)
    arrays = {**tables._asdict(), "tokens": None if order is None else tables.tokens}
    attention = {"query": query, "key": key, "value": value, "lengths": lengths, "scale": scale}
    found = launch.run(
        "intarsia.block_sparse_attention_tables", {**attention, **arrays, "block_q": block_q, "block_k": block_k}
    )
    return found if mean == 0 else found * (1 - mean) + reference.mean_value(value, lengths) * mean


@torch.library.custom_op("intarsia::integers", mutates_args=())
def integers(runs: str) -> Tensor:
    """The numbers that a ``TokenOrder`` text stands for: i64 (N)."""
    return reference.integers(runs)


@integers.register_fake
def _(runs: str) -> Tensor:
    return torch.empty(TokenOrder.parse(runs).count, dtype=torch.int64)


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand here, or None; GPUs have a kernel for some head dimensions and element types only."""
    if node.op == "intarsia.integers":
        return None
    reason = operands(node, graph) or _table(node, graph)
    return reason or (no_kernel(node, graph) if target.kind in limits.GPUS else None)


def _table(node: Node, graph: Graph) -> str | None:
    """Why the call's table and order are not of its tokens; None if they are."""
    tokens, keys = (graph.type(node.ref(arg)).shape[2] for arg in ("query", "key"))
    if not isinstance(tokens, int) or not isinstance(keys, int):
        return f"{tokens} queries and {keys} keys; {node.op} takes fixed numbers of tokens: trace without --dynamic"
    sizes = (block_size(node, "block_q"), block_size(node, "block_k"))
    return _misfit(str(node.args["blocks"]), order_text(node), (tokens, keys), sizes)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """Two products for each pair of a query and a key that the table computes; lengths are not looked at."""
    if node.op == "intarsia.integers":
        return Work(0.0, "f32", 0)
    query, key = graph.type(node.ref("query")), graph.type(node.ref("key"))
    tokens, keys = cast("int", query.shape[2]), cast("int", key.shape[2])
    pairs = _pairs(str(node.args["blocks"]), tokens, keys, block_size(node, "block_q"), block_size(node, "block_k"))
    flops = 4.0 * pairs * node.type.elements(sizes) / tokens
    return Work(flops, node.type.dtype, moved_bytes(node, graph, sizes))


def block_size(node: Node, axis: str) -> int:
    """Tokens of a block of queries (``block_q``) or of keys (``block_k``)."""
    return cast("int", node.args[axis])


def order_text(node: Node) -> str | None:
    """The text of the call's order of tokens; None where they stand as they come."""
    order = node.args.get("order")
    return None if order is None else str(order)


@lru_cache(maxsize=1024)
def _pairs(blocks: str, queries: int, keys: int, block_q: int, block_k: int) -> int:
    return BlockTable.parse(blocks).pairs(queries, keys, block_q, block_k)


@lru_cache(maxsize=1024)
def _misfit(blocks: str, order: str | None, tokens: tuple[int, int], sizes: tuple[int, int]) -> str | None:
    """Why table and order are not of these tokens (queries, keys) in blocks of these sizes; None if they are."""
    if min(sizes) < 1:
        return f"blocks are {sizes[0]} queries x {sizes[1]} keys; both are at least 1"
    try:
        table = BlockTable.parse(blocks)
        places = TokenOrder.parse(order) if order is not None else None
        if places is not None:
            places.inverse()
    except (SpecError, ValueError) as error:
        return str(error)
    expected = tuple(-(-count // size) for count, size in zip(tokens, sizes, strict=True))
    if (len(table.rows), table.columns) != expected:
        return (
            f"the table has {len(table.rows)} x {table.columns} blocks; {tokens[0]} queries and {tokens[1]} keys in "
            f"blocks of {sizes[0]} x {sizes[1]} need {expected[0]} x {expected[1]}"
        )
    if places is not None and not places.count == tokens[0] == tokens[1]:
        return f"the order names {places.count} tokens; there are {tokens[0]} queries and {tokens[1]} keys"
    return None
