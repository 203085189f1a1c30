"""Block-sparse attention in ONNX: the keys of each piece of ``Gathers`` gathered, and a dense attention of them.

    key, value = Gather(key, order), Gather(value, order)                              where there is an order
    Scan(queries (G, Q), blocks (G, k, 1)) { Gather(query), Gather(key), Gather(value), Attention } -> (B, H, G, Q, D)
    Gather(Concat(the answers of all pieces), answers)                                 where they are not in place

A Scan holds the scores of one group of queries at a time, near the processor, and makes a handful of nodes of a table
of thousands of blocks. Measured with ONNX Runtime 1.31 on one core of an AMD EPYC with AVX2, two heads of 64 channels,
each query before a window of a quarter of 8,192 keys:

    one dense Attention of all keys                       603 ms
    each piece one batched Attention                      141 ms
    a node for each group of queries                      126 ms
    Scan, keys by Gather                                  134 ms
    Scan, keys by Slice                                   140 ms
    Scan, keys put in another order by the step's Gather  162 ms, of 16,384 keys 602 ms
    Scan, keys put in another order before it             161 ms, of 16,384 keys 563 ms

MatMul, Softmax, MatMul in place of Attention took as long as it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch

from intarsia.backends import onnx_islands
from intarsia.backends.onnx_integers import IntegerWeights
from intarsia.backends.onnx_islands import Islands
from intarsia.backends.onnx_operators import private, translations
from intarsia.backends.onnx_weights import Tape, value_of
from intarsia.kernels.block_sparse_attention.gathers import Gathers, Piece
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable

if TYPE_CHECKING:
    import onnx_ir

QUERIES = 256
"""Of a step at most, where many share their keys; with 128 to 1,024 it takes up to a tenth longer."""


def spellings() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx spells operators for ONNX Runtime, block-sparse attention as a call of the private domain."""
    sparse: Mapping[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.intarsia.block_sparse_attention.default: _block_sparse_attention
    }
    return {**translations(), **onnx_islands.translations(), **sparse}


