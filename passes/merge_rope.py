"""Turn values that are interleaved by writing into an empty tensor into a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import fresh, rewrite
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import Pass
from intarsia.passes.layout import is_contiguous, layouts


@dataclass(frozen=True)
class MergeRope(Pass):
    """Turn a chain of strided ``slice_scatter`` that covers every offset into ``stack`` and ``flatten``.

    Rotary position embedding writes its even and odd halves into an empty tensor; a functional trace spells it

        %e: f32[4, 8] = aten.empty_like(self=%x)
        %s: f32[4, 8] = aten.slice_scatter(self=%e, src=%even, dim=1, start=0, step=2)
        %y: f32[4, 8] = aten.slice_scatter(self=%s, src=%odd, dim=1, start=1, step=2)

    which becomes

        %y.stack: f32[4, 4, 2] = aten.stack(tensors=[%even, %odd], dim=2)
        %y: f32[4, 8] = aten.flatten.using_ints(self=%y.stack, start_dim=1, end_dim=2)

    for any step, any axis and any order of offsets; values of another element type are cast after the flatten. The
    chain's other values stay where something else uses them.
    """

    name: ClassVar[str] = "merge-rope"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with every covering chain as a stack; what the chain wrote into may be left unused."""
        known = layouts(graph)

        def rule(node: Node) -> Sequence[Node] | None:
            if node.op != "aten.slice_scatter" or not is_contiguous(_base(node, graph), known):
                return None
            sources = _sources(node, graph)
            return None if sources is None else _stacked(node, sources, graph)

        return rewrite(graph, rule)


def _base(node: Node, graph: Graph) -> str:
    """What the first ``slice_scatter`` of the chain that ends in ``node`` writes into."""
    name = node.ref("self")
    while (producer := graph.producers.get(name)) is not None and producer.op == "aten.slice_scatter":
        name = producer.ref("self")
    return name


def _sources(node: Node, graph: Graph) -> tuple[str, ...] | None:
    """What lies at offsets 0, 1, ... of the axis, or None if the chain leaves a gap or is no interleaving."""
    step, axis, rank = node.args.get("step", 1), _axis(node), len(node.type.shape)
    if not isinstance(step, int) or step < 2:
        return None
    found: dict[object, str] = {}
    link: Node | None = node
    while link is not None and link.op == "aten.slice_scatter" and len(found) < step:
        if link.args.get("step", 1) != step or _axis(link) != axis or len(link.type.shape) != rank:
            return None
        if not _reaches_the_end(link, axis):
            return None
        found.setdefault(link.args.get("start") or 0, _written(link, graph))
        link = graph.producers.get(link.ref("self"))
    if found.keys() != set(range(step)):
        return None
    sources = tuple(found[offset] for offset in range(step))
    part = graph.type(sources[0])
    same = all(graph.values[source].type == part for source in sources)
    return sources if same and _fits(part, node.type, axis, step) else None


def _axis(node: Node) -> int:
    dim = node.args.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(node.type.shape)


def _reaches_the_end(node: Node, axis: int) -> bool:
    end, extent = node.args.get("end"), node.type.shape[axis]
    return end is None or (isinstance(end, int) and end >= (extent if isinstance(extent, int) else 2**63 - 1))


def _written(node: Node, graph: Graph) -> str:
    """The value that the call writes: of a ``copy`` over what lay there before, what it copies."""
    name = node.ref("src")
    copy = graph.producers.get(name)
    if copy is None or copy.op != "aten.copy" or copy.type.dtype != node.type.dtype:
        return name
    source = copy.ref("src")
    return source if graph.type(source).shape == copy.type.shape else name


def _fits(part: TensorType, whole: TensorType, axis: int, step: int) -> bool:
    """Whether ``step`` tensors like ``part`` fill ``whole``; of a named extent, equal parts are proof enough."""
    expected = (*whole.shape[:axis], part.shape[axis], *whole.shape[axis + 1 :])
    extent, all_ = part.shape[axis], whole.shape[axis]
    divides = not (isinstance(extent, int) and isinstance(all_, int)) or step * extent == all_
    return part.shape == expected and divides


def _stacked(node: Node, sources: tuple[str, ...], graph: Graph) -> Sequence[Node]:
    axis = _axis(node)
    part = graph.type(sources[0])
    shape = (*part.shape[: axis + 1], len(sources), *part.shape[axis + 1 :])
    stack = Value(fresh(f"{node.name}.stack", graph.values), TensorType(part.dtype, shape))
    tensors = tuple(Ref(source) for source in sources)
    stacking = Node("aten.stack", {"tensors": tensors, "dim": axis + 1}, (stack,), node.source)
    flatten: dict[str, Arg] = {"self": Ref(stack.name), "start_dim": axis, "end_dim": axis + 1}
    if part.dtype == node.type.dtype:
        return [stacking, replace(node, op="aten.flatten.using_ints", args=flatten)]
    flat = Value(fresh(f"{node.name}.flatten", graph.values), TensorType(part.dtype, node.type.shape))
    cast: dict[str, Arg] = {"self": Ref(flat.name), "dtype": Symbol(str(DTYPES[node.type.dtype]))}
    return [
        stacking,
        Node("aten.flatten.using_ints", flatten, (flat,), node.source),
        replace(node, op="aten._to_copy", args=cast),
    ]
