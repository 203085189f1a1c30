"""Which values certainly lie in memory row by row, proved from the operators that make them.

A graph has no strides: what a value is does not depend on how it lies. But kernels round alike only when their inputs
also lie alike, so a pass that must not change a single bit removes a copy only where nothing moves.
"""

from __future__ import annotations

from intarsia.ir.graph import Graph, Node, Ref, Symbol
from intarsia.ir.types import TensorType

ALLOCATE = frozenset(
    {
        "aten.arange",
        "aten.arange.start",
        "aten.arange.start_step",
        "aten.empty.memory_format",
        "aten.layer_norm",
        "aten.linear",
        "aten.stack",
        "intarsia.linear_i4",
        "intarsia.linear_i8",
    }
)
"""Operators that allocate their result row by row whatever they are given.

``linear`` ends in ``mm`` or ``addmm`` and ``layer_norm`` in its native kernel, which allocate so on every device.
"""

FOLLOW = frozenset(
    {
        "aten._to_copy",
        "aten._unsafe_view",
        "aten.alias",
        "aten.clone",
        "aten.cos",
        "aten.detach",
        "aten.dropout",
        "aten.empty_like",
        "aten.exp",
        "aten.flatten.using_ints",
        "aten.gelu",
        "aten.neg",
        "aten.relu",
        "aten.reshape",
        "aten.rms_norm",
        "aten.rsqrt",
        "aten.sigmoid",
        "aten.silu",
        "aten.sin",
        "aten.squeeze.dim",
        "aten.tanh",
        "aten.to.dtype",
        "aten.type_as",
        "aten.unflatten.int",
        "aten.unsqueeze",
        "aten.view",
    }
)
"""Operators whose result lies row by row if their first tensor does: elementwise, preserving copies, views."""

COMBINE = frozenset({"aten.add.Tensor", "aten.div.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"})
"""Operators whose result lies row by row if both operands do, broadcast or not."""


def contiguous(graph: Graph) -> frozenset[str]:
    """Names of the tensors that certainly lie row by row; inputs and parameters are the caller's, so unknown."""
    known: set[str] = set()
    for node in graph.nodes:
        if isinstance(node.outputs[0].type, TensorType) and _is_contiguous(node, known):
            known.add(node.name)
    return frozenset(known)


def _is_contiguous(node: Node, known: set[str]) -> bool:
    match node.args.get("memory_format"):
        case Symbol("torch.contiguous_format"):
            return True
        case None | Symbol("torch.preserve_format"):
            pass
        case _:
            return False
    if node.op == "aten.stack":
        return _stacks_innermost(node)
    if node.op in ALLOCATE:
        return True
    keys = ("self", "other") if node.op in COMBINE else ("self", "input")
    return node.op in FOLLOW | COMBINE and all(_lies(node.args.get(key), known) for key in keys)


def _lies(arg: object, known: set[str]) -> bool:
    return not isinstance(arg, Ref) or arg.name in known


def _stacks_innermost(node: Node) -> bool:
    """Whether the stacked axis is the last: then no input can make ``stack`` choose a channels-last result."""
    return node.args.get("dim", 0) in (-1, len(node.type.shape) - 1)
