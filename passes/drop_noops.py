"""Drop calls that give back what they were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Graph, Node, Ref, Symbol
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import rename_uses
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import Pass
from intarsia.passes.layout import Layouts, is_contiguous, layouts

ALIASES = frozenset({"aten.alias", "aten.detach", "aten.lift_fresh"})
"""Always their input: they matter to gradients and to changes in place, and a graph has neither."""

CASTS = frozenset({"aten.to.dtype", "aten.to.dtype_layout", "aten.to.other", "aten.type_as"})
"""Their input when the type stays, unless asked to copy."""

SHAPES = frozenset(
    {
        "aten._unsafe_view",
        "aten.expand",
        "aten.expand_as",
        "aten.flatten.using_ints",
        "aten.reshape",
        "aten.squeeze",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.view",
    }
)
"""Their input when the type stays: the same elements under the same extents."""

COPIES = frozenset({"aten._to_copy", "aten.clone"})
"""Their input when the type stays and nothing moves; where something may, kernels may round differently after it."""

DROPOUTS = frozenset({"aten.alpha_dropout", "aten.dropout", "aten.feature_dropout"})

_PRESERVING = (None, Symbol("torch.preserve_format"))
_ROWS = Symbol("torch.contiguous_format")


@dataclass(frozen=True)
class DropNoops(Pass):
    """Drop casts to the same type, views of the same shape, whole slices, copies of what lies row by row, and the like.

        %a: f32[N, 4] = aten.linear(input=%x, weight=%w, bias=None)
        %b: f32[N, 4] = aten.type_as(self=%a, other=%x)
        %c: f32[N, 4] = aten.clone(self=%b)                             %a: f32[N, 4] = aten.linear(...)
        %d: f32[N, 4] = aten.relu(self=%c)                          ->  %d: f32[N, 4] = aten.relu(self=%a)

    Every case is proved from types and operators, so results stay the same to the bit.
    """

    name: ClassVar[str] = "drop-noops"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph without no-ops; users and outputs name what the no-op was given."""
        known = layouts(graph)
        given = {node.name: source for node in graph.nodes if (source := _same(node, graph, known)) is not None}
        if not given:
            return graph
        kept = tuple(node for node in graph.nodes if node.name not in given)
        return rename_uses(replace(graph, nodes=kept), given)


def _same(node: Node, graph: Graph, known: Layouts) -> str | None:
    """The name of the value that the call gives back unchanged, or None if it does more."""
    source = node.args.get("self", node.args.get("input"))
    if not isinstance(source, Ref) or node.outputs[0].type != graph.values[source.name].type:
        return None
    if not isinstance(node.outputs[0].type, TensorType):
        return None
    rule = _RULES.get(node.op)
    return source.name if rule is not None and rule(node, source.name, known) else None


def _always(node: Node, source: str, known: Layouts) -> bool:
    return True


def _casts(node: Node, source: str, known: Layouts) -> bool:
    return not node.args.get("copy", False) and node.args.get("memory_format") in _PRESERVING


def _copies(node: Node, source: str, known: Layouts) -> bool:
    if node.args.get("memory_format") in _PRESERVING:
        return source in known
    return node.args["memory_format"] == _ROWS and is_contiguous(source, known)


def _lies_in_rows(node: Node, source: str, known: Layouts) -> bool:
    return node.args.get("memory_format") in (None, _ROWS) and is_contiguous(source, known)


def _drops_nothing(node: Node, source: str, known: Layouts) -> bool:
    return node.args.get("train") is False or node.args.get("p") == 0


def _slices_all(node: Node, source: str, known: Layouts) -> bool:
    """With steps of one, a slice as long as what it slices is all of it."""
    return node.args.get("step", 1) == 1


def _permutes_nothing(node: Node, source: str, known: Layouts) -> bool:
    return node.args["dims"] == tuple(range(len(node.type.shape)))


def _transposes_nothing(node: Node, source: str, known: Layouts) -> bool:
    return node.args["dim0"] == node.args["dim1"]


_RULES: Mapping[str, Callable[[Node, str, Layouts], bool]] = {
    **dict.fromkeys(ALIASES, _always),
    **dict.fromkeys(SHAPES, _always),
    **dict.fromkeys(CASTS, _casts),
    **dict.fromkeys(COPIES, _copies),
    **dict.fromkeys(DROPOUTS, _drops_nothing),
    "aten.contiguous": _lies_in_rows,
    "aten.permute": _permutes_nothing,
    "aten.slice.Tensor": _slices_all,
    "aten.transpose.int": _transposes_nothing,
}
"""When a call whose result has the type of its input is a no-op, by operator."""
