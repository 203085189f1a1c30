"""Compute once for each prompt what no denoising step changes: text projections, keys and values of cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node
from intarsia.ir.plan import Chosen
from intarsia.ir.program import split_constant
from intarsia.ir.segments import split
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.active_inputs import ACTIVE
from intarsia.passes.base import Pass


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Cut off what no denoising step changes, so that it runs once for each prompt: text, keys and values of it.

    The graph stays as it is; a step runs two segments of it.

        input %hidden_states: f32[1, 4, 1024, 32]                    step.0, once for each prompt:
        input %timestep: f32[1]                                        input %text: f32[1, 512, 64]
        input %text: f32[1, 512, 64]                                   %k: f32[1, 512, 32] = aten.linear(input=%text)
        %k: f32[1, 512, 32] = aten.linear(input=%text)                 return %k
        %q: ... = aten.linear(input=%hidden_states)              ->  step.1, at every step:
        %y: ... = aten.scaled_dot_product_attention(%q, %k, %k)        input %hidden_states, %timestep, %k
        return %y                                                      ...

    The sample, which is the first input, changes at every step, as do the time and all that ``active-tokens`` adds.
    The other inputs stay while a video is made: the text, its mask, the guidance scale. An engine of segments compares
    them by value, so a caller that changes them between steps is answered rightly, if slowly.

    Text that attends together with the video, as in CogVideoX and HunyuanVideo, depends on the sample from the first
    block on; little is computed before. ``refusals`` tells it for each attention.

    Attributes:
        changing: Inputs that change at every step, beside the sample and those of active tokens.

    Source: loop-invariant code motion (Aho et al., Compilers, 2nd edition, section 9.1.7) out of the sampler's loop.
    """

    changing: tuple[str, ...] = ("timestep",)

    name: ClassVar[str] = "hoist-invariants"

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """What runs once for each prompt, and every attention, for none of which there is a choice.

        Of a graph with nothing to hoist, the reason why.
        """
        try:
            once, step = self.split(graph)
        except Unsupported as error:
            return {graph.name: str(error)}
        known, repeated = _known(graph, once), {node.name for node in step.nodes}
        _, calls = split_constant(graph)
        hoisted = sum(node.name not in repeated for node in calls)
        return {graph.name: f"no choice: {hoisted} of {len(calls)} calls run once for each prompt"} | {
            node.name: f"no choice: {_told(node, known)}" for node in graph.nodes if _attends(node)
        }

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph itself."""
        return graph

    def split(self, graph: Graph) -> tuple[Graph, ...]:
        """What a prompt tells, and the step.

        Raises:
            Unsupported: No product of a weight is told by the prompt alone.
        """
        changing = dict.fromkeys(self._changing(graph), 1)
        once, *step = split(graph, changing)
        constant, dynamic = split_constant(once)
        weighed = {param.name for param in graph.params} | {value.name for node in constant for value in node.outputs}
        if not step or not any(name in weighed for node in dynamic for name in node.inputs):
            stays = [value.name for value in graph.inputs if value.name not in changing]
            given = f"{', '.join(f'%{name}' for name in stays)} alone" if stays else "anything else"
            raise Unsupported(
                f"hoist-invariants: {graph.name} multiplies no weight by what {given} tells, for "
                f"{', '.join(f'%{name}' for name in changing)} change at every step: leave the pass out"
            )
        return (once, *step)

    def _changing(self, graph: Graph) -> Iterator[str]:
        names = [value.name for value in graph.inputs]
        yield from names[:1]
        yield from (name for name in names[1:] if name in self.changing)
        if ACTIVE in names:
            yield from names[names.index(ACTIVE) :]


def _attends(node: Node) -> bool:
    return node.args.keys() >= {"query", "key", "value"}


def _known(graph: Graph, once: Graph) -> set[str]:
    """What follows from what runs once, but for shapes, which may be those of the sample."""
    known = {*once.values, *(value.name for value in graph.params)}
    for node in graph.nodes:
        tensors = [name for name in node.inputs if isinstance(graph.values[name].type, TensorType)]
        if tensors and known.issuperset(tensors):
            known.update(value.name for value in node.outputs)
    return known


def _told(node: Node, known: set[str]) -> str:
    if node.ref("key") in known and node.ref("value") in known:
        return "keys and values are computed once for each prompt"
    return "keys and values depend on the sample, and are computed at every step"
