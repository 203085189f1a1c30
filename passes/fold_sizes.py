"""Work out at compile time what is known of sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import rename_uses
from intarsia.ir.sizes import Dim
from intarsia.ir.target import Target
from intarsia.passes.base import Pass

ARITHMETIC: Mapping[str, Callable[..., int]] = {
    "operator.add": operator.add,
    "operator.floordiv": operator.floordiv,
    "operator.mod": operator.mod,
    "operator.mul": operator.mul,
    "operator.neg": operator.neg,
    "operator.sub": operator.sub,
    "torch.sym_max": max,
    "torch.sym_min": min,
}
"""Functions on sizes that are computed when all their arguments are known."""


@dataclass(frozen=True)
class FoldSizes(Pass):
    """Replace sizes by numbers where the types know them, and ask for each named size once.

        %a: int = aten.sym_size.int(self=%x, dim=0)          (with %x: f32[N, 4], %y: f32[N, 8])
        %b: int = aten.sym_size.int(self=%y, dim=0)
        %c: int = aten.sym_size.int(self=%x, dim=1)
        %d: int = operator.mul(arg0=%c, arg1=2)
        %z: f32[N, 8] = aten.expand(self=%y, size=[%b, %d])

    becomes

        %a: int = aten.sym_size.int(self=%x, dim=0)
        %z: f32[N, 8] = aten.expand(self=%y, size=[%a, 8])
    """

    name: ClassVar[str] = "fold-sizes"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with every size that its types determine as a number, and the rest measured once."""
        numbers: dict[str, int] = {}
        measured: dict[str, str] = {}
        same: dict[str, str] = {}
        for node in graph.nodes:
            extent = _extent(node, graph)
            known = extent if isinstance(extent, int) else _computed(node, numbers)
            if known is not None:
                numbers[node.name] = known
            elif isinstance(extent, str) and measured.setdefault(extent, node.name) != node.name:
                same[node.name] = measured[extent]
        dropped = {*numbers, *same} - set(graph.outputs)
        if not dropped:
            return graph
        nodes = tuple(_with_numbers(node, numbers) for node in graph.nodes if node.name not in dropped)
        return rename_uses(replace(graph, nodes=nodes), {name: to for name, to in same.items() if name in dropped})


def _extent(node: Node, graph: Graph) -> Dim | None:
    """The extent that the call asks for, as the types have it; None if it asks for none."""
    if node.op != "aten.sym_size.int":
        return None
    dim = node.args["dim"]
    return graph.type(node.ref("self")).shape[dim] if isinstance(dim, int) else None


def _computed(node: Node, numbers: Mapping[str, int]) -> int | None:
    """The result of arithmetic on known sizes; None if something is unknown."""
    args = [_number(arg, numbers) for arg in node.args.values()]
    if node.op not in ARITHMETIC or any(arg is None for arg in args):
        return None
    return ARITHMETIC[node.op](*args)


def _number(arg: Arg, numbers: Mapping[str, int]) -> int | None:
    if isinstance(arg, Ref):
        return numbers.get(arg.name)
    return arg if type(arg) is int else None


def _with_numbers(node: Node, numbers: Mapping[str, int]) -> Node:
    if not any(name in numbers for name in node.inputs):
        return node
    return replace(node, args={key: _filled(arg, numbers) for key, arg in node.args.items()})


def _filled(arg: Arg, numbers: Mapping[str, int]) -> Arg:
    if isinstance(arg, Ref):
        return numbers.get(arg.name, arg)
    return tuple(_filled(item, numbers) for item in arg) if isinstance(arg, tuple) else arg
