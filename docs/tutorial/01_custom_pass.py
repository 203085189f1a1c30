"""A pass of your own: let the search leave out attentions that a model can do without.

Run it with ``python docs/tutorial/01_custom_pass.py``. It writes nothing. What it shows:

1. a pass is a frozen dataclass that says where it must decide, between what, and what each answer does to the graph;
2. ``check_pass`` runs the promises that every pass must keep on yours;
3. the cost model tells what the pass is worth on a machine you do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import intarsia
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.rewrite import drop_unused, rewrite
from intarsia.ir.target import Target, load_target
from intarsia.passes.base import Pass
from intarsia.passes.conformance import check_pass
from intarsia.search.roofline import predict


@dataclass(frozen=True)
class SkipAttention(Pass):
    """Leave out an attention: what it would add to the video is zero.

        %y: f32[2, 4, 512, 32] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v)

    becomes, where ``skip`` is chosen at ``y``,

        %y: f32[2, 4, 512, 32] = aten.zeros_like(self=%q)

    Attributes:
        within: Only attentions whose name holds this text; ``attn2`` is where a Wan transformer looks at its prompt.
    """

    name: ClassVar[str] = "skip-attention"
    within: str = "attn2"

    def choices(self, graph: Graph, target: Target) -> Choices:
        sites = graph.find("aten.scaled_dot_product_attention")
        return {node.name: ("keep", "skip") for node in sites if self.within in node.name}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        def rule(node: Node) -> Sequence[Node] | None:
            if chosen.get(node.name) != "skip":
                return None
            return [replace(node, op="aten.zeros_like", args={"self": Ref(node.ref("query"))})]

        return drop_unused(rewrite(graph, rule))


def main() -> None:
    program = intarsia.trace("wan-mini")
    target = load_target("t4")
    skip = SkipAttention()

    choices = skip.choices(program.graph, target)
    print(f"{skip.name} asks {len(choices)} questions; the first: {next(iter(choices.items()))}")

    check_pass(skip, program, target)
    print("it keeps the promises of a pass")

    place = next(iter(choices))
    skipped = skip.run(program.graph, target, {place: "skip"})
    before, after = predict(program.graph, target), predict(skipped, target)
    print(f"without {place}: {len(program.graph.nodes) - len(skipped.nodes)} nodes fewer, ", end="")
    print(f"{1 - after.seconds / before.seconds:.1%} less time on a {target.summary}")

    print("to search with it: intarsia search wan-mini --target t4 --quality 'psnr>=20' \\")
    print("  --pass docs/tutorial/01_custom_pass.py:SkipAttention -o plan.json")


if __name__ == "__main__":
    main()
