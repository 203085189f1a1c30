"""Sparse attention of some of the tokens: their rows of the mask, looked up in the table of blocks."""

from __future__ import annotations

from dataclasses import replace

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Node, Ref, Value
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.op import block_size, order_text
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.active_tape import Tape
from intarsia.passes.attention_sites import DENSE
from intarsia.passes.token_places import Place

Key = tuple[str, str | None, int, int, int]
"""What a mask is made of: blocks, order, tokens, queries and keys of a block."""


class SparseRows:
    """The masks of active queries on a tape, one for all calls with the same table.

    A block of queries holds active ones and others, so that no block is whole: the products of all keys are made, and
    the mask leaves out what the pattern does. The numbers are those of the pattern; the time is that of all keys.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._tables: dict[Key, tuple[Value, ...]] = {}
        self._masks: dict[tuple[Key, Place], str] = {}

    def dense(self, node: Node, tokens: int, place: Place) -> Node:
        """The call as attention under a mask (queries that are active, all keys).

        Args:
            node: A call of block-sparse attention among ``tokens`` tokens.
            place: Where the video's tokens lie in its queries.

        Raises:
            Unsupported: Part of its result is a mean, its keys end early, or a query has no key.
        """
        blocks = str(node.args["blocks"])
        for reason, found in (
            ("its heads blend in the mean of all values", node.args.get("mean")),
            ("its keys end early", node.args.get("lengths")),
            ("some of its queries have no key", not all(BlockTable.parse(blocks).rows)),
        ):
            if found:
                raise Unsupported(f"step allocation: %{node.name} is sparse attention, and {reason}: not built")
        key = (blocks, order_text(node), tokens, block_size(node, "block_q"), block_size(node, "block_k"))
        args = {name: node.args[name] for name in ("query", "key", "value")}
        mask = Ref(self._mask(key, place, node.name))
        return replace(node, op=DENSE, args={**args, "attn_mask": mask, "scale": node.args.get("scale")})

    def _mask(self, key: Key, place: Place, name: str) -> str:
        """The mask b1 (active queries, tokens)."""
        if (key, place) not in self._masks:
            tape, along = self._tape, replace(place, dim=0)
            allowed, queries, keys = self._table(key, name)
            numbers = tape.select(queries.name, _type(queries), along)
            rows, columns = tape.few(_type(queries), along).shape[0], _type(allowed).shape[1]
            some = tape.call(
                "aten.index_select",
                f"{name}.allowed",
                TensorType("b1", (rows, columns)),
                self=Ref(allowed.name),
                dim=0,
                index=Ref(numbers),
            )
            self._masks[key, place] = tape.call(
                "aten.index_select",
                f"{name}.mask",
                TensorType("b1", (rows, key[2])),
                self=Ref(some),
                dim=1,
                index=Ref(keys.name),
            )
        return self._masks[key, place]

    def _table(self, key: Key, name: str) -> tuple[Value, ...]:
        if key not in self._tables:
            blocks, order, tokens, block_q, block_k = key
            table = BlockTable.parse(blocks)
            types = (
                TensorType("b1", (len(table.rows), table.columns)),
                TensorType("i64", (tokens,)),
                TensorType("i64", (tokens,)),
            )
            names = ("blocks", "query_blocks", "key_blocks")
            made = tuple(
                Value(self._tape.free(f"{name}.{each}"), type_) for each, type_ in zip(names, types, strict=True)
            )
            args = {"blocks": blocks, "order": order, "tokens": tokens, "block_q": block_q, "block_k": block_k}
            self._tape.nodes.append(Node("intarsia.block_mask", args, made))
            self._tables[key] = made
        return self._tables[key]


def _type(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type
