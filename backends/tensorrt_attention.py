"""Attention in another form where TensorRT has no kernel for it: in f32, and of a single head.

    in f32: Attention(%q, %k, %v, %mask)  ->  MatMul(Softmax(MatMul(%q * scale, Transpose(%k)) masked), %v)
    one head of one sample: two halves of its queries, as two heads that have the same keys

TensorRT-RTX 1.7 builds whole attention in f16 and bf16, with and without mask, and ends with "Attention operation was
not supported by a dedicated kernel" in f32, and wherever there are one sample and one head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from intarsia.backends.onnx_weights import Tape, value_of
from intarsia.backends.tensorrt_tape import Tape as GraphTape
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.rewrite import rewrite
from intarsia.ir.types import TensorType

if TYPE_CHECKING:
    import onnx_ir

_ATTENTIONS = ("aten.scaled_dot_product_attention", "intarsia.attention")


def halve_single_heads(graph: Graph) -> Graph:
    """The graph with two heads of half the queries wherever one head of one sample stands alone.

    Attention in f32 is computed in pieces in any case; a causal mask cannot be cut, so attention with one stays.
    """
    return rewrite(graph, lambda node: _halved(node, graph))


def _halved(node: Node, graph: Graph) -> Sequence[Node] | None:
    shape = node.type.shape if node.op in _ATTENTIONS else ()
    if len(shape) != 4 or shape[:2] != (1, 1) or node.type.dtype == "f32" or node.args.get("is_causal"):
        return None
    count = shape[2]
    if not isinstance(count, int):
        return None
    tape, half = GraphTape(node), (count + 1) // 2
    args = {**node.args, "query": _halves(tape, node.ref("query"), graph)}
    for key in ("key", "value"):
        name = node.ref(key)
        twice = TensorType(node.type.dtype, (1, 2, *graph.type(name).shape[2:]))
        args[key] = tape.call("aten.cat", f"{key}.twice", twice, tensors=(Ref(name), Ref(name)), dim=1)
    mask = node.args.get("attn_mask")
    if isinstance(mask, Ref) and graph.type(mask.name).shape[-2] == count:
        args["attn_mask"] = _halves(tape, mask.name, graph)
    answer = tape.call(node.op, "halves", TensorType(node.type.dtype, (1, 2, half, shape[3])), **args)
    whole = TensorType(node.type.dtype, (1, 1, 2 * half, shape[3]))
    answer = tape.call("aten.reshape", "whole", whole, self=answer, shape=whole.shape)
    if count % 2:
        tape.call("aten.slice.Tensor", "cut", node.type, self=answer, dim=2, start=0, end=count)
    return tape.nodes()


def _halves(tape: GraphTape, name: str, graph: Graph) -> Ref:
    """A tensor (1, 1, N, C) as (1, 2, N/2, C), behind an odd number of rows the first one again."""
    dtype = graph.type(name).dtype
    count, channels = (cast(int, extent) for extent in graph.type(name).shape[-2:])
    value = Ref(name)
    if count % 2:
        flat, row, even = (TensorType(dtype, (rows, channels)) for rows in (count, 1, count + 1))
        value = tape.call("aten.reshape", f"{name}.rows", flat, self=value, shape=flat.shape)
        first = tape.call("aten.slice.Tensor", f"{name}.first", row, self=value, dim=0, start=0, end=1)
        value = tape.call("aten.cat", f"{name}.even", even, tensors=(value, first), dim=0)
    type_ = TensorType(dtype, (1, 2, (count + 1) // 2, channels))
    return tape.call("aten.reshape", f"{name}.halves", type_, self=value, shape=type_.shape)


def spell_out(graph: onnx_ir.Graph) -> None:
    """Replace every attention in f32 that has as many heads of keys as of queries."""
    import onnx_ir as ir

    for node in [node for node in graph if node.op_type == "Attention"]:
        query, key = value_of(node, 0), value_of(node, 1)
        grouped = _heads(node, query, "q_num_heads") != _heads(node, key, "kv_num_heads")
        if query.dtype == ir.DataType.FLOAT and not grouped:
            tape = Tape(node)
            tape.take_place(_pieces(node, tape))


def _pieces(node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
    """The answer, laid out like the query: (B, H, S, D) or (B, S, H*D)."""
    query, key, value = (value_of(node, index) for index in range(3))
    heads, flat, channels = _heads(node, query, "q_num_heads"), _rank(query) == 3, _extent(query, -1)
    if flat:
        split = number(tape, [0, 0, heads, -1], "INT64")
        apart = (tape.op("Reshape", tensor, split) for tensor in (query, key, value))
        query, key, value = (tape.op("Transpose", tensor, perm=[0, 2, 1, 3]) for tensor in apart)
    given = node.attributes.get("scale")
    scale = given.as_float() if given is not None else 1 / math.sqrt(channels // heads if flat else channels)
    scaled = tape.op("Mul", query, number(tape, scale, "FLOAT"))
    scores = tape.op("MatMul", scaled, tape.op("Transpose", key, perm=[0, 1, 3, 2]))
    answer = tape.op("MatMul", tape.op("Softmax", _masked(node, tape, scores), axis=-1), value)
    if not flat:
        return answer
    return tape.op("Reshape", tape.op("Transpose", answer, perm=[0, 2, 1, 3]), number(tape, [0, 0, -1], "INT64"))


def _masked(node: onnx_ir.Node, tape: Tape, scores: onnx_ir.Value) -> onnx_ir.Value:
    """The scores with those not attended to at the lowest number of f32, so that a row without keys has no NaN."""
    import numpy as np
    import onnx_ir as ir

    mask = node.inputs[3] if len(node.inputs) > 3 else None
    lowest = number(tape, float(np.finfo(np.float32).min), "FLOAT")
    if "is_causal" in node.attributes and node.attributes["is_causal"].as_int():
        extents = tape.op("Shape", scores, start=2)
        ones = tape.op("Expand", number(tape, 1, "INT32"), extents)
        lower = tape.op("Cast", tape.op("Trilu", ones, upper=0), to=int(ir.DataType.BOOL))
        scores = tape.op("Where", lower, scores, lowest)
    if mask is None:
        return scores
    return tape.op("Where", mask, scores, lowest) if mask.dtype == ir.DataType.BOOL else tape.op("Add", scores, mask)


def number(tape: Tape, value: float | list[int], dtype: str) -> onnx_ir.Value:
    """A constant of this element type."""
    import numpy as np
    import onnx_ir as ir

    kind = ir.DataType[dtype]
    return tape.op("Constant", value=ir.tensor(np.array(value, kind.numpy()), dtype=kind))


def _heads(node: onnx_ir.Node, value: onnx_ir.Value, attribute: str) -> int:
    return _extent(value, 1) if _rank(value) == 4 else node.attributes[attribute].as_int()


def _rank(value: onnx_ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _extent(value: onnx_ir.Value, axis: int) -> int:
    assert value.shape is not None
    extent: Any = value.shape[axis]
    return int(extent)
