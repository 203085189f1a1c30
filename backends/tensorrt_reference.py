"""The typed ONNX of a TensorRT engine on the CPU: computed in f32, rounded after each node to the type in the file.

ONNX Runtime has no kernels for most operators in bf16 and few in f16 on a CPU. So each tensor of sixteen bits is held
in f32 and, where a node computes it, cast to its own type and back: what a GPU that accumulates in f32 gives, up to the
order of sums.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from intarsia.backends.base import Engine
from intarsia.backends.onnx import OnnxEngine
from intarsia.ir.errors import QualityError

if TYPE_CHECKING:
    import onnx_ir

_MOVES = ("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice",
          "Split", "Squeeze", "Transpose", "Unsqueeze", "Where")  # fmt: skip
"""Operators that move numbers and compute none: rounding again would change nothing."""


class ReferenceEngine(Engine):
    """What the file says, run by ONNX Runtime; inputs and outputs in the graph's element types."""

    def __init__(self, model: Path) -> None:
        import onnx_ir as ir
        from google.protobuf.message import DecodeError

        try:
            found = ir.load(model)
        except DecodeError as error:
            raise QualityError(f"{model} is no ONNX model: {error}") from error
        self._outputs = [_torch_dtype(value.dtype) for value in found.graph.outputs]
        widen(found)
        with tempfile.TemporaryDirectory() as folder:
            wide = Path(folder) / "wide.onnx"
            ir.save(found, wide, external_data="wide.onnx.data")
            self._engine = OnnxEngine(wide)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the file's operators give."""
        wide = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in inputs)
        return tuple(out.to(dtype) for out, dtype in zip(self._engine(*wide), self._outputs, strict=True))

    @property
    def device(self) -> str:
        """What stands in for the GPU."""
        return f"reference: the typed ONNX on {self._engine.device}, rounded to its types after each node"


def widen(model: onnx_ir.Model) -> None:
    """Hold every tensor of sixteen bits in f32, rounded where it is computed."""
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    passes.ShapeInferencePass()(model)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        if value.dtype in halves:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.const_value is not None:
                value.const_value = _wide(value.const_value, value.name)
    for node in list(model.graph):
        rounded = [value for value in node.outputs if value.dtype in halves]
        _widen_attributes(node, halves)
        for value in rounded:
            dtype = value.dtype
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if node.op_type not in _MOVES:
                _round(model.graph, node, value, int(dtype))


def _wide(tensor: Any, name: str | None) -> Any:
    import numpy as np
    import onnx_ir as ir

    return ir.Tensor(tensor.numpy().astype(np.float32), name=name)


def _widen_attributes(node: onnx_ir.Node, halves: tuple[Any, ...]) -> None:
    """Element types and constants among the node's attributes."""
    import onnx_ir as ir

    for key in ("to", "output_dtype", "dtype", "softmax_precision"):
        if key in node.attributes and node.attributes[key].as_int() in map(int, halves):
            node.attributes[key] = ir.AttrInt64(key, int(ir.DataType.FLOAT))
    if "value" in node.attributes and node.attributes["value"].as_tensor().dtype in halves:
        node.attributes["value"] = ir.AttrTensor("value", _wide(node.attributes["value"].as_tensor(), None))


def _round(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value, dtype: int) -> None:
    """Cast ``value`` to ``dtype`` and back wherever it is used, under its own name."""
    import onnx_ir as ir

    down = ir.node("Cast", [value], {"to": dtype}, name=f"{node.name}/down")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/up")
    up.outputs[0].type, up.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    up.outputs[0].name, value.name = value.name, f"{value.name}/unrounded"
    for user, index in [use for use in value.uses() if use.node is not down]:
        user.replace_input_with(index, up.outputs[0])
    for index, out in enumerate(graph.outputs):
        if out is value:
            graph.outputs[index] = up.outputs[0]
    graph.insert_after(node, [down, up])


def _torch_dtype(dtype: Any) -> torch.dtype:
    import onnx_ir as ir

    named = {
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
        ir.DataType.INT64: torch.int64,
        ir.DataType.INT32: torch.int32,
        ir.DataType.INT8: torch.int8,
        ir.DataType.UINT8: torch.uint8,
        ir.DataType.BOOL: torch.bool,
    }
    return named[dtype]