class RuntimeWeights(IntegerWeights):
    """Weights as ONNX Runtime computes with them, and block-sparse attention, whose tables are constants too."""

    def spellings(self) -> Mapping[str, Callable[[onnx_ir.Node, Tape], onnx_ir.Value]]:
        """What writes each call of the private domain on the tape and gives its answer."""
        return {**super().spellings(), **Islands(self).spellings(), "block_sparse_attention": self.sparse}

    def sparse(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """Attention of query (B, H, S, D) to the blocks of key and value (B, H, T, D): (B, H, S, D)."""
        query, key, value = (value_of(node, index) for index in range(3))
        found = _gathers(node)
        if not found.pieces:
            return tape.op("Expand", self._zero(query), tape.op("Shape", query))
        attended = self._attended(node, found, tape)
        if found.order is not None:
            key, value = (tape.op("Gather", tensor, self._indices(found.order), axis=2) for tensor in (key, value))
        call = _Call(query, key, value, attended, node.attributes["scale"].as_float())
        shape = self.number("i64", [0, 0, -1, _channels(query)])
        parts = [tape.op("Reshape", self._scanned(piece, call, found, tape), shape) for piece in found.pieces]
        answers = tape.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
        if found.zeros:
            answers = tape.op("Pad", answers, self.number("i64", [0, 0, 0, 0, 0, 0, 1, 0]))
        return answers if found.answers is None else tape.op("Gather", answers, self._indices(found.answers), axis=2)

    def _attended(self, node: onnx_ir.Node, found: Gathers, tape: Tape) -> onnx_ir.Value | None:
        """Whether the token at each position is one of the call's ``lengths`` (B): booleans (B, 1, 1, T)."""
        import numpy as np
        import onnx_ir as ir

        if len(node.inputs) < 4:
            return None
        tokens = np.arange(_tokens(value_of(node, 1))) if found.order is None else found.order
        counts = tape.op("Cast", value_of(node, 3), to=int(ir.DataType.INT64))
        counts = tape.op("Reshape", counts, self.number("i64", [-1, 1, 1, 1]))
        return tape.op("Less", self._indices(tokens), counts)

    def _scanned(self, piece: Piece, call: _Call, found: Gathers, tape: Tape) -> onnx_ir.Value:
        """The answers of a piece, its groups one after the other: (B, H, G, Q, D)."""
        import onnx_ir as ir

        queries = piece.queries if found.order is None else found.order[piece.queries]
        alike = bool((piece.blocks == piece.blocks[0]).all()) and piece.padding is None
        inputs = {"queries": queries}
        if not alike:
            inputs["blocks"] = piece.blocks[:, :, None] * piece.block
        if piece.padding is not None:
            inputs["padding"] = piece.padding * piece.block
        slots = {name: _slot(name, rows.shape[1:]) for name, rows in inputs.items()}
        body = Tape(tape.replaced)
        places = self._indices(piece.keys[0]) if alike else self._places(piece, slots["blocks"], body)
        keys = self._keys(call, places, tape if alike else body)
        kept = self._kept(keys.attended, piece, slots.get("padding"), body)
        answer = self._attention(keys, slots["queries"], kept, queries.shape[1], body)
        answer.dtype = call.query.dtype
        for index, made in enumerate(body.nodes):
            made.name = made.outputs[0].name = f"step/{made.op_type}_{index}"
        graph = ir.Graph(list(slots.values()), [answer], nodes=body.nodes, name="step")
        rows = [self._indices(array) for array in inputs.values()]
        return tape.op("Scan", *rows, body=graph, num_scan_inputs=len(rows), scan_output_axes=[2])

    def _places(self, piece: Piece, first: onnx_ir.Value, body: Tape) -> onnx_ir.Value:
        """The positions of a group's keys (K), from the ``first`` of each of its blocks (k, 1)."""
        import numpy as np
        import onnx_ir as ir

        wide = body.op("Add", first, self._indices(np.arange(piece.block)))
        places = body.op("Reshape", wide, self.number("i64", [-1]))
        if piece.cut:
            places = body.op("Slice", places, self.number("i64", [0]), self.number("i64", [-piece.cut]))
        # Shape inference does not see in a step what a constant beside the Scan holds.
        places.dtype, places.shape = ir.DataType.INT64, ir.Shape([piece.keys_per_group])
        return places

    def _keys(self, call: _Call, places: onnx_ir.Value, tape: Tape) -> _Call:
        """The call with the keys at ``places`` only."""
        key, value = (tape.op("Gather", tensor, places, axis=2) for tensor in (call.key, call.value))
        attended = None if call.attended is None else tape.op("Gather", call.attended, places, axis=3)
        return replace(call, key=key, value=value, attended=attended)

    def _kept(
        self, attended: onnx_ir.Value | None, piece: Piece, padding: onnx_ir.Value | None, body: Tape
    ) -> onnx_ir.Value | None:
        """Which of its keys a group attends to, (K) or (B, 1, 1, K): ``attended`` without ``padding``; None if all."""
        import numpy as np

        if padding is None:
            return attended
        real = body.op("GreaterOrEqual", self._indices(np.arange(piece.keys_per_group)), padding)
        return real if attended is None else body.op("And", attended, real)

    def _attention(
        self, call: _Call, queries: onnx_ir.Value, kept: onnx_ir.Value | None, count: int, body: Tape
    ) -> onnx_ir.Value:
        """The answers (B, H, Q, D) to ``count`` queries, zeros where no key is kept."""
        import onnx_ir as ir

        query = body.op("Gather", call.query, queries, axis=2)
        if kept is None:
            return body.op("Attention", query, call.key, call.value, scale=call.scale)
        # ONNX Runtime 1.31 does not broadcast a mask of one row to all queries.
        mask = body.op("Expand", kept, self.number("i64", [count, 1]))
        answer = body.op("Attention", query, call.key, call.value, mask, scale=call.scale)
        if call.attended is None:
            return answer
        some = body.op("ReduceMax", body.op("Cast", kept, to=int(ir.DataType.INT32)), self.number("i64", [3]))
        return body.op("Mul", answer, body.op("CastLike", some, query))

    def _indices(self, numbers: Any) -> onnx_ir.Value:
        """The array as an initializer, one for all that are equal."""
        extents = "x".join(map(str, numbers.shape))
        return self.array(f"indices.{extents}.{sha256(numbers.tobytes()).hexdigest()[:16]}", numbers)

    def _zero(self, like: onnx_ir.Value) -> onnx_ir.Value:
        import numpy as np

        assert like.dtype is not None
        return self.array(f"zero.{like.dtype.name}", np.zeros((), like.dtype.numpy()))


@dataclass(frozen=True)
class _Call:
    """Operands of an attention; ``attended`` says which keys count (B, 1, 1, T), None if all do."""

    query: onnx_ir.Value
    key: onnx_ir.Value
    value: onnx_ir.Value
    attended: onnx_ir.Value | None
    scale: float


def _block_sparse_attention(  # noqa: PLR0917
    query: Any,
    key: Any,
    value: Any,
    lengths: Any,
    blocks: str,
    order: str | None,
    block_q: int,
    block_k: int,
    scale: float | None,
) -> Any:
    attributes = ("blocks: STRING", "order: STRING", "block_q", "block_k", "scale: FLOAT")
    call = private("block_sparse_attention", ("query", "key", "value", "lengths"), *attributes)
    sizes = {"block_q": block_q, "block_k": block_k}
    factor = query.shape[3] ** -0.5 if scale is None else scale
    return call(query, key, value, lengths, blocks=blocks, order=order or "", scale=factor, **sizes)


def _gathers(node: onnx_ir.Node) -> Gathers:
    blocks, order = (node.attributes[key].as_string() for key in ("blocks", "order"))
    sizes = tuple(node.attributes[key].as_int() for key in ("block_q", "block_k"))
    return _planned(blocks, order, (_tokens(value_of(node, 0)), _tokens(value_of(node, 1))), sizes)


@lru_cache(maxsize=64)
def _planned(blocks: str, order: str, tokens: tuple[int, int], sizes: tuple[int, ...]) -> Gathers:
    return Gathers.of(
        BlockTable.parse(blocks),
        TokenOrder.parse(order) if order else None,
        queries=tokens[0],
        keys=tokens[1],
        block_q=sizes[0],
        block_k=sizes[1],
        most=QUERIES,
    )


def _tokens(value: onnx_ir.Value) -> int:
    """The third extent of (B, H, S, D)."""
    return _extent(value, 2)


def _channels(value: onnx_ir.Value) -> int:
    """The last extent of (B, H, S, D)."""
    return _extent(value, 3)


def _extent(value: onnx_ir.Value, axis: int) -> int:
    assert value.shape is not None
    extent = value.shape[axis]
    assert isinstance(extent, int), "why_not lets no named number of tokens or channels through"
    return extent


def _slot(name: str, shape: tuple[int, ...]) -> onnx_ir.Value:
    """What a step of a Scan gets of one of its inputs: i64."""
    import onnx_ir as ir

    return ir.Value(name=f"step/{name}", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape))
