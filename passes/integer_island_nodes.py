"""The integer calls that stand in place of an island in float, and of what leads into it and out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose

import numpy as np
import torch

from intarsia import kernels
from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.program import split_constant
from intarsia.ir.rewrite import fresh, renamed
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.kernels.integers.golden import dyadic
from intarsia.passes.integer_island_roles import FUNCTION, NORM, PRODUCT, SOFTMAX, Island, island
from intarsia.passes.quantize_integer_grids import Grid, dyadic_shift
from intarsia.passes.quantize_integer_roles import bounds, keeps_grid, source

SAME = 1e-6
"""Scales that differ by so little, relative to one, give the same codes: of 16 bits none moves by half a step."""

BITS = {"i8": 8, "i16": 16}


@dataclass(frozen=True)
class Codes:
    """What the codes of a value are called, and what one step of them is."""

    name: str
    scale: float


class Emitter:
    """Writes integer calls, in the order of the graph.

    Attributes:
        codes: Of values in float, those that are codes times a number.
        made: Codes that are computed in integers now.
        names: Codes that are others, by what they were called.
        refused: Islands that stay in float, with the reason.
    """

    def __init__(self, graph: Graph, target: Target) -> None:
        self.graph, self.target = graph, target
        self.codes: dict[str, Codes] = {}
        self.made: list[str] = []
        self.names: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.values = dict(graph.values)
        self.ends: dict[str, tuple[int, int]] = {}
        self.one: Value | None = None
        constant, _ = split_constant(graph)
        self.weights = {param.name for param in graph.params} | {v.name for node in constant for v in node.outputs}

    def dequantized(self, node: Node) -> None:
        """A value in float that is codes times a scale."""
        scale = node.args["scale"]
        assert isinstance(scale, float)
        self.codes[node.name] = Codes(node.ref("input"), scale)

    def scaled(self, node: Node, found: Island) -> None:
        """A value in float that is another one times a number: the same codes."""
        if below := self.codes.get(found.reads[0]):
            self.codes[node.name] = replace(below, scale=below.scale * found.factor)

    def kept(self, node: Node) -> Sequence[Node]:
        """The operator on codes, and on floats."""
        name = source(node)
        assert name is not None
        below = self.codes[name]
        made = self._value(f"{node.name}.codes", self._dtype(below.name), node.type.shape)
        low, high = self._ends(below.name)
        clip = bounds(node)
        self.ends[made.name] = (max(low, 0), max(high, 0)) if clip else (min(low, 0), max(high, 0))
        self.codes[node.name] = Codes(made.name, below.scale)
        args = {key: renamed(arg, {name: below.name}) for key, arg in node.args.items()}
        return replace(node, args=args, outputs=(made,)), node

    def quantized(self, node: Node) -> Sequence[Node] | None:
        """What computes the codes that an ``intarsia.quantize_static`` gives in integers; None if it stays in float."""
        below = node.ref("input")
        if below in self.codes:
            return self._requantized(node, self.codes[below])
        above = self.graph.producers.get(below)
        found = island(above, self.graph) if above else None
        if above is None or not isinstance(found, Island) or not all(name in self.codes for name in found.reads):
            return None
        writers: Mapping[str, Callable[[Node, Node, Island], Sequence[Node]]] = {
            FUNCTION: self._function,
            SOFTMAX: self._softmax,
            NORM: self._norm,
            PRODUCT: self._product,
        }
        try:
            made = writers[found.kind](node, above, found)
        except PlanError as error:
            self.refused[above.name] = str(error)
            return None
        if reason := self._why_not(made):
            self.refused[above.name] = reason
            return None
        self.made.append(node.name)
        return made

    def _requantized(self, node: Node, given: Codes) -> Sequence[Node]:
        """From the codes that are there; they themselves where the grids are the same."""
        onto = _grid(node)
        low, high = self._ends(given.name)
        self.made.append(node.name)
        same = isclose(given.scale, onto.scale, rel_tol=SAME) and node.type.dtype == self._dtype(given.name)
        if same and onto.low <= low and high <= onto.high:
            self.names[node.name] = given.name
            return ()
        dyadic_shift(given.scale / onto.scale, f"integer-islands: %{node.name}")
        made: list[Node] = []
        if self.one is None:
            self.one = self._value("one", "f32", (1,))
            fill: dict[str, Arg] = {"size": (1,), "fill_value": 1.0, "dtype": Symbol("torch.float32")}
            made.append(Node("aten.full", fill, (self.one,)))
        multiplier, shift = (self._value(f"{node.name}.{key}", "i32", (1,)) for key in ("multiplier", "shift"))
        ratio: dict[str, Arg] = {"scale": Ref(self.one.name), "factor": given.scale / onto.scale}
        made.append(Node("intarsia.dyadic", ratio, (multiplier, shift)))
        args: dict[str, Arg] = {"multiplier": Ref(multiplier.name), "shift": Ref(shift.name), "axis": 0}
        return *made, self._call("intarsia.requantize", node, {"input": Ref(given.name), **args})

    def _function(self, node: Node, above: Node, found: Island) -> Sequence[Node]:
        given, bits = self._read(found)
        table = self._value(f"{node.name}.table", "i32", (256 if bits == 8 else 2049,))
        scales: dict[str, Arg] = {"input_scale": given.scale, "scale": _grid(node).scale, "bits": bits}
        make = Node("intarsia.function_table", {"function": found.function, **scales}, (table,), node.source)
        return make, self._call("intarsia.apply_table", node, {"input": Ref(given.name), "table": Ref(table.name)})

    def _softmax(self, node: Node, above: Node, found: Island) -> Sequence[Node]:
        given, bits = self._read(found)
        table = self._value(f"{node.name}.table", "i32", (256 if bits == 8 else 512,))
        make = Node("intarsia.exponentials", {"scale": given.scale, "bits": bits}, (table,), node.source)
        args: dict[str, Arg] = {"input": Ref(given.name), "table": Ref(table.name)}
        return make, self._call("intarsia.integer_softmax", node, {**args, **_number(1 / _grid(node).scale, above)})

    def _norm(self, node: Node, above: Node, found: Island) -> Sequence[Node]:
        given, _ = self._read(found)
        affine = {key: above.args.get(key) for key in ("weight", "bias")}
        if any(isinstance(one, Ref) and one.name not in self.weights for one in affine.values()):
            raise PlanError(f"integer-islands: %{above.name}: weight and bias depend on the model's inputs")
        channels = above.type.shape[-1]
        if not isinstance(channels, int):
            raise PlanError(
                f"integer-islands: %{above.name} is a norm over {channels} channels, a fixed number is needed"
            )
        shapes = (("weight", "i32", channels), ("bias", "i64", channels), ("shift", "i32", 1))
        made = tuple(self._value(f"{node.name}.{key}", dtype, (count,)) for key, dtype, count in shapes)
        numbers: dict[str, Arg] = {**affine, "scale": _grid(node).scale, "channels": channels}
        make = Node("intarsia.norm_numbers", numbers, made, node.source)
        args: dict[str, Arg] = {key: Ref(one.name) for (key, _, _), one in zip(shapes, made, strict=True)}
        eps = above.args.get("eps", 1e-5 if above.op == "aten.layer_norm" else None)
        smallest = eps if isinstance(eps, int | float) else torch.finfo(torch.float32).eps
        epsilon = max(1, round(channels**2 * smallest / given.scale**2))
        args |= {"epsilon": epsilon, "centered": above.op == "aten.layer_norm"}
        return make, self._call("intarsia.integer_norm", node, {"input": Ref(given.name), **args})

    def _product(self, node: Node, above: Node, found: Island) -> Sequence[Node]:
        one, other = (self.codes[name] for name in found.reads)
        number = _number(one.scale * other.scale / _grid(node).scale, above)
        args: dict[str, Arg] = {"input": Ref(one.name), "other": Ref(other.name)}
        return (self._call("intarsia.matmul_i8i8", node, {**args, **number}),)

    def _read(self, found: Island) -> tuple[Codes, int]:
        """The codes of the one operand, and their bits."""
        given = self.codes[found.reads[0]]
        dtype = self._dtype(given.name)
        if dtype not in BITS:
            raise PlanError(f"integer-islands: %{given.name} is {dtype}; islands read i8 and i16")
        return given, BITS[dtype]

    def _call(self, op: str, node: Node, args: Mapping[str, Arg]) -> Node:
        """The call that gives what the quantize gave."""
        onto = _grid(node)
        return Node(op, {**args, "low": onto.low, "high": onto.high}, node.outputs, node.source)

    def _why_not(self, made: Sequence[Node]) -> str | None:
        """What its kernel says against the last call."""
        inside = {value.name for node in made for value in node.outputs}
        names = dict.fromkeys(name for node in made for name in node.inputs if name not in inside)
        around = Graph("call", tuple(self.values[name] for name in names), (), tuple(made), (made[-1].name,))
        return kernels.why_not(made[-1], around, self.target)

    def _dtype(self, name: str) -> str:
        type_ = self.values[name].type
        assert isinstance(type_, TensorType)
        return type_.dtype

    def _ends(self, name: str) -> tuple[int, int]:
        """Integers between which the codes lie."""
        if name not in self.ends:
            node = self.graph.producers.get(name)
            low, high = (node.args.get(key) for key in ("low", "high")) if node else (None, None)
            below = source(node) if node and keeps_grid(node) else None
            bits = int(self._dtype(name)[1:])
            if isinstance(low, int) and isinstance(high, int):
                self.ends[name] = (low, high)
            elif below:
                lowest, highest = self._ends(below)
                self.ends[name] = (min(lowest, 0), max(highest, 0))
            else:
                self.ends[name] = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return self.ends[name]

    def _value(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> Value:
        made = Value(fresh(name, self.values), TensorType(dtype, shape))
        self.values[made.name] = made
        return made


def _grid(node: Node) -> Grid:
    scale, low, high = node.args["scale"], node.args.get("low", -128), node.args.get("high", 127)
    assert isinstance(scale, float)
    assert isinstance(low, int)
    assert isinstance(high, int)
    return Grid(scale, low, high)


def _number(ratio: float, above: Node) -> dict[str, Arg]:
    """Multiplier and shift of a real number; PlanError if it has none."""
    dyadic_shift(ratio, f"integer-islands: %{above.name}")
    multiplier, shift = dyadic(np.ones(1, np.float32), ratio)
    return {"multiplier": int(multiplier[0]), "shift": int(shift[0])}
