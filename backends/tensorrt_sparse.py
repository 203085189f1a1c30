"""Block-sparse attention for TensorRT: the keys of each group of queries gathered, and dense attentions of them.

    %y.queries.0 = aten.index_select(%query, dim=2, index=tokens)    (B, H, G*Q, D), as (B, H*G, Q, D)
    %y.keys.0, %y.values.0                                           (B, H, G*K, D), as (B, H*G, K, D)
    %y.piece.0 = aten.scaled_dot_product_attention(...)              groups are heads: one Attention for all of them
    %y = aten.index_select(aten.cat(pieces), dim=2, index=answers)

Keys that several groups attend to are copied for each of them, so a piece is cut where its copies grow beyond
``COPIES``. Of ONNX's loops, which would hold the copies of one group at a time, the parser of TensorRT-RTX 1.7 does not
take Scan, and its builder takes Loop only without Attention inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from intarsia.backends.tensorrt_tape import Tape
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol
from intarsia.ir.rewrite import rewrite
from intarsia.ir.sizes import Dim
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.gathers import Gathers, Piece
from intarsia.kernels.block_sparse_attention.op import block_size, order_text
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable

SPARSE = "intarsia.block_sparse_attention"

COPIES = 1 << 28
"""Bytes of gathered keys and values that one attention reads at most, for each sample of the batch."""


def gather_keys(graph: Graph) -> Graph:
    """The graph with every block-sparse attention as gathers and dense attentions; equal lists of tokens are shared."""
    made: set[str] = set()

    def rule(node: Node) -> Sequence[Node] | None:
        if node.op != SPARSE:
            return None
        tape = Tape(node)
        _Attention(node, graph, tape).write()
        nodes = [new for new in tape.nodes() if new.name not in made]
        made.update(new.name for new in nodes)
        return nodes

    return rewrite(graph, rule)


@dataclass(frozen=True)
class _Attention:
    """One call, and the tape on which it is written in other operators."""

    node: Node
    graph: Graph
    tape: Tape

    def write(self) -> None:
        """Put gathers, attentions and what joins their answers on the tape."""
        found = self._gathers()
        cut = [part for piece in found.pieces for part in _parts(piece, self._most(piece))]
        answers = [self._piece(part, found.order, str(number)) for number, part in enumerate(cut)]
        if found.zeros:
            row = self._selected("query", np.array([0]), "row")
            answers.append(self.tape.call("aten.zeros_like", "zeros", self._type(1), self=row))
        if len(answers) > 1:
            count = sum(part.queries.size for part in cut) + found.zeros
            joined: tuple[Arg, ...] = tuple(answers)
            answers = [self.tape.call("aten.cat", "joined", self._type(count), tensors=joined, dim=2)]
        if found.answers is not None:
            places = self.tape.integers(found.answers)
            self.tape.call("aten.index_select", "placed", self.node.type, self=answers[0], dim=2, index=places)

    def _gathers(self) -> Gathers:
        queries, keys = (cast(int, self.graph.type(self.node.ref(arg)).shape[2]) for arg in ("query", "key"))
        order = order_text(self.node)
        return Gathers.of(
            BlockTable.parse(str(self.node.args["blocks"])),
            None if order is None else TokenOrder.parse(order),
            queries=queries,
            keys=keys,
            block_q=block_size(self.node, "block_q"),
            block_k=block_size(self.node, "block_k"),
        )

    def _most(self, piece: Piece) -> int:
        """Groups of the piece that one attention takes."""
        one = TensorType(self.node.type.dtype, (2, self._heads, piece.keys_per_group, self.node.type.shape[3]))
        return max(1, COPIES // one.bytes())

    def _piece(self, piece: Piece, order: NDArray[np.int64] | None, part: str) -> Ref:
        """The answers of the piece's queries, group after group: (B, H, G*Q, D)."""
        groups, queries = piece.queries.shape
        tokens = piece.keys if order is None else order[piece.keys]
        asked = piece.queries if order is None else order[piece.queries]
        query, key, value = (
            self._grouped(self._selected(arg, chosen, f"{arg}.{part}"), chosen.shape, f"{arg}_groups.{part}")
            for arg, chosen in (("query", asked), ("key", tokens), ("value", tokens))
        )
        mask, alive = self._masks(piece, tokens, part)
        type_ = TensorType(self.node.type.dtype, (self._batch, groups * self._heads, queries, self.node.type.shape[3]))
        given: dict[str, Arg] = {"query": query, "key": key, "value": value, "attn_mask": mask}
        given |= {"scale": self.node.args["scale"]}
        answer = self.tape.call("aten.scaled_dot_product_attention", f"piece.{part}", type_, **given)
        if alive is not None:
            zeros = self.tape.call("aten.zeros_like", f"none.{part}", type_, self=answer)
            args: dict[str, Arg] = {"condition": alive, "self": answer, "other": zeros}
            answer = self.tape.call("aten.where.self", f"some.{part}", type_, **args)
        return answer if groups == 1 else self._reshaped(answer, f"answers.{part}", self._type(groups * queries))

    def _masks(self, piece: Piece, tokens: NDArray[np.int64], part: str) -> tuple[Ref | None, Ref | None]:
        """Which keys each group attends to (B or 1, H*G, 1, K), and whether to any at all (B, H*G, 1, 1)."""
        mask = None if piece.padding is None else self._beyond(piece.padding * piece.block, tokens.shape[1], part)
        lengths = self.node.args.get("lengths")
        if not isinstance(lengths, Ref):
            return mask, None
        call, heads = self.tape.call, self._heads
        (groups, keys), rows = tokens.shape, self._heads * len(tokens)
        if self.graph.type(lengths.name).dtype != "i64":
            wide = TensorType("i64", (self._batch,))
            lengths = call("aten._to_copy", f"lengths.{part}", wide, self=lengths, dtype=Symbol("torch.int64"))
        ends = call("aten.unsqueeze", f"ends.{part}", TensorType("i64", (self._batch, 1)), self=lengths, dim=1)
        near = TensorType("b1", (self._batch, groups * keys))
        below = call("aten.lt.Tensor", f"below.{part}", near, self=self.tape.integers(tokens), other=ends)
        one, every = (TensorType("b1", (self._batch, count, groups * keys)) for count in (1, heads))
        below = call("aten.unsqueeze", f"below_one.{part}", one, self=below, dim=1)
        below = call("aten.expand", f"below_all.{part}", every, self=below, size=(-1, heads, -1))
        whole = TensorType("b1", (self._batch, rows, 1, keys))
        below = self._reshaped(below, f"attended.{part}", whole)
        if mask is not None:
            below = call("aten.logical_and", f"both.{part}", whole, self=below, other=mask)
        first = self.tape.integers(np.tile(tokens.min(1), heads))
        any_ = call("aten.lt.Tensor", f"any.{part}", TensorType("b1", (self._batch, rows)), self=first, other=ends)
        return below, self._reshaped(any_, f"alive.{part}", TensorType("b1", (self._batch, rows, 1, 1)))

    def _beyond(self, starts: NDArray[np.int64], keys: int, part: str) -> Ref:
        """That a key is none of the first ``starts`` (G) of its group: (1, H*G, 1, K)."""
        rows = self._heads * len(starts)
        begin = self.tape.integers(np.tile(starts, self._heads))
        column = self._reshaped(begin, f"starts.{part}", TensorType("i64", (1, rows, 1, 1)))
        type_ = TensorType("b1", (1, rows, 1, keys))
        return self.tape.call(
            "aten.ge.Tensor", f"kept.{part}", type_, self=self.tape.integers(np.arange(keys)), other=column
        )

    def _selected(self, arg: str, tokens: NDArray[np.int64], part: str) -> Ref:
        """These tokens of the argument, in this order: (B, H, N, D)."""
        source, chosen = cast(Ref, self.node.args[arg]), tokens.reshape(-1)
        first, end, count = int(chosen[0]), int(chosen[-1]) + 1, chosen.size
        if not np.array_equal(chosen, np.arange(first, end)):
            places = self.tape.integers(chosen)
            return self.tape.call("aten.index_select", part, self._type(count), self=source, dim=2, index=places)
        if count == self.graph.type(source.name).shape[2]:
            return source
        return self.tape.call("aten.slice.Tensor", part, self._type(count), self=source, dim=2, start=first, end=end)

    def _grouped(self, tensor: Ref, shape: tuple[int, ...], part: str) -> Ref:
        """Tokens (B, H, G*N, D) of ``shape`` (G, N) with groups beside heads: (B, H*G, N, D)."""
        groups, each = shape
        type_ = TensorType(self.node.type.dtype, (self._batch, self._heads * groups, each, self.node.type.shape[3]))
        return self._reshaped(tensor, part, type_) if groups > 1 else tensor

    def _reshaped(self, tensor: Ref, part: str, type_: TensorType) -> Ref:
        """The tensor with these extents; the batch may have a name."""
        return self.tape.call("aten.reshape", part, type_, self=tensor, shape=(-1, *type_.shape[1:]))

    def _type(self, tokens: int) -> TensorType:
        """Like the result, with another number of tokens."""
        batch, heads, _, channels = self.node.type.shape
        return TensorType(self.node.type.dtype, (batch, heads, tokens, channels))

    @property
    def _batch(self) -> Dim:
        return self.node.type.shape[0]

    @property
    def _heads(self) -> int:
        return cast(int, self.node.type.shape[1])


def _parts(piece: Piece, most: int) -> Iterator[Piece]:
    """The piece in parts of at most ``most`` groups."""
    for first in range(0, len(piece.queries), most):
        rows = slice(first, first + most)
        padding = None if piece.padding is None else piece.padding[rows]
        yield replace(piece, queries=piece.queries[rows], blocks=piece.blocks[rows], padding=padding)
