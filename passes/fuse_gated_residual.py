"""Find sums of a residual and a gated branch, for ``intarsia.gated_residual``.

    %r: f32[B, N, C] = aten._to_copy(self=%x, dtype=torch.float32)
    %g: f32[B, N, C] = aten.mul.Tensor(self=%branch, other=%gate)
    %a: f32[B, N, C] = aten.add.Tensor(self=%r, other=%g)
    %y: bf16[B, N, C] = aten.type_as(self=%a, other=%x)

becomes

    %y: bf16[B, N, C] = intarsia.gated_residual(residual=%x, input=%branch, gate=%gate)

Source: Peebles and Xie, DiT (arXiv 2212.09748), the gates of adaLN-Zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.passes.fuse_candidates import Candidate, operands, produced, rounded, uncast, unwidened, used_elsewhere

OP = "intarsia.gated_residual"


@dataclass(frozen=True)
class _Sum:
    """The names in ``residual + branch * gate``; ``inner`` are the values between product and sum."""

    residual: str
    branch: str
    gate: str
    inner: tuple[str, ...]


def gated_residual(node: Node, graph: Graph) -> Candidate | None:
    """The candidate whose residual the sum ``node`` adds."""
    found = _sum(node, graph)
    if found is None:
        return None
    if reason := used_elsewhere(found.inner, graph):
        return Candidate(node.name, (), reason)
    for residual in (unwidened(found.residual, graph), found.residual):
        last = rounded(node, graph.type(residual).dtype, graph)
        if last is not None:
            branch, gate = (Ref(unwidened(name, graph)) for name in (found.branch, found.gate))
            args = {"residual": Ref(residual), "input": branch, "gate": gate}
            return Candidate(last.name, (Node(OP, args, last.outputs, node.source),))
    given = graph.type(found.residual).dtype
    return Candidate(node.name, (), f"the sum is {node.type.dtype}, the residual {given}; {OP} gives the residual's")


def _sum(node: Node, graph: Graph) -> _Sum | None:
    pair = operands(node) if len(node.type.shape) == 3 else None
    for residual, product in (pair, pair[::-1]) if pair else ():
        inner = uncast(product, graph)
        mul = produced(inner[-1], graph, "aten.mul.Tensor")
        factors = operands(mul) if mul else None
        if factors is None:
            continue
        branch, gate = factors if _is_gate(factors[1], graph) or not _is_gate(factors[0], graph) else factors[::-1]
        if graph.type(residual).shape != node.type.shape or graph.type(branch).shape != node.type.shape:
            continue
        if _is_gate(gate, graph) or produced(uncast(residual, graph)[-1], graph, "aten.mul.Tensor") is None:
            return _Sum(residual, branch, gate, inner)  # a sum of two products without a gate has no residual
    return None


def _is_gate(name: str, graph: Graph) -> bool:
    """Whether the value is the same for all tokens."""
    shape = graph.type(name).shape
    return len(shape) != 3 or shape[1] == 1
