"""What ONNX has whole and PyTorch has in pieces, as PyTorch operators, and how operators are spelled in ONNX.

``intarsia_onnx::rotary`` and ``intarsia_onnx::attention`` stand in graphs between ``onnx_fusion.fuse`` and the export.
The products with weights leave the export as calls of a private domain, which ``onnx_model`` replaces: only there can
a weight be stored in eight and four bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from intarsia.backends.onnx_tokens import index_copy

POSITIONS = "intarsia_onnx.positions"
ROTARY = "intarsia_onnx.rotary"
ATTENTION = "intarsia_onnx.attention"

RUNTIME = "com.microsoft"
"""Domain of the operators that ONNX Runtime adds to ONNX's own."""

DOMAIN = "intarsia"
"""Of the calls that ``onnx_model`` replaces; none is left in a file."""

OPSET = 23
"""The first with Attention, RMSNormalization and RotaryEmbedding; ONNX Runtime 1.31 runs up to 26."""

_FLOAT, _INT8, _INT64 = 1, 3, 7
"""Numbers of element types in ``onnx.TensorProto``."""

_INTEGER_LAYER = ("input", "weight", "multiplier", "shift", "bias")


@torch.library.custom_op("intarsia_onnx::positions", mutates_args=())
def positions(input: Tensor) -> Tensor:
    """0 to S-1 for each row of input (B, S, ...): int64 (B, S)."""
    return torch.arange(input.shape[1]).expand(input.shape[:2]).contiguous()


@positions.register_fake
def _(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[:2], dtype=torch.int64)


@torch.library.custom_op("intarsia_onnx::rotary", mutates_args=())
def rotary(input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int) -> Tensor:
    """Input (B, S, heads*D) or (B, S, heads, D), neighbouring pairs turned by cos and sin (P, D/2) at positions (B, S).

    Gives (B, S, heads, D).
    """
    even, odd = input.reshape(*input.shape[:2], heads, -1, 2).unbind(-1)
    cos, sin = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3)


@rotary.register_fake
def _(input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int) -> Tensor:
    return input.new_empty((*input.shape[:2], heads, 2 * cos.shape[1]))


