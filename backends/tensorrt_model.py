"""A program as TensorRT reads it: ONNX with an element type on everything and quantization spelled out.

    %q: i8 = intarsia.quantize_static(%x, scale)         QuantizeLinear
    %x: f16 = intarsia.dequantize_static(%q, scale)      DequantizeLinear(output_dtype=f16)
    %y = intarsia.linear_i8(%x, %w, %s)                  DequantizeLinear(%w (C, R), axis=1) -> MatMul
    %y = intarsia.linear_i4(%x, %p, %s, group)           DequantizeLinear(%p (C, R), axis=0, block_size=group) -> MatMul
    %y: i8 = intarsia.conv2d_i8i8(%q, %w, ...)           DequantizeLinear(both) -> Conv -> QuantizeLinear
    %q: f8e4m3 = aten._to_copy(%x)                       QuantizeLinear with scale 1

TensorRT computes such a triple in integers. It has no dyadic numbers: a multiplier b / 2**c becomes the scale of its
channel, in f32, and rounds half to even where ours rounds half up (docs/tensorrt.md says how often that differs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from intarsia.backends.onnx_fusion import fuse
from intarsia.backends.onnx_model import Dialect
from intarsia.backends.onnx_operators import translations
from intarsia.backends.onnx_weights import Tape, Weights, constant, product, value_of
from intarsia.backends.tensorrt_attention import halve_single_heads, spell_out
from intarsia.backends.tensorrt_integers import lowered
from intarsia.backends.tensorrt_sparse import gather_keys
from intarsia.ir.graph import Graph, Node, Symbol
from intarsia.ir.rewrite import rewrite

if TYPE_CHECKING:
    import onnx_ir

SCALINGS = ("intarsia.quantize_static", "intarsia.dequantize_static")
"""Operators of ours that are one of ONNX's."""

_CASTS = ("aten._to_copy", "aten.to.dtype")
_F8 = "f8e4m3"


