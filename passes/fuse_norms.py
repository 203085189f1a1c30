"""Norms over channels as graphs spell them: layer norms, and RMS norms whole or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.operators import DTYPES
from intarsia.ir.sizes import Dim
from intarsia.passes.fuse_candidates import operands, produced, uncast


@dataclass(frozen=True)
class Norm:
    """A norm of the value ``input`` over its last axes.

    Attributes:
        kind: ``layer norm`` or ``RMS norm``.
        name: The value that the norm gives.
        extents: Of the axes that are normed together.
        weight: What the normed value is multiplied by, or None.
        bias: What is added then, or None.
    """

    kind: str
    name: str
    input: str
    extents: tuple[Dim, ...]
    weight: Arg
    bias: Arg
    eps: float


def norm_of(name: str, graph: Graph) -> Norm | None:
    """The norm that gives the value; None if no norm does."""
    node = graph.producers.get(name)
    if node is None:
        return None
    if node.op == "aten.layer_norm":
        return _whole(node, "layer norm", 1e-5, graph)
    if node.op == "aten.rms_norm":
        dtype = DTYPES[graph.type(node.ref("input")).dtype]
        return _whole(node, "RMS norm", torch.finfo(dtype).eps, graph)
    return _weighted(node, graph) or _pieces(node, graph)


def _whole(node: Node, kind: str, otherwise: float, graph: Graph) -> Norm:
    shape, eps = node.args["normalized_shape"], node.args.get("eps")
    assert isinstance(shape, tuple)
    input = node.ref("input")
    extents = graph.type(input).shape[-len(shape) :]
    epsilon = float(eps) if isinstance(eps, int | float) else otherwise
    return Norm(kind, node.name, input, extents, node.args.get("weight"), node.args.get("bias"), epsilon)


def _weighted(node: Node, graph: Graph) -> Norm | None:
    """An RMS norm in pieces, multiplied by a weight for each channel."""
    for normed, weight in _factors(node):
        inner = graph.producers.get(uncast(normed, graph)[-1])
        norm = _pieces(inner, graph) if inner is not None else None
        if norm is not None and graph.type(weight).shape == norm.extents:
            return Norm(norm.kind, node.name, norm.input, norm.extents, Ref(weight), None, norm.eps)
    return None


def _pieces(node: Node, graph: Graph) -> Norm | None:
    """``x * rsqrt(mean(x ** 2, -1) + eps)``."""
    for input, factor in _factors(node):
        root = produced(factor, graph, "aten.rsqrt")
        total = produced(root.ref("self"), graph, "aten.add.Tensor") if root else None
        mean = produced(total.ref("self"), graph, "aten.mean.dim") if total else None
        square = produced(mean.ref("self"), graph, "aten.pow.Tensor_Scalar") if mean else None
        if total is None or mean is None or square is None:
            continue
        eps, rank = total.args.get("other"), len(square.type.shape)
        last = mean.args["dim"] in ((-1,), (rank - 1,)) and mean.args.get("keepdim") is True
        same = uncast(square.ref("self"), graph)[-1] == uncast(input, graph)[-1]
        if last and same and square.args["exponent"] == 2 and isinstance(eps, float):
            return Norm("RMS norm", node.name, input, node.type.shape[-1:], None, None, eps)
    return None


def _factors(node: Node) -> Sequence[tuple[str, str]]:
    pair = operands(node) if node.op == "aten.mul.Tensor" else None
    return ((pair[0], pair[1]), (pair[1], pair[0])) if pair else ()
