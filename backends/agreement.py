"""When two answers to the same question count as the same: relative error within the element type's tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from intarsia.ir.graph import Graph
from intarsia.ir.types import TensorType

TOLERANCES: Mapping[str, float] = {"f64": 1e-9, "f32": 1e-4, "f16": 1e-2, "bf16": 5e-2}
"""Largest ||a - b|| / ||b|| of an output, by the coarsest element type in the graph.

Rounding in another order gives a hundredth to a fifth of it over a deep network (wan-mini in f32: 1e-6); a wrong kernel
gives more.
"""


QUANTIZED = 5e-2
"""The same where activations are rounded to eight bits: what differs in its last bit before may differ by a step after.

wan-mini with all linear layers so rounded: inputs moved by 1e-7 move eager's own answer by 1e-2.
"""


def tolerance(graph: Graph) -> float:
    """What separates rounding from error in ``graph``; 0 for one of integers, but for rounded inputs and outputs."""
    if _of_integers(graph):
        return 0.0
    dtypes = {value.type.dtype for value in graph.values.values() if isinstance(value.type, TensorType)}
    allowed = max((TOLERANCES[dtype] for dtype in dtypes & TOLERANCES.keys()), default=0.0)
    return max(allowed, QUANTIZED) if any(graph.find("intarsia.quantize_static")) else allowed


def _of_integers(graph: Graph) -> bool:
    """Whether floats are inputs that are rounded as they are, and outputs that are integers times a scale.

    Both are one operation of IEEE 754 on each number, which gives the same everywhere; integers are exact.
    """
    inputs, outputs = {value.name for value in graph.inputs}, set(graph.outputs)
    weights = {value.name for value in graph.params}
    for node in graph.nodes:
        read = {name for name in node.inputs if name not in weights and _is_float(name, graph)}
        made = {value.name for value in node.outputs if _is_float(value.name, graph)}
        if read and not (node.op == "intarsia.quantize_static" and read <= inputs):
            return False
        if made and not (node.op == "intarsia.dequantize_static" and made <= outputs):
            return False
    return any(graph.find("intarsia.quantize_static"))


def _is_float(name: str, graph: Graph) -> bool:
    type_ = graph.values[name].type
    return isinstance(type_, TensorType) and type_.dtype in TOLERANCES


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative error over the outputs: 0 for equal, inf for other shapes or numbers where there were none.

    For integers and booleans the share of elements that differ.
    """
    if len(found) != len(expected):
        return float("inf")
    return max((_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    if not (found.is_floating_point() or found.is_complex()):
        return float((found != expected).double().mean())
    finite = expected.isfinite()
    if not torch.equal(torch.where(finite, 0, expected).nan_to_num(), torch.where(finite, 0, found).nan_to_num()):
        return float("inf")
    difference = torch.where(finite, found - expected, 0).double().norm()
    scale = torch.where(finite, expected, 0).double().norm()
    return float(difference / scale) if scale > 0 else float(difference)
