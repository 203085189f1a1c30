"""Rotary embeddings as graphs spell them: pairs of neighbouring channels, turned by an angle for each position."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Graph, Node


@dataclass(frozen=True)
class Rotation:
    """Names of what a rotation reads.

        %e, %o = aten.unbind.int(self=view(%input), dim=-1)
        %a = %e * %cos - %o * %sin
        %b = %e * %sin + %o * %cos
        %r = flatten(stack([%a, %b], dim=-1))

    Attributes:
        input: What a view cuts into pairs, (B, N, C) or (B, N, heads, D).
        cos: Cosines, one for each pair.
        sin: Sines, alike.
    """

    input: str
    cos: str
    sin: str

    @classmethod
    def ending_at(cls, node: Node, graph: Graph) -> Rotation | None:
        """The rotation whose result ``node`` flattens."""
        halves = _stacked(node, graph)
        difference = _products(halves[0], "aten.sub.Tensor", graph) if halves else None
        added = _products(halves[1], "aten.add.Tensor", graph) if halves else None
        if difference is None or added is None:
            return None
        (even, cos), (odd, sin) = difference
        if set(added) != {(even, sin), (odd, cos)}:
            return None
        input = paired(even, odd, graph)
        return cls(input, cos, sin) if input else None


def _stacked(node: Node, graph: Graph) -> tuple[str, str] | None:
    """The two values that ``node`` flattens into neighbouring channels."""
    flat = node.op in ("aten.flatten.using_ints", "aten.view", "aten.reshape")
    stack = graph.producers.get(node.ref("self")) if flat else None
    if stack is None or stack.op != "aten.stack" or stack.args.get("dim") not in (4, -1) or len(stack.inputs) != 2:
        return None
    return (stack.inputs[0], stack.inputs[1]) if node.type.shape[:-1] == stack.type.shape[:-2] else None


def paired(even: str, odd: str, graph: Graph) -> str | None:
    """The value whose neighbouring channels ``even`` and ``odd`` are."""
    unbind = graph.producers.get(even)
    if unbind is None or unbind.op != "aten.unbind.int":
        return None
    view = graph.producers.get(unbind.ref("self"))
    if view is None or view.op != "aten.view" or [value.name for value in unbind.outputs] != [even, odd]:
        return None
    return view.ref("self") if unbind.args.get("dim", 0) in (-1, len(view.type.shape) - 1) else None


Factors = tuple[str, str]


def _products(name: str, op: str, graph: Graph) -> tuple[Factors, Factors] | None:
    """The factors, half and table, of both products that the call ``name`` of ``op`` adds or subtracts."""
    node = graph.producers.get(name)
    if node is None or node.op != op or node.args.get("alpha", 1) != 1 or len(node.inputs) != 2:
        return None
    first, second = (_factors(graph.producers.get(term)) for term in node.inputs)
    return (first, second) if first and second else None


def _factors(node: Node | None) -> Factors | None:
    if node is None or node.op != "aten.mul.Tensor" or len(node.inputs) != 2:
        return None
    return node.inputs[0], node.inputs[1]
