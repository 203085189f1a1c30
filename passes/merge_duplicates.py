"""Compute once what is computed several times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.operators import resolve
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import rename_uses
from intarsia.ir.target import Target
from intarsia.passes.base import Pass

PURE = frozenset({"aten", "intarsia", "math", "operator", "prims", "torch"})
"""Namespaces whose operators say, by PyTorch's tag, when they draw random numbers; others are left alone."""


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Keep the first of several calls of the same operator with the same arguments.

        %a: f32[4] = aten.relu(self=%x)
        %b: f32[4] = aten.relu(self=%x)                       %a: f32[4] = aten.relu(self=%x)
        %c: f32[4] = aten.add.Tensor(self=%a, other=%b)  ->   %c: f32[4] = aten.add.Tensor(self=%a, other=%a)

    Calls that draw random numbers are never merged.
    """

    name: ClassVar[str] = "merge-duplicates"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph without repetitions, those of repetitions included; users name the first of equals."""
        first: dict[str, Node] = {}
        names: dict[str, str] = {}
        for node in graph.nodes:
            if not is_pure(node.op):
                continue
            kept = first.setdefault(_key(node, names), node)
            if kept is not node:
                names |= {value.name: same.name for value, same in zip(node.outputs, kept.outputs, strict=True)}
        if not names:
            return graph
        kept_nodes = tuple(node for node in graph.nodes if node.name not in names)
        return rename_uses(replace(graph, nodes=kept_nodes), names)


@lru_cache(maxsize=4096)
def is_pure(op: str) -> bool:
    """Whether two calls of the operator with equal arguments certainly give equal values."""
    if op.partition(".")[0] not in PURE:
        return False
    target = resolve(op)
    return not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags


def _key(node: Node, names: Mapping[str, str]) -> str:
    """Text that two nodes share if they compute the same; text, because 1, 1.0 and True are equal and do not."""
    args = sorted((key, repr(_first(arg, names))) for key, arg in node.args.items())
    return repr((node.op, args, len(node.outputs)))


def _first(arg: Arg, names: Mapping[str, str]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(names.get(arg.name, arg.name))
    return tuple(_first(item, names) for item in arg) if isinstance(arg, tuple) else arg
