"""Compute complex numbers as pairs of real ones, which every runtime has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import Pass

REAL: Mapping[str, str] = {"c64": "f32", "c128": "f64"}
"""Element type of real and imaginary part."""

ALIKE = frozenset(
    {
        "aten._to_copy",
        "aten._unsafe_view",
        "aten.add.Tensor",
        "aten.alias",
        "aten.cat",
        "aten.clone",
        "aten.contiguous",
        "aten.expand",
        "aten.flatten.using_ints",
        "aten.index.Tensor",
        "aten.index_select",
        "aten.neg",
        "aten.permute",
        "aten.repeat",
        "aten.reshape",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split_with_sizes",
        "aten.squeeze",
        "aten.squeeze.dim",
        "aten.stack",
        "aten.sub.Tensor",
        "aten.to.dtype",
        "aten.transpose.int",
        "aten.unsqueeze",
        "aten.view",
    }
)
"""Operators that do to a complex number what they do to its real and to its imaginary part."""


@dataclass(frozen=True)
class ComplexToReal(Pass):
    """Write rotations by complex numbers, as HunyuanVideo, Wan and LLaMA were published with, in real numbers.

        param %freqs: c64[1, 16, 1, 4]
        %z: c64[2, 16, 4, 4] = aten.view_as_complex(self=%pairs)
        %t: c64[2, 16, 4, 4] = aten.mul.Tensor(self=%z, other=%freqs)
        %y: f32[2, 16, 4, 4, 2] = aten.view_as_real(self=%t)

    becomes

        %freqs.pair: f32[1, 16, 1, 4, 2] = aten.view_as_real(self=%freqs)
        %freqs.real: f32[1, 16, 1, 4], %freqs.imag: f32[1, 16, 1, 4] = aten.unbind.int(self=%freqs.pair, dim=-1)
        %z.real: f32[2, 16, 4, 4], %z.imag: f32[2, 16, 4, 4] = aten.unbind.int(self=%pairs, dim=-1)
        %t.real = %z.real * %freqs.real - %z.imag * %freqs.imag
        %t.imag = %z.real * %freqs.imag + %z.imag * %freqs.real
        %y: f32[2, 16, 4, 4, 2] = aten.stack(tensors=[%t.real, %t.imag], dim=-1)

    What is left of parameters runs once, at build. Results are those of PyTorch's complex product but for the rounding
    of some of its last bits. A graph is changed as a whole or not at all: ``refusals`` says what stands in the way.
    """

    name: ClassVar[str] = "complex-to-real"

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Complex inputs and outputs, and calls on complex numbers that have no real form here."""
        faults = {value.name: "a complex input; split it into two real ones" for value in graph.inputs if _is(value)}
        faults |= {name: "a complex output; return view_as_real of it" for name in graph.outputs if name in _all(graph)}
        for node in graph.nodes:
            if _touches(node, graph) and _rule(node, graph) is None:
                faults[node.name] = f"{node.op} on complex numbers has no real form"
        return faults

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph without complex numbers, but for parameters that weight-only nodes open."""
        touching = [node for node in graph.nodes if _touches(node, graph)]
        if all(_opens(node, graph) for node in touching) or self.refusals(graph, target):
            return graph
        nodes: list[Node] = [node for param in graph.params if _is(param) for node in _opened(param)]
        for node in graph.nodes:
            rule = _rule(node, graph) if _touches(node, graph) else None
            nodes.extend([node] if rule is None else rule(node, graph))
        return drop_unused(replace(graph, nodes=tuple(nodes)))


def _is(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype in REAL


def _all(graph: Graph) -> frozenset[str]:
    return frozenset(name for name, value in graph.values.items() if _is(value))


def _opens(node: Node, graph: Graph) -> bool:
    """Whether the call is the first of those that ``_opened`` gives."""
    return node.op == "aten.view_as_real" and node.ref("self") not in graph.producers


def _touches(node: Node, graph: Graph) -> bool:
    return any(map(_is, node.outputs)) or any(_is(graph.values[name]) for name in node.inputs)


Rule = Callable[[Node, Graph], Sequence[Node]]


def _rule(node: Node, graph: Graph) -> Rule | None:
    """What writes the call in real numbers; None if nothing does."""
    complexes = [name for name in node.inputs if _is(graph.values[name])]
    if any(isinstance(arg, complex) for arg in node.args.values()):
        return None
    if node.op == "aten.mul.Tensor":
        return _product if len(complexes) == len(node.inputs) == 2 else _alike if len(complexes) == 1 else None
    if node.op in ALIKE:
        tensors = [name for name in node.inputs if isinstance(graph.values[name].type, TensorType)]
        selected = node.op in ("aten.index.Tensor", "aten.index_select")
        return _alike if all(map(_is, node.outputs)) and (selected or complexes == tensors) else None
    return _RULES.get(node.op)


def _parts(value: Value) -> tuple[Value, Value]:
    """Real and imaginary part of a complex value."""
    assert isinstance(value.type, TensorType)
    type_ = TensorType(REAL[value.type.dtype], value.type.shape)
    return Value(f"{value.name}.real", type_), Value(f"{value.name}.imag", type_)


def _opened(param: Value) -> Sequence[Node]:
    """The parts of a parameter."""
    real, imaginary = _parts(param)
    assert isinstance(real.type, TensorType)
    pair = Value(f"{param.name}.pair", TensorType(real.type.dtype, (*real.type.shape, 2)))
    return [
        Node("aten.view_as_real", {"self": Ref(param.name)}, (pair,)),
        Node("aten.unbind.int", {"self": Ref(pair.name), "dim": -1}, (real, imaginary)),
    ]


def _view_as_complex(node: Node, graph: Graph) -> Sequence[Node]:
    return [Node("aten.unbind.int", {"self": node.args["self"], "dim": -1}, _parts(node.outputs[0]), node.source)]


def _view_as_real(node: Node, graph: Graph) -> Sequence[Node]:
    parts = tuple(Ref(part.name) for part in _parts(graph.values[node.ref("self")]))
    return [replace(node, op="aten.stack", args={"tensors": parts, "dim": -1})]


def _complex(node: Node, graph: Graph) -> Sequence[Node]:
    parts = zip(_parts(node.outputs[0]), ("real", "imag"), strict=True)
    return [Node("aten.alias", {"self": node.args[key]}, (part,), node.source) for part, key in parts]


def _part(node: Node, graph: Graph) -> Sequence[Node]:
    """``aten.real`` or ``aten.imag``."""
    part = _parts(graph.values[node.ref("self")])[node.op == "aten.imag"]
    return [replace(node, op="aten.alias", args={"self": Ref(part.name)})]


def _conjugate(node: Node, graph: Graph) -> Sequence[Node]:
    given, made = _parts(graph.values[node.ref("self")]), _parts(node.outputs[0])
    return [
        Node("aten.alias", {"self": Ref(given[0].name)}, made[:1], node.source),
        Node("aten.neg", {"self": Ref(given[1].name)}, made[1:], node.source),
    ]


def _same(node: Node, graph: Graph) -> Sequence[Node]:
    parts = zip(_parts(graph.values[node.ref("self")]), _parts(node.outputs[0]), strict=True)
    return [Node("aten.alias", {"self": Ref(given.name)}, (made,), node.source) for given, made in parts]


def _polar(node: Node, graph: Graph) -> Sequence[Node]:
    made: list[Node] = []
    for part, op in zip(_parts(node.outputs[0]), ("aten.cos", "aten.sin"), strict=True):
        angle = graph.type(node.ref("angle"))
        turned = Value(f"{part.name}.{op.removeprefix('aten.')}", angle)
        made.append(Node(op, {"self": node.args["angle"]}, (turned,), node.source))
        args: dict[str, Arg] = {"self": node.args["abs"], "other": Ref(turned.name)}
        made.append(Node("aten.mul.Tensor", args, (part,), node.source))
    return made


def _product(node: Node, graph: Graph) -> Sequence[Node]:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i."""
    (a, b), (c, d) = (_parts(graph.values[node.ref(key)]) for key in ("self", "other"))
    made: list[Node] = []
    for part, op, pairs in zip(
        _parts(node.outputs[0]), ("sub", "add"), (((a, c), (b, d)), ((a, d), (b, c))), strict=True
    ):
        terms = [Value(f"{part.name}.{index}", part.type) for index in range(2)]
        for term, (first, second) in zip(terms, pairs, strict=True):
            factors: dict[str, Arg] = {"self": Ref(first.name), "other": Ref(second.name)}
            made.append(Node("aten.mul.Tensor", factors, (term,), node.source))
        args: dict[str, Arg] = {"self": Ref(terms[0].name), "other": Ref(terms[1].name)}
        made.append(Node(f"aten.{op}.Tensor", args, (part,), node.source))
    return made


def _alike(node: Node, graph: Graph) -> Sequence[Node]:
    """The same call on the real and on the imaginary parts."""

    def of(arg: Arg, index: int) -> Arg:
        if isinstance(arg, Ref) and _is(graph.values[arg.name]):
            return Ref(_parts(graph.values[arg.name])[index].name)
        if isinstance(arg, Symbol):
            return Symbol(
                {"torch.complex64": "torch.float32", "torch.complex128": "torch.float64"}.get(arg.name, arg.name)
            )
        return tuple(of(item, index) for item in arg) if isinstance(arg, tuple) else arg

    return [
        replace(
            node,
            args={key: of(arg, index) for key, arg in node.args.items()},
            outputs=tuple(_parts(value)[index] for value in node.outputs),
        )
        for index in range(2)
    ]


_RULES: Mapping[str, Rule] = {
    "aten._conj": _conjugate,
    "aten.complex": _complex,
    "aten.conj_physical": _conjugate,
    "aten.imag": _part,
    "aten.polar": _polar,
    "aten.real": _part,
    "aten.resolve_conj": _same,
    "aten.view_as_complex": _view_as_complex,
    "aten.view_as_real": _view_as_real,
}
"""How calls that begin, end or turn complex numbers are written in real ones."""
