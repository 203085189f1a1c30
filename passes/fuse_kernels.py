"""Put kernels that compute a pattern whole where the graph spells it in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from intarsia import kernels
from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.rewrite import drop_unused, rewrite
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.fuse_attention import PRODUCTS, attention, softmax_attention
from intarsia.passes.fuse_candidates import Candidate, Pattern
from intarsia.passes.fuse_gated_residual import gated_residual
from intarsia.passes.fuse_modulated_norm import modulated_norm
from intarsia.passes.fuse_norm_rope import norm_rope

KEEP, FUSE = "keep", "fuse"

PATTERNS: Mapping[str, Sequence[Pattern]] = {
    "aten.scaled_dot_product_attention": (attention,),
    **dict.fromkeys(PRODUCTS, (softmax_attention,)),
    "aten.flatten.using_ints": (norm_rope,),
    "aten.add.Tensor": (norm_rope, modulated_norm, gated_residual),
}
"""What may end at a call of an operator; the first pattern that is met has the place, taken or refused."""


@dataclass(frozen=True)
class FuseKernels(Pass):
    """Compute attention, adaLN, gated residuals and RMS norm with rotary embedding each in one kernel.

        %n: f32[2, 8, 64] = aten.layer_norm(input=%x, normalized_shape=[64], weight=None, bias=None, eps=1e-06)
        %f: f32[2, 1, 64] = aten.add.Tensor(self=%scale, other=1)
        %m: f32[2, 8, 64] = aten.mul.Tensor(self=%n, other=%f)
        %y: f32[2, 8, 64] = aten.add.Tensor(self=%m, other=%shift)

    becomes, where ``fuse`` is chosen at ``y``,

        %y: f32[2, 8, 64] = intarsia.modulated_norm(input=%x, weight=None, ..., scale=%scale, shift=%shift, eps=1e-06)

    The other patterns stand at the top of ``passes/fuse_*.py``. A kernel computes in f32 and rounds once, at its end,
    so in sixteen bits the result is closer to the exact one than before, and not the same.

    Attributes:
        everywhere: Fuse all that can be, and leave nothing to choose.
    """

    name: ClassVar[str] = "fuse-kernels"
    everywhere: bool = False

    def choices(self, graph: Graph, target: Target) -> Choices:
        """``keep`` and ``fuse`` at each place that a kernel can take; nothing if all of them are fused anyway."""
        if self.everywhere:
            return {}
        return {found.place: (KEEP, FUSE) for found in candidates(graph, target) if not found.reason}

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Places that look like a pattern and are none, or that no kernel takes, each with the reason."""
        return {found.place: found.reason for found in candidates(graph, target) if found.reason}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with kernels at the chosen places, what nobody uses then dropped.

        Raises:
            PlanError: A place is to be fused that cannot be; the message says why.
        """
        found = {candidate.place: candidate for candidate in candidates(graph, target)}
        for place, option in chosen.items():
            _check(place, option, found)
        otherwise = FUSE if self.everywhere else KEEP
        taken = {
            place: candidate.nodes
            for place, candidate in found.items()
            if not candidate.reason and chosen.get(place, otherwise) == FUSE
        }
        return drop_unused(_replaced(graph, taken)) if taken else graph


def candidates(graph: Graph, target: Target) -> Iterator[Candidate]:
    """Every place that looks like a pattern, in execution order, refused where the kernel refuses it."""
    for node in graph.nodes:
        found = (pattern(node, graph) for pattern in PATTERNS.get(node.op, ()))
        candidate = next((one for one in found if one is not None), None)
        if candidate is None:
            continue
        reason = candidate.reason or _why_not(candidate.nodes, graph, target)
        yield Candidate(candidate.place, () if reason else candidate.nodes, reason)


def _why_not(nodes: Sequence[Node], graph: Graph, target: Target) -> str:
    """The kernel's reason, asked about the call that would stand there."""
    made = {value.name for node in nodes for value in node.outputs}
    used = dict.fromkeys(name for node in nodes for name in node.inputs if name not in made)
    params = {param.name for param in graph.params}
    piece = Graph(
        graph.name,
        tuple(graph.values[name] for name in used if name not in params),
        tuple(graph.values[name] for name in used if name in params),
        tuple(nodes),
        (nodes[-1].name,),
        graph.sizes,
    )
    return kernels.why_not(nodes[-1], piece, target) or ""


def _check(place: str, option: str, found: Mapping[str, Candidate]) -> None:
    if option not in (KEEP, FUSE):
        raise PlanError(f"{FuseKernels.name}: %{place} offers {KEEP}, {FUSE}; the plan asks for {option}")
    if option == FUSE and (place not in found or found[place].reason):
        reason = found[place].reason if place in found else "nothing there looks like a pattern"
        raise PlanError(f"{FuseKernels.name}: %{place} cannot be fused: {reason}")


def _replaced(graph: Graph, taken: Mapping[str, Sequence[Node]]) -> Graph:
    """The graph with these calls in place of those that define the names; what several places need is made once."""
    made: set[str] = set()

    def rule(node: Node) -> Sequence[Node] | None:
        nodes = taken.get(node.name)
        if nodes is None:
            return None
        first = [one for one in nodes if one.name not in made]
        made.update(one.name for one in first)
        return first

    return rewrite(graph, rule)
