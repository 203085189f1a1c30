"""Operators of ours in the operators that ONNX has whole, before the export.

    %y = intarsia.norm_rope(%x, %w, %cos, %sin, heads=4)  ->  %y.norm = aten.rms_norm(%x, [128], %w)
                                                              %y = intarsia_onnx.rotary(%y.norm, %cos, %sin, heads=4)

What has no whole there, and no spelling in ``onnx_operators``, becomes its reference: ``decomposed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from intarsia import kernels
from intarsia.backends.onnx_operators import POSITIONS, ROTARY
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.rewrite import rewrite
from intarsia.ir.types import TensorType


def lower(graph: Graph) -> Graph:
    """The graph with every ``norm_rope`` as a norm and a rotation; all rotations share positions and cast tables."""
    made: set[str] = set()

    def rule(node: Node) -> Sequence[Node] | None:
        if node.op != "intarsia.norm_rope":
            return None
        nodes = [new for new in _norm_and_rotation(node, graph) if new.name not in made]
        made.update(new.name for new in nodes)
        return nodes

    return rewrite(graph, rule)


def decomposed(
    exported: torch.export.ExportedProgram, spelled: Mapping[Callable[..., Any], Callable[..., Any]]
) -> torch.export.ExportedProgram:
    """The program with our operators that are not ``spelled`` as what their references call."""
    called = {fx.target for fx in exported.graph.nodes if fx.op == "call_function"}
    table = {op: made for op, made in kernels.decompositions().items() if op in called and op not in spelled}
    return exported.run_decompositions(dict(table)) if table else exported


def _norm_and_rotation(node: Node, graph: Graph) -> Sequence[Node]:
    input = graph.type(node.ref("input"))
    batch, tokens, channels = input.shape
    normed = Value(f"{node.name}.norm", input)
    assert isinstance(channels, int)
    norm: dict[str, Arg] = {key: node.args.get(key) for key in ("input", "weight", "eps")}
    norm["normalized_shape"] = (channels,)
    index = Value(f"rotary.positions[{batch}, {tokens}]", TensorType("i64", (batch, tokens)))
    cos, sin = (_cast(node.ref(key), input.dtype, graph) for key in ("cos", "sin"))
    turn: dict[str, Arg] = {"input": Ref(normed.name), "heads": node.args["heads"], "positions": Ref(index.name)}
    turn |= {"cos": Ref(cos.name) if cos else node.args["cos"], "sin": Ref(sin.name) if sin else node.args["sin"]}
    return [
        Node("aten.rms_norm", norm, (normed,), node.source),
        *(made for made in (cos, sin) if made),
        Node(POSITIONS, {"input": node.args["input"]}, (index,)),
        Node(ROTARY, turn, node.outputs, node.source),
    ]


def _cast(name: str, dtype: str, graph: Graph) -> Node | None:
    """The table in the element type that it meets; None if it has it."""
    type_ = graph.type(name)
    if type_.dtype == dtype:
        return None
    args: dict[str, Arg] = {"self": Ref(name), "dtype": Symbol(str(DTYPES[dtype]))}
    return Node("aten._to_copy", args, (Value(f"{name}.{dtype}", TensorType(dtype, type_.shape)),))