@torch.library.custom_op("intarsia_onnx::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Query (B, S, H, D), key (B, T, H, D), value (B, T, H, E), heads beside channels: (B, S, H, E).

    ``mask`` is that of ``scaled_dot_product_attention``; keys from ``lengths`` (B) on are not attended to.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if lengths is not None:
        mask = (torch.arange(key.shape[2]) < lengths[:, None])[:, None, None, :]
    answer = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    return answer.transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx spells our operators, and the products with weights, in ONNX."""
    return {
        torch.ops.intarsia_onnx.positions.default: _positions,
        torch.ops.intarsia_onnx.rotary.default: _rotary,
        torch.ops.intarsia_onnx.attention.default: _attention,
        torch.ops.intarsia.attention.default: _attention_of_lengths,
        torch.ops.aten.scaled_dot_product_attention.default: _attention_of_heads,
        torch.ops.aten.index_copy.default: index_copy,
        torch.ops.aten.linear.default: _linear,
        torch.ops.intarsia.linear_i8.default: _linear_i8,
        torch.ops.intarsia.linear_i4.default: _linear_i4,
        torch.ops.intarsia.linear_i8i8.default: _linear_i8i8,
        torch.ops.intarsia.conv2d_i8i8.default: _conv2d_i8i8,
        torch.ops.intarsia.requantize.default: _requantize,
        torch.ops.intarsia.add_requantized.default: _add_requantized,
        torch.ops.intarsia.avg_pool2d_i8.default: _avg_pool2d_i8,
        torch.ops.intarsia.quantize_static.default: _quantize_static,
        torch.ops.intarsia.dequantize_static.default: _dequantize_static,
        torch.ops.intarsia.unpack_i4.default: _unpack_i4,
    }


def _positions(input: Any) -> Any:
    from onnxscript import opset23 as op

    count = op.Squeeze(op.Shape(input, start=1, end=2))
    return op.Expand(op.Range(0, count, 1), op.Shape(input, start=0, end=2))


def _rotary(input: Any, cos: Any, sin: Any, positions: Any, heads: int) -> Any:
    from onnxscript import opset23 as op

    flat = op.Reshape(input, [0, 0, -1])
    turned = op.RotaryEmbedding(flat, cos, sin, positions, interleaved=1, num_heads=heads)
    return op.Reshape(turned, [0, 0, heads, -1])


def _attention(
    query: Any, key: Any, value: Any, mask: Any = None, lengths: Any = None, *, is_causal: bool, scale: float | None
) -> Any:
    """Heads stay beside channels: ONNX Runtime reads them strided, which saves four transpositions."""
    from onnxscript import opset23 as op

    heads, kv_heads = query.shape[2], key.shape[2]
    flat = [op.Reshape(tensor, [0, 0, -1]) for tensor in (query, key, value)]
    if lengths is not None:
        mask = _attended(lengths, op.Shape(key, start=1, end=2))
    whole = _for_every_query(mask, op.Shape(query, start=1, end=2))
    given: dict[str, Any] = {} if scale is None else {"scale": scale}
    given |= {"q_num_heads": heads, "kv_num_heads": kv_heads, "is_causal": int(is_causal)}
    answer = op.Reshape(op.Attention(*flat, whole, **given)[0], [0, 0, heads, -1])
    return answer if lengths is None else _zero_without_keys(answer, lengths, query)


def _attention_of_lengths(query: Any, key: Any, value: Any, lengths: Any = None, scale: float | None = None) -> Any:
    """``intarsia::attention``, heads before tokens."""
    from onnxscript import opset23 as op

    mask = None if lengths is None else _attended(lengths, op.Shape(key, start=2, end=3))
    answer = _attention_of_heads(query, key, value, mask, scale=scale)
    return answer if lengths is None else _zero_without_keys(answer, lengths, query)


def _attention_of_heads(  # noqa: PLR0917
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` of four axes, heads before tokens."""
    from onnxscript import opset23 as op

    if dropout_p or len(query.shape) != 4:
        raise ValueError(f"attention with dropout {dropout_p} on {len(query.shape)} axes; ONNX has it on 4, without")
    mask = _for_every_query(attn_mask, op.Shape(query, start=2, end=3))
    given: dict[str, Any] = {} if scale is None else {"scale": scale}
    return op.Attention(query, key, value, mask, is_causal=int(is_causal), **given)[0]


def _attended(lengths: Any, keys: Any) -> Any:
    """Which of the ``keys`` (1) a row attends to: booleans (B, 1, 1, T)."""
    from onnxscript import opset23 as op

    positions = op.Range(0, op.Squeeze(keys), 1)
    return op.Less(positions, op.Reshape(op.Cast(lengths, to=_INT64), [-1, 1, 1, 1]))


def _for_every_query(mask: Any, queries: Any) -> Any:
    """A mask that is one row for all ``queries`` (1), repeated for each: ONNX Runtime 1.31 does not broadcast it."""
    from onnxscript import opset23 as op

    if mask is None or (mask.shape is not None and mask.shape[-2] != 1):
        return mask
    return op.Expand(mask, op.Concat(queries, op.Shape(mask, start=-1), axis=0))


def _zero_without_keys(answer: Any, lengths: Any, query: Any) -> Any:
    """Zeros for a row that attends to no key; ONNX Runtime gives the mean of all values there."""
    from onnxscript import opset23 as op

    return op.Mul(answer, op.Reshape(op.CastLike(op.Greater(op.Cast(lengths, to=_INT64), 0), query), [-1, 1, 1, 1]))


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return private("linear", ("input", "weight", "bias"))(input, weight, bias)


def _linear_i8(input: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    return private("linear_i8", ("input", "weight", "scale", "bias"))(input, weight, scale, bias)


def _linear_i4(input: Any, packed: Any, scale: Any, bias: Any = None, group: int = 0) -> Any:
    return private("linear_i4", ("input", "packed", "scale", "bias"), "group")(input, packed, scale, bias, group=group)


def _linear_i8i8(  # noqa: PLR0917
    input: Any, weight: Any, bias: Any, multiplier: Any, shift: Any, low: int = -128, high: int = 127
) -> Any:
    call = private("linear_i8i8", _INTEGER_LAYER, "low", "high")
    return call(input, weight, multiplier, shift, bias, low=low, high=high)


def _conv2d_i8i8(  # noqa: PLR0917
    input: Any,
    weight: Any,
    bias: Any,
    multiplier: Any,
    shift: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int = -128,
    high: int = 127,
) -> Any:
    window = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
    keys = ("stride: INTS", "padding: INTS", "dilation: INTS", "groups", "low", "high")
    call = private("conv2d_i8i8", _INTEGER_LAYER, *keys)
    return call(input, weight, multiplier, shift, bias, **window, groups=groups, low=low, high=high)


def _requantize(  # noqa: PLR0917
    input: Any, multiplier: Any, shift: Any, axis: int, low: int = -128, high: int = 127
) -> Any:
    call = private("requantize", ("input", "multiplier", "shift"), "axis", "low", "high")
    return call(input, multiplier, shift, axis=axis, low=low, high=high)


def _add_requantized(  # noqa: PLR0917
    input: Any,
    other: Any,
    multiplier: Any,
    shift: Any,
    other_multiplier: Any,
    other_shift: Any,
    low: int = -128,
    high: int = 127,
) -> Any:
    inputs = ("input", "other", "multiplier", "shift", "other_multiplier", "other_shift")
    call = private("add_requantized", inputs, "low", "high")
    return call(input, other, multiplier, shift, other_multiplier, other_shift, low=low, high=high)


def _avg_pool2d_i8(  # noqa: PLR0917
    input: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    multiplier: Any,
    shift: Any,
    low: int = -128,
    high: int = 127,
) -> Any:
    window = {"kernel_size": list(kernel_size), "stride": list(stride), "padding": list(padding)}
    keys = ("kernel_size: INTS", "stride: INTS", "padding: INTS", "low", "high")
    call = private("avg_pool2d_i8", ("input", "multiplier", "shift"), *keys)
    return call(input, multiplier, shift, **window, low=low, high=high)


def _quantize_static(input: Any, scale: float, low: int = -128, high: int = 127) -> Any:
    return private("quantize_static", ("input",), "scale: FLOAT", "low", "high")(input, scale=scale, low=low, high=high)


def _dequantize_static(input: Any, scale: float, dtype: int) -> Any:
    from onnxscript import opset23 as op

    real = op.Mul(op.Cast(input, to=_FLOAT), op.Constant(value_float=scale))
    return real if dtype == _FLOAT else op.Cast(real, to=dtype)


def _unpack_i4(packed: Any) -> Any:
    """Two's complement of four bits is (code xor 8) - 8."""
    from onnxscript import opset23 as op

    halves = op.BitwiseAnd(packed, _bytes(15)), op.BitShift(packed, _bytes(4), direction="RIGHT")
    codes = op.Reshape(op.Concat(*(op.Unsqueeze(half, [-1]) for half in halves), axis=-1), [0, -1])
    return op.Sub(op.Cast(op.BitwiseXor(codes, _bytes(8)), to=_INT8), op.Cast(op.Constant(value_int=8), to=_INT8))


def _bytes(number: int) -> Any:
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset23 as op

    return op.Constant(value=ir.tensor(np.array(number, np.uint8)))


@lru_cache
def private(name: str, inputs: Sequence[str], *attributes: str) -> Callable[..., Any]:
    """A call in the private domain: the last input optional, the output typed like the first.

    ``attributes`` are integers, or what follows the colon: ``stride: INTS``, ``blocks: STRING``, ``scale: FLOAT``.
    """
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    optional = OpSchema.FormalParameterOption.Optional
    kinds = {key: kind or "INT" for key, _, kind in (attribute.partition(": ") for attribute in attributes)}
    dtypes = ("float", "float16", "bfloat16", "double", "int8", "uint8", "int16", "int32", "int64")
    types = [f"tensor({dtype})" for dtype in dtypes]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            *(OpSchema.FormalParameter(key, f"T{index}") for index, key in enumerate(inputs[:-1])),
            OpSchema.FormalParameter(inputs[-1], f"T{len(inputs) - 1}", param_option=optional),
        ],
        outputs=[OpSchema.FormalParameter("output", "T0")],
        type_constraints=[(f"T{index}", types, "") for index in range(len(inputs))],
        attributes=[OpSchema.Attribute(key, OpSchema.AttrType[kind], "", required=True) for key, kind in kinds.items()],
    )
    call: Callable[..., Any] = Op(Opset(DOMAIN, 1), name, schema)
    return call
