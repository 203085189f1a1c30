"""Rows written into a tensor at given places, in ONNX: a copy of the rows, and of the tensor unless it is the same."""

from __future__ import annotations

from typing import Any


def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
    """``aten.index_copy``: self (..., N, ...) with source (..., A, ...) at the places index (A) of axis ``dim``.

    ScatterND writes where the first axes say, so each row is told all its places up to ``dim``: what is written is the
    tensor itself, in its own shape, and a runtime that is given one buffer for both writes the rows only. Where the
    extents before ``dim`` are not fixed, axis ``dim`` comes to the front, and nothing can be written in place.
    """
    from onnxscript import opset23 as op

    shape = self.shape
    rank = len(shape)
    dim %= rank
    extents = list(shape[:dim])
    if not all(isinstance(extent, int) for extent in extents):
        return _turned(self, dim, index, source, rank=rank)
    places = op.Unsqueeze(index, _numbers([-1]))
    return op.ScatterND(self, _placed(places, extents) if extents else places, source)


def _placed(places: Any, extents: list[int]) -> Any:
    """The places (A, 1) of an axis behind ``extents`` (E, ...): those of all axes up to it (E, ..., A, rank)."""
    import numpy as np
    from onnxscript import opset23 as op

    before = np.stack(np.meshgrid(*map(np.arange, (*extents, 1)), indexing="ij"), axis=-1)
    last = np.zeros(len(extents) + 1, np.int64)
    last[-1] = 1
    return op.Add(op.Mul(places, _numbers(last)), _numbers(before))


def _turned(self: Any, dim: int, index: Any, source: Any, *, rank: int) -> Any:
    """The same with axis ``dim`` in front."""
    from onnxscript import opset23 as op

    order = [dim, *(axis for axis in range(rank) if axis != dim)]
    back = [order.index(axis) for axis in range(rank)]
    places = op.Unsqueeze(index, _numbers([-1]))
    written = op.ScatterND(op.Transpose(self, perm=order), places, op.Transpose(source, perm=order))
    return op.Transpose(written, perm=back)


def _numbers(numbers: Any) -> Any:
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset23 as op

    return op.Constant(value=ir.tensor(np.array(numbers, np.int64)))
