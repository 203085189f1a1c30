"""Operators that have an integer form only between grids: functions, softmax, norms, products of two activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.types import TensorType
from intarsia.passes.quantize_integer_roles import source

FUNCTION, SOFTMAX, NORM, PRODUCT, SCALED = "function", "softmax", "norm", "product", "scaled"


@dataclass(frozen=True)
class Island:
    """What such an operator does, and the values that it reads in integers.

    Attributes:
        function: Which one, for a function; a name that ``intarsia.function_table`` knows.
        factor: What a ``scaled`` value is multiplied with: its codes are those of its operand.
    """

    kind: str
    reads: tuple[str, ...]
    function: str = ""
    factor: float = 1.0


def island(node: Node, graph: Graph) -> Island | str | None:
    """The island that the node is, or why it has no integer form; None if it is something else."""
    reader = _READERS.get(node.op)
    return None if reader is None else reader(node, graph)


def _function(node: Node, graph: Graph) -> Island | str | None:
    name = node.op.split(".")[1]
    if name == "gelu" and node.args.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    return Island(FUNCTION, (node.ref("self"),), function=name)


def _softmax(node: Node, graph: Graph) -> Island | str | None:
    axis, rank = node.args["dim"], len(node.type.shape)
    if not isinstance(axis, int) or axis % rank != rank - 1:
        return f"a softmax over axis {axis} of {rank} has no integer form; one over the last axis has"
    if graph.type(node.ref("self")).dtype != node.type.dtype:
        return "a softmax that changes the element type has no integer form"
    return Island(SOFTMAX, (node.ref("self"),))


def _norm(node: Node, graph: Graph) -> Island | str | None:
    extents = node.args["normalized_shape"]
    if not isinstance(extents, tuple) or len(extents) != 1:
        return f"a norm over {extents} has no integer form; one over the last axis has"
    return Island(NORM, (node.ref("input"),))


def _product(node: Node, graph: Graph) -> Island | str | None:
    names = (node.ref("self"), node.ref("mat2" if "mat2" in node.args else "other"))
    one, other = (graph.type(name).shape for name in names)
    if len(one) != len(other) or len(one) < 2 or one[:-2] != other[:-2]:
        return f"a product of {list(one)} and {list(other)} has no integer form; equal axes before the last two have"
    return Island(PRODUCT, names)


def _multiplied(node: Node, graph: Graph) -> Island | str | None:
    return _scaled(node, node.args["other"], lambda number: number)


def _divided(node: Node, graph: Graph) -> Island | str | None:
    return None if node.args.get("rounding_mode") else _scaled(node, node.args["other"], lambda number: 1 / number)


def _scaled(node: Node, number: Arg, factor: Callable[[float], float]) -> Island | None:
    below = source(node)
    if below is None or isinstance(number, bool | Ref) or not isinstance(number, int | float) or not number > 0:
        return None
    return (
        Island(SCALED, (below,), factor=factor(float(number))) if isinstance(node.outputs[0].type, TensorType) else None
    )


_READERS: Mapping[str, Callable[[Node, Graph], Island | str | None]] = {
    **dict.fromkeys(("aten.gelu", "aten.silu", "aten.sigmoid", "aten.tanh"), _function),
    **dict.fromkeys(("aten.softmax.int", "aten._softmax"), _softmax),
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _norm),
    **dict.fromkeys(("aten.matmul", "aten.bmm"), _product),
    **dict.fromkeys(("aten.mul.Tensor", "aten.mul.Scalar"), _multiplied),
    **dict.fromkeys(("aten.div.Tensor", "aten.div.Scalar"), _divided),
}
"""What reads each operator."""
