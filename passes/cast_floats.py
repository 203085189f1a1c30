"""Compute in sixteen bits behind an interface that stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from intarsia.ir.errors import Unsupported
from intarsia.ir.execute import call, type_of
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import fresh, rename_uses, renamed
from intarsia.ir.sizes import evaluate
from intarsia.ir.target import Target
from intarsia.ir.types import ScalarType, TensorType, Type
from intarsia.passes.base import Pass

NARROW = ("f16", "bf16")

CASTS = frozenset({"aten._to_copy", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.other", "aten.type_as"})
"""Conversions that the model's author wrote; one that changes the element type stays as it is written."""

AS_GIVEN = {
    "intarsia.linear_i4": frozenset({"scale"}),
    "intarsia.linear_i8": frozenset({"scale"}),
    "intarsia.norm_rope": frozenset({"cos", "sin"}),
    "intarsia.quantize_groups": frozenset({"weight"}),
    "intarsia.quantize_rows": frozenset({"weight"}),
}
"""Arguments of operators of ours that keep their element type: tables and scales are f32, weights are rounded once."""


@dataclass(frozen=True)
class CastFloats(Pass):
    """Cast f32 parameters once, at build time, and activations where they meet what has sixteen bits.

        input %t: f32[N, 1]
        param %freqs: f32[]
        param %w: f32[8, 4]
        %a: f32[N, 4] = aten.expand(self=%t, size=[-1, 4])
        %s: f32[N, 4] = aten.sin(self=%a)
        %y: f32[N, 8] = aten.linear(input=%s, weight=%w, bias=None)
        %n: f32[N, 8] = aten.relu(self=%y)

    becomes, ``%n`` being an output,

        %a: f32[N, 4] = aten.expand(self=%t, size=[-1, 4])
        %s: f32[N, 4] = aten.sin(self=%a)
        %s.f16: f16[N, 4] = aten._to_copy(self=%s, dtype=torch.float16)
        %w.f16: f16[8, 4] = aten._to_copy(self=%w, dtype=torch.float16)
        %y: f16[N, 8] = aten.linear(input=%s.f16, weight=%w.f16, bias=None)
        %n.f16: f16[N, 8] = aten.relu(self=%y)
        %n: f32[N, 8] = aten._to_copy(self=%n.f16, dtype=torch.float32)

    What is computed from inputs alone, such as the sinusoids of a timestep, stays f32 until it meets a cast parameter.
    Parameters without axes are numbers, and decide nothing. Element types written into calls (``dtype=torch.float32``
    of a cast, of ``softmax``, of ``arange``) stay as written, so islands of f32 that the author made stay islands;
    only a cast that changed nothing in the graph as given goes on changing nothing. A call that PyTorch cannot do in
    sixteen bits is done in the element types it had.

    Attributes:
        dtype: ``f16`` or ``bf16``.
    """

    name: ClassVar[str] = "cast-floats"
    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in NARROW:
            raise ValueError(f"dtype is {self.dtype!r}; it is one of {', '.join(NARROW)}")

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph in sixteen bits; its inputs, parameters and outputs keep their element types."""
        casting = _Casting(graph, self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of complex numbers of sixteen bits; no result has them
            for node in graph.nodes:
                casting.add(node)
        cast = _with_outputs_as_before(replace(graph, nodes=tuple(casting.nodes)), graph, self.dtype)
        return graph if cast == graph else cast


class _Casting:
    """The calls made so far, and a stand-in without data for every value that they define."""

    def __init__(self, graph: Graph, narrow: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.graph, self.narrow = graph, narrow
        self.nodes: list[Node] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._params = frozenset(param.name for param in graph.params)
        self._copies: dict[tuple[str, str], str] = {}
        self._names = set(graph.values)
        sizes = {size.name: max(size.minimum, min(4, size.maximum or 4)) for size in graph.sizes}
        with self._mode:
            self._values = {v.name: _stand_in(v.type, sizes) for v in (*graph.inputs, *graph.params)}

    def add(self, node: Node) -> None:
        """Take the call over, its inputs cast, its outputs of the types that PyTorch then gives."""
        cast = self._recast(node) if node.op in CASTS else self._narrowed(node)
        try:
            self._append(cast, node)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, KeyError, Unsupported):
            types = {name: self._given(name) for name in self._floats(node)}
            self._append(self._with_types(node, types), node)

    def _append(self, cast: Node, node: Node) -> None:
        with self._mode, torch.no_grad():
            results = call(cast, self._values)
        found = [_retyped(value, type_of(result)) for value, result in zip(node.outputs, results, strict=True)]
        self._values |= {value.name: result for value, result in zip(found, results, strict=True)}
        self.nodes.append(replace(cast, outputs=tuple(found)))

    def _recast(self, node: Node) -> Node:
        """A conversion: as written if it converted, else to the type that its input has come to have."""
        source = node.args.get("self")
        if not isinstance(source, Ref) or self._given(source.name) != node.type.dtype:
            types = {name: self._used(name) for name in self._floats(node) if Ref(name) != source}
            return self._with_types(node, types)
        dtype = self._used(source.name)
        if dtype == node.type.dtype:
            return self._with_types(node, {})
        return replace(node, op="aten._to_copy", args={"self": source, "dtype": Symbol(str(DTYPES[dtype]))})

    def _narrowed(self, node: Node) -> Node:
        """The call with all its float inputs in sixteen bits if any of them has sixteen bits."""
        floats = self._floats(node)
        narrow = {self._used(name) for name in floats} & set(NARROW)
        if not narrow:
            return self._with_types(node, {})
        dtype = self.narrow if len(narrow) > 1 else narrow.pop()
        return self._with_types(node, dict.fromkeys(floats, dtype))

    def _floats(self, node: Node) -> list[str]:
        """Inputs of the call that may be cast: tensors of f32, f16 and bf16 with at least one axis."""
        kept = AS_GIVEN.get(node.op, frozenset())
        names = dict.fromkeys(name for key, arg in node.args.items() if key not in kept for name in _refs(arg))
        return [name for name in names if self._is_float(name)]

    def _is_float(self, name: str) -> bool:
        type_ = self.graph.values[name].type
        return isinstance(type_, TensorType) and type_.dtype in ("f32", *NARROW) and bool(type_.shape)

    def _given(self, name: str) -> str:
        return self.graph.type(name).dtype

    def _now(self, name: str) -> str:
        found = type_of(self._values[name])
        assert isinstance(found, TensorType)
        return found.dtype

    def _used(self, name: str) -> str:
        """The element type in which calls see the value: of a parameter, that to which it is cast."""
        is_cast = name in self._params and self._is_float(name) and self._given(name) == "f32"
        return self.narrow if is_cast else self._now(name)

    def _with_types(self, node: Node, types: Mapping[str, str]) -> Node:
        """The call on copies of these element types, and on f32 where an operator of ours keeps what it was given."""
        kept = AS_GIVEN.get(node.op, frozenset())
        args: dict[str, Arg] = {}
        for key, arg in node.args.items():
            wanted = {name: self._given(name) for name in _refs(arg) if self._is_float(name)} if key in kept else types
            args[key] = renamed(arg, {name: self._copy(name, dtype, node) for name, dtype in wanted.items()})
        return replace(node, args=args)

    def _copy(self, name: str, dtype: str, user: Node) -> str:
        """The name under which the value stands in ``dtype``, cast before its first user."""
        if self._now(name) == dtype:
            return name
        if (name, dtype) not in self._copies:
            made = Value(fresh(f"{name}.{dtype}", self._names), TensorType(dtype, self.graph.type(name).shape))
            self._names.add(made.name)
            self._copies[name, dtype] = made.name
            args: dict[str, Arg] = {"self": Ref(name), "dtype": Symbol(str(DTYPES[dtype]))}
            cast = Node("aten._to_copy", args, (made,), user.source)
            self._append(cast, cast)
        return self._copies[name, dtype]


def _with_outputs_as_before(cast: Graph, graph: Graph, narrow: str) -> Graph:
    """Every output under its name and of its type: what has another type now is renamed, and cast at the end."""
    changed = [name for name in dict.fromkeys(graph.outputs) if cast.values[name].type != graph.values[name].type]
    names = {name: fresh(f"{name}.{narrow}", cast.values) for name in changed}
    nodes = tuple(replace(node, outputs=tuple(_named(v, names) for v in node.outputs)) for node in cast.nodes)
    inner = rename_uses(replace(cast, nodes=nodes), names)
    back = tuple(
        Node(
            "aten._to_copy",
            {"self": Ref(names[name]), "dtype": Symbol(str(DTYPES[graph.type(name).dtype]))},
            (graph.values[name],),
            graph.producers[name].source,
        )
        for name in changed
    )
    return replace(inner, nodes=inner.nodes + back, outputs=graph.outputs)


def _named(value: Value, names: Mapping[str, str]) -> Value:
    return replace(value, name=names.get(value.name, value.name))


def _retyped(value: Value, found: Type) -> Value:
    """The value with the element type that a call gave; its extents, which may have names, stay."""
    if not isinstance(found, TensorType) or not isinstance(value.type, TensorType):
        return value
    return Value(value.name, TensorType(found.dtype, value.type.shape))


def _stand_in(type_: Type, sizes: Mapping[str, int]) -> Any:
    if isinstance(type_, ScalarType):
        return 1
    return torch.empty([evaluate(extent, sizes) for extent in type_.shape], dtype=DTYPES[type_.dtype])


def _refs(arg: Arg) -> list[str]:
    if isinstance(arg, Ref):
        return [arg.name]
    return [name for item in arg for name in _refs(item)] if isinstance(arg, tuple) else []
