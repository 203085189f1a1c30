"""The calls that change channels of values at run time, and of weights at build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.sizes import Dim
from intarsia.ir.types import TensorType
from intarsia.passes.smooth_linear_maps import MIDDLE, STEPS, Factors, Map, Rotation

_DTYPES = {"f64": "torch.float64", "f32": "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16"}


@dataclass
class Calls:
    """Calls as they are asked for.

    Attributes:
        first: Those that need nothing: factors and matrices, once for all that need the same.
        ahead: Those that come before a call of the graph, by its name.
        behind: Those that come after a value of the graph, by its name.
    """

    graph: Graph
    first: list[Node] = field(default_factory=list)
    ahead: dict[str, list[Node]] = field(default_factory=dict)
    behind: dict[str, list[Node]] = field(default_factory=dict)
    _types: dict[str, TensorType] = field(default_factory=dict)
    _known: dict[tuple[object, ...], Ref] = field(default_factory=dict)

    def changed(self, value: str, map_: Map) -> str:
        """The value changed, at run time unless parameters alone determine it."""
        return self._map(self.behind.setdefault(value, []), f"{value}.smooth", Ref(value), map_, sign=-1).name

    def columns(self, layer: str, weight: str, map_: Map) -> Ref:
        """The weight (R, C) of a linear layer that reads changed channels, so that its result stays."""
        return self._map(self.ahead.setdefault(layer, []), f"{layer}.columns", Ref(weight), map_, sign=1)

    def shifted(self, value: str, name: str, factors: Factors) -> str:
        """The changed form ``name`` of a value less the shifts, at run time."""
        type_, into = self._type(Ref(value)), self.behind.setdefault(value, [])
        given: dict[str, Arg] = {"self": Ref(name), "other": self._offsets(factors, type_.dtype)}
        return self._call(into, f"{value}.shifted", "aten.sub.Tensor", type_, given).name

    def bias(self, layer: str, weight: Ref, bias: Arg, factors: Factors) -> Ref:
        """The bias (R) that makes up for the shifts of what a layer of weight (R, C) reads."""
        into, kind = self.ahead.setdefault(layer, []), self._type(weight)
        type_ = replace(kind, shape=kind.shape[:1])
        given: dict[str, Arg] = {"self": weight, "vec": self._offsets(factors, kind.dtype)}
        made = self._call(into, f"{layer}.offset", "aten.mv", type_, given)
        if not isinstance(bias, Ref):
            return made
        return self._call(into, f"{layer}.moved", "aten.add.Tensor", type_, {"self": made, "other": bias})

    def rows(self, owner: str, weight: Ref, map_: Map) -> Ref:
        """The weight (R, C) or (R), or the bias (R), of a linear layer or norm whose R results are to be changed."""
        into, name, type_ = self.ahead.setdefault(owner, []), f"{owner}.rows", self._type(weight)
        if len(type_.shape) == 1:
            return self._map(into, name, weight, map_, sign=-1)
        turned = replace(type_, shape=type_.shape[::-1])
        columns = self._call(into, f"{name}.turned", "aten.t", turned, {"self": weight})
        made = self._map(into, f"{name}.changed", columns, map_, sign=-1)
        return self._call(into, name, "aten.t", type_, {"self": made})

    def _map(self, into: list[Node], name: str, tensor: Ref, map_: Map, *, sign: int) -> Ref:
        """The last axis of a tensor, rotated, or multiplied by the factors or (-1) by their inverses."""
        type_ = self._type(tensor)
        if isinstance(map_, Factors):
            factors = self._factors(map_, type_.dtype, sign)
            return self._call(into, name, "aten.mul.Tensor", type_, {"self": tensor, "other": factors})
        parts = _parts(type_.shape[-1], map_.block)
        split = replace(type_, shape=(*type_.shape[:-1], *parts))
        given: dict[str, Arg] = {"self": tensor, "dim": -1, "sizes": parts}
        blocks = self._call(into, f"{name}.blocks", "aten.unflatten.int", split, given)
        given = {"self": blocks, "other": self._hadamard(map_, type_.dtype)}
        product = self._call(into, f"{name}.product", "aten.matmul", split, given)
        given = {"self": product, "start_dim": -2, "end_dim": -1}
        return self._call(into, name, "aten.flatten.using_ints", type_, given)

    def _factors(self, factors: Factors, dtype: str, sign: int) -> Ref:
        """The factors or (-1) their inverses."""
        key = (factors.digits, sign, dtype)
        if key not in self._known:
            name, type_ = "smooth.factors" if sign > 0 else "smooth.inverses", TensorType(dtype, (len(factors.digits),))
            given: dict[str, Arg] = {"self": self._whole(name, factors.digits, dtype, offset=-MIDDLE)}
            exponents = self._call(
                self.first, f"{name}.exponents", "aten.mul.Scalar", type_, given | {"other": sign / STEPS}
            )
            self._known[key] = self._call(self.first, name, "aten.exp2", type_, {"self": exponents})
        return self._known[key]

    def _offsets(self, factors: Factors, dtype: str) -> Ref:
        """The shifts."""
        key = (factors.shifts, factors.unit, dtype)
        if key not in self._known:
            steps = self._whole("smooth.shifts", factors.shifts, dtype, offset=-MIDDLE)
            type_ = TensorType(dtype, (len(factors.shifts),))
            given: dict[str, Arg] = {"self": steps, "other": factors.unit}
            self._known[key] = self._call(self.first, "smooth.shifts", "aten.mul.Scalar", type_, given)
        return self._known[key]

    def _hadamard(self, rotation: Rotation, dtype: str) -> Ref:
        """The matrix, over the root of its order."""
        key = (rotation, dtype)
        if key not in self._known:
            signs = self._whole("hadamard", (2, 2, 2, 0), dtype, offset=-1)
            type_ = TensorType(dtype, (2, 2))
            pair = made = self._call(self.first, "hadamard.2", "aten.view", type_, {"self": signs, "size": (2, 2)})
            order = 2
            while order < rotation.block:
                order *= 2
                type_ = TensorType(dtype, (order, order))
                made = self._call(self.first, f"hadamard.{order}", "aten.kron", type_, {"self": made, "other": pair})
            given: dict[str, Arg] = {"self": made, "other": order**-0.5}
            self._known[key] = self._call(self.first, f"hadamard.{order}.rotation", "aten.mul.Scalar", type_, given)
        return self._known[key]

    def _whole(self, name: str, numbers: Sequence[int], dtype: str, *, offset: int) -> Ref:
        """Whole numbers, each plus ``offset``."""
        whole, type_ = TensorType("i64", (len(numbers),)), TensorType(dtype, (len(numbers),))
        made = self._call(self.first, f"{name}.whole", "intarsia.integers", whole, {"runs": _runs(numbers)})
        given: dict[str, Arg] = {"self": made, "dtype": Symbol(_DTYPES[dtype])}
        cast = self._call(self.first, f"{name}.cast", "aten._to_copy", type_, given)
        return self._call(self.first, f"{name}.moved", "aten.add.Scalar", type_, {"self": cast, "other": offset})

    def _call(self, into: list[Node], name: str, op: str, type_: TensorType, args: dict[str, Arg]) -> Ref:
        """One more call, which gives one tensor."""
        while name in self.graph.values or name in self._types:
            name += "_"
        self._types[name] = type_
        into.append(Node(op, args, (Value(name, type_),)))
        return Ref(name)

    def _type(self, tensor: Ref) -> TensorType:
        return self._types.get(tensor.name) or self.graph.type(tensor.name)


def _parts(channels: Dim, block: int) -> tuple[int, int]:
    """Blocks, and channels of a block."""
    assert isinstance(channels, int)
    return channels // block, block


def _runs(numbers: Sequence[int]) -> str:
    """Whole numbers from 0 on as ``intarsia.integers`` reads them, equal neighbours together."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and pieces[-1][0] == number:
            pieces[-1][1] += 1
        else:
            pieces.append([number, 1])
    return ",".join(f"{number}:{count}*0" for number, count in pieces)
