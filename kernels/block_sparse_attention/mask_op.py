"""Contract of ``intarsia.block_mask``: a table of blocks from which the mask of any queries can be looked up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node
from intarsia.ir.target import Target
from intarsia.kernels.base import Work
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable

OPS = ("intarsia.block_mask",)

LAUNCHES: Mapping[str, str] = {}


def reference(blocks: str, order: str | None, tokens: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``BlockTable`` as an array b1 (M, N), and the block of each token as a query and as a key, i64 (tokens).

    Query ``q`` attends to key ``k`` where ``allowed[query_blocks[q], key_blocks[k]]``; ``order`` is a ``TokenOrder``
    that says which token stands at each position, None where they stand as they come.
    """
    places = np.arange(tokens) if order is None else TokenOrder.parse(order).inverse()
    allowed = torch.from_numpy(BlockTable.parse(blocks).blocks().copy())
    return allowed, torch.from_numpy(places // block_q), torch.from_numpy(places // block_k)


REFERENCES = {"intarsia.block_mask": reference}


@torch.library.custom_op("intarsia::block_mask", mutates_args=())
def block_mask(
    blocks: str, order: str | None, tokens: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which blocks are computed, b1 (M, N), and the block of each token as a query and as a key, i64 (tokens)."""
    return reference(blocks, order, tokens, block_q, block_k)


@block_mask.register_fake
def _(blocks: str, order: str | None, tokens: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    table = BlockTable.parse(blocks)
    allowed = torch.empty((len(table.rows), table.columns), dtype=torch.bool)
    query_blocks, key_blocks = (torch.empty((tokens,), dtype=torch.int64) for _ in range(2))
    return allowed, query_blocks, key_blocks


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Never: it needs no input, and is run when an engine is built."""
    return None


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work:
    """None: it is run when an engine is built."""
    return Work(0.0, "f32", 0)