@torch.library.custom_op("intarsia_tensorrt::conv2d_i8", mutates_args=())
def conv2d_i8(  # noqa: PLR0917
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Input (N, C, H, W), weight int8 (O, C/groups, kh, kw), scale f32 (O), bias (O): in input's dtype."""
    wide = (weight.float() * scale.reshape(-1, 1, 1, 1)).to(input.dtype)
    return torch.nn.functional.conv2d(input, wide, bias, list(stride), list(padding), list(dilation), groups)


@conv2d_i8.register_fake
def _(  # noqa: PLR0917
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    wide = weight.new_empty(weight.shape, dtype=input.dtype)
    return torch.nn.functional.conv2d(input, wide, bias, list(stride), list(padding), list(dilation), groups)


@torch.library.custom_op("intarsia_tensorrt::cast_f8", mutates_args=())
def cast_f8(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Input to or from f8e4m3, of any extents, in ``dtype``; what is too large for f8 becomes its largest."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    inside = input.clamp(-largest, largest) if dtype == torch.float8_e4m3fn else input
    return inside.to(dtype).clone()


@cast_f8.register_fake
def _(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def lower(graph: Graph) -> Graph:
    """The graph in operators that have a spelling below."""
    spelled = gather_keys(rewrite(graph, lambda node: _lowered(node, graph)))
    return fuse(halve_single_heads(spelled))


def _lowered(node: Node, graph: Graph) -> Sequence[Node] | None:
    if node.op in _CASTS and _F8 in (node.type.dtype, graph.type(node.ref("self")).dtype):
        dtype = Symbol("torch.float8_e4m3fn") if node.type.dtype == _F8 else node.args["dtype"]
        return [replace(node, op="intarsia_tensorrt.cast_f8", args={"input": node.args["self"], "dtype": dtype})]
    return lowered(node, graph)


def spellings() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx spells operators, those of integers as TensorRT fuses them."""
    ours = torch.ops.intarsia
    return {
        **translations(),
        ours.quantize_static.default: _quantize,
        ours.dequantize_static.default: _dequantize,
        torch.ops.intarsia_tensorrt.conv2d_i8.default: _conv2d_i8,
        torch.ops.intarsia_tensorrt.cast_f8.default: _cast_f8,
    }


def _quantize(input: Any, scale: float, low: int = -128, high: int = 127) -> Any:
    """Codes of int8; other ends are clipped to before (``tensorrt_integers``)."""
    from onnxscript import opset23 as op

    return op.QuantizeLinear(input, _number(scale, "FLOAT"), _number(0, "INT8"))


def _dequantize(input: Any, scale: float, dtype: int) -> Any:
    from onnxscript import opset23 as op

    return op.DequantizeLinear(input, _number(scale, "FLOAT"), _number(0, "INT8"), output_dtype=dtype)


def _cast_f8(input: Any, dtype: int) -> Any:
    import onnx_ir as ir
    from onnxscript import opset23 as op

    zero = _number(0, "FLOAT8E4M3FN")
    if dtype == ir.DataType.FLOAT8E4M3FN:
        return op.QuantizeLinear(input, _number(1.0, "FLOAT"), zero)
    return op.DequantizeLinear(input, _number(1.0, "FLOAT"), zero, output_dtype=dtype)


def _conv2d_i8(  # noqa: PLR0917
    input: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    from onnxscript import opset23 as op

    wide = op.DequantizeLinear(weight, scale, axis=0, output_dtype=int(input.dtype))
    window = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation), "group": groups}
    return op.Conv(input, wide, bias, **window)


def _number(number: float, dtype: str) -> Any:
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset23 as op

    kind = ir.DataType[dtype]
    return op.Constant(value=ir.tensor(np.array(number, kind.numpy()), dtype=kind))


class TransposedWeights(Weights):
    """Narrow weights as (C, R), dequantized to the activations' element type at once: what TensorRT fuses."""

    def store(self) -> None:
        """Rewrite every call of the private domain, and attention where TensorRT has it in pieces only."""
        super().store()
        spell_out(self.graph)

    def eight_bits(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """The weight int8 (C, R), a scale for each of its columns."""
        weight, scale = value_of(node, 1), value_of(node, 2)
        tensor = constant(weight)
        shape = tuple(reversed(tensor.shape.numpy()))
        narrow = self.initializer(weight, "transposed", tensor.dtype, shape, lambda: tensor.numpy().T)
        return self._dequantized(node, tape, narrow, scale, axis=1)

    def four_bits(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """The weight int4 (C, R), a scale for each group of its rows, (C/group, R), in the activations' element type.

        TensorRT takes blocks with scales of the result's element type only, so those of f16 and bf16 are rounded.
        """
        import onnx_ir as ir

        packed, scale = value_of(node, 1), value_of(node, 2)
        tensor, scales = constant(packed), constant(scale)
        rows, half = tensor.shape.numpy()
        narrow = self.initializer(
            packed, "i4.transposed", ir.DataType.INT4, (2 * half, rows), lambda: _codes(tensor.numpy())
        )
        shape = tuple(reversed(scales.shape.numpy()))
        dtype = value_of(node, 0).dtype
        assert dtype is not None
        blocks = self.initializer(
            scale, f"{dtype.name.lower()}.transposed", dtype, shape, lambda: _scales(scales.numpy().T, dtype)
        )
        return self._dequantized(node, tape, narrow, blocks, axis=0, block_size=node.attributes["group"].as_int())

    def _dequantized(
        self, node: onnx_ir.Node, tape: Tape, narrow: onnx_ir.Value, scale: onnx_ir.Value, **blocks: int
    ) -> onnx_ir.Value:
        dtype = value_of(node, 0).dtype
        assert dtype is not None
        return product(node, tape, tape.op("DequantizeLinear", narrow, scale, output_dtype=int(dtype), **blocks))


def _codes(packed: Any) -> Any:
    """Codes (C, R) in -8..7 from packed u8 (R, C/2), as numpy holds four bits."""
    import ml_dtypes
    import numpy as np

    nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1)
    return ((nibbles.astype(np.int8) ^ 8) - 8).T.astype(ml_dtypes.int4)


def _scales(scales: Any, dtype: onnx_ir.DataType) -> Any:
    """Positive scales in ``dtype``: one too small for it, of a group of zeros, becomes its smallest number."""
    import ml_dtypes
    import numpy as np

    kind = dtype.numpy()
    smallest = ml_dtypes.finfo(kind).smallest_subnormal  # type: ignore[no-untyped-call]
    return np.maximum(scales, np.float32(smallest)).astype(kind)


TENSORRT = Dialect(fuse=lower, translations=spellings, weights=TransposedWeights)
"""What TensorRT wants written in its own way."""
