"""Rows written into a tensor at given places, in ONNX: one copy of the tensor, and of each row."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any


def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
    """``aten.index_copy``: self (..., N, ...) with source (..., A, ...) at the places index (A) of axis ``dim``.

    ScatterND writes where the first axes say. So the axes up to ``dim`` become one, whose places are numbered through,
    and neither tensor is turned; where their extents are not fixed, both are.
    """
    from onnxscript import opset23 as op

    shape = self.shape
    rank = len(shape)
    dim %= rank
    if not all(isinstance(extent, int) for extent in shape):
        return _turned(self, dim, index, source, rank=rank)
    count = prod(shape[:dim])
    starts = _numbers([number * shape[dim] for number in range(count)], (count, 1))
    places = op.Reshape(op.Add(starts, index), _numbers([-1, 1], (2,)))
    row = _numbers([-1, prod(shape[dim + 1 :])], (2,))
    written = op.ScatterND(op.Reshape(self, row), places, op.Reshape(source, row))
    return op.Reshape(written, _numbers(list(shape), (rank,)))


def _turned(self: Any, dim: int, index: Any, source: Any, *, rank: int) -> Any:
    """The same with axis ``dim`` in front."""
    from onnxscript import opset23 as op

    order = [dim, *(axis for axis in range(rank) if axis != dim)]
    back = [order.index(axis) for axis in range(rank)]
    places = op.Unsqueeze(index, _numbers([-1], (1,)))
    written = op.ScatterND(op.Transpose(self, perm=order), places, op.Transpose(source, perm=order))
    return op.Transpose(written, perm=back)


def _numbers(numbers: Sequence[int], shape: tuple[int, ...]) -> Any:
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset23 as op

    return op.Constant(value=ir.tensor(np.array(numbers, np.int64).reshape(shape)))
