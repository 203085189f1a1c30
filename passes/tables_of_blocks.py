"""Make the tables of sparse attention arrays, for backends whose kernels read them from memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import fresh, rewrite
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.op import block_size, order_text
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.base import Pass

TEXTS, ARRAYS = "intarsia.block_sparse_attention", "intarsia.block_sparse_attention_tables"

Key = tuple[str, str | None, int, int]
"""What tables are made of: blocks, order, keys, keys of a block."""


@dataclass(frozen=True)
class TablesOfBlocks(Pass):
    """Give sparse attention its table as arrays, made once for all calls with the same table.

        %y: f32[B, H, 64, D] = intarsia.block_sparse_attention(query=%q, ..., blocks="4:0-1;0-2;1-3;2-3", ...)

    becomes

        %y.rows: i32[4, 3], %y.columns: i32[10], %y.reach: i32[4], %y.tokens: i32[0] = intarsia.block_tables(...)
        %y: f32[B, H, 64, D] = intarsia.block_sparse_attention_tables(query=%q, ..., rows=%y.rows, ..., tokens=None)

    The first call needs no input, so that ``materialize`` runs it at build and the arrays are parameters.
    """

    name: ClassVar[str] = "tables-of-blocks"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with arrays in place of all texts of tables."""
        made: dict[Key, Node] = {}

        def rule(node: Node) -> Sequence[Node] | None:
            if node.op != TEXTS:
                return None
            key = _key(node, graph)
            known = made.get(key)
            tables = made.setdefault(key, known or _tables(node, key, graph))
            return (_attention(node, tables),) if known else (tables, _attention(node, tables))

        return rewrite(graph, rule)


def _key(node: Node, graph: Graph) -> Key:
    keys = cast("int", graph.type(node.ref("key")).shape[2])
    return str(node.args["blocks"]), order_text(node), keys, block_size(node, "block_k")


def _tables(node: Node, key: Key, graph: Graph) -> Node:
    """The call that makes the arrays."""
    blocks, order, keys, block_k = key
    table = BlockTable.parse(blocks)
    shapes = {
        "rows": (len(table.rows), 3),
        "columns": (table.count,),
        "reach": (table.columns,),
        "tokens": (0 if order is None else keys,),
    }
    outputs = tuple(
        Value(fresh(f"{node.name}.{name}", graph.values), TensorType("i32", shape)) for name, shape in shapes.items()
    )
    args = {"blocks": blocks, "order": order, "keys": keys, "block_k": block_k}
    return Node("intarsia.block_tables", args, outputs, node.source)


def _attention(node: Node, tables: Node) -> Node:
    """The same attention by the arrays that ``tables`` makes."""
    rows, columns, reach, tokens = (Ref(value.name) for value in tables.outputs)
    args = {
        **{name: node.args[name] for name in ("query", "key", "value", "lengths")},
        "rows": rows,
        "columns": columns,
        "reach": reach,
        "tokens": None if tables.args["order"] is None else tokens,
        **{name: node.args[name] for name in ("block_q", "block_k", "scale")},
    }
    return replace(node, op=ARRAYS, args=args)
