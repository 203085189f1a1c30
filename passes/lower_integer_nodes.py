"""The integer calls that give a value's codes on a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.program import split_constant
from intarsia.ir.rewrite import fresh, renamed
from intarsia.ir.types import TensorType
from intarsia.passes.lower_integer_codes import Codes, integer_dtype
from intarsia.passes.quantize_integer_grids import Grid, code, dyadic_shift
from intarsia.passes.quantize_integer_layers import LARGEST_SUM, why_sum_overflows
from intarsia.passes.quantize_integer_roles import LAYERS, Bounds, Window, addends, bounds, pair, source, window

ROUNDED_WEIGHT = "intarsia.fake_quantize_channels"
ROUNDED_BIAS = "intarsia.fake_quantize_bias"

_DTYPES = {"f32": "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16"}


def grid_of(node: Node) -> Grid:
    """The grid that an ``intarsia.fake_quantize`` rounds to."""
    scale, low, high = node.args["scale"], node.args["low"], node.args["high"]
    assert isinstance(scale, float)
    assert isinstance(low, int)
    assert isinstance(high, int)
    return Grid(scale, low, high)


class Emitter:
    """Writes the integer form of one value after the other, in the order of the graph."""

    def __init__(self, graph: Graph, codes: Codes) -> None:
        self.graph, self.codes = graph, codes
        self.taken = set(graph.values)
        self.one: Value | None = None
        constant, _ = split_constant(graph)
        self.weights = {param.name for param in graph.params} | {v.name for node in constant for v in node.outputs}

    def onto_grid(self, rounding: Node) -> Sequence[Node]:
        """What computes the codes of an ``intarsia.fake_quantize``, clamps before it taken along."""
        onto, below = grid_of(rounding), rounding.ref("input")
        clip = Bounds(None, None)
        while below not in self.codes.names:
            node = self.graph.producers.get(below)
            clamp, under = (bounds(node), source(node)) if node else (None, None)
            if clamp is None or under is None:
                break
            clip, below = clamp.inside(clip), under
        low, high = self._clipped(onto, clip, rounding)
        if self._is_there(below, onto, low, high):
            self.codes.add(rounding.name, self.codes.names[below], onto, self.codes.dtypes[below])
            return ()
        made = self._from_codes(rounding, below, onto, low, high) or self._made(rounding, below, onto, low, high)
        if made is None:
            given = {"input": rounding.args["input"], "scale": onto.scale, "low": onto.low, "high": onto.high}
            made = (self._call("intarsia.quantize_static", rounding, given),)
        result, ends = made[-1], _ends(made)
        self.codes.add(rounding.name, result.name, replace(onto, low=ends[0], high=ends[1]), result.type.dtype)
        return made

    def kept(self, node: Node, names: tuple[str, ...]) -> Sequence[Node]:
        """The same operator on codes, and its result in float; several operands are alike."""
        grids = [self.codes.grids[name] for name in names]
        both = replace(grids[0], low=min(one.low for one in grids), high=max(one.high for one in grids))
        dtype = self.codes.dtypes[names[0]]
        made = Value(self._fresh(f"{node.name}.codes"), replace(node.type, dtype=dtype))
        self.codes.add(node.name, made.name, both, dtype)
        args = {key: renamed(arg, {name: self.codes.names[name] for name in names}) for key, arg in node.args.items()}
        return replace(node, args=args, outputs=(made,)), self.dequantized(node)

    def dequantized(self, node: Node) -> Node:
        """What the node gives in float, from its codes."""
        dtype = Symbol(_DTYPES[node.type.dtype])
        codes, scale = Ref(self.codes.names[node.name]), self.codes.grids[node.name].scale
        return replace(node, op="intarsia.dequantize_static", args={"input": codes, "scale": scale, "dtype": dtype})

    def _is_there(self, below: str, onto: Grid, low: int, high: int) -> bool:
        """Whether the codes of the value below lie on the grid already, none of them outside its ends."""
        found = self.codes.grids.get(below)
        return found is not None and found.scale == onto.scale and low <= found.low and found.high <= high

    def _from_codes(self, rounding: Node, below: str, onto: Grid, low: int, high: int) -> Sequence[Node] | None:
        """From one grid to another."""
        if below not in self.codes.names:
            return None
        ratio = self.codes.grids[below].scale / onto.scale
        numbers, dyadic = self._numbers(rounding, {"": ratio})
        if self.codes.grids[below].low >= 0 < high:
            low = max(low, 0)
        clip: dict[str, Arg] = {"low": low, "high": high}
        exact, dyadic = self._exact(rounding.name, dyadic, None, None, grid=self.codes.grids[below], clip=clip)
        args = {"input": Ref(self.codes.names[below]), **dyadic, "axis": 0, **clip}
        return *numbers, *exact, self._call("intarsia.requantize", rounding, args)

    def _made(self, rounding: Node, below: str, onto: Grid, low: int, high: int) -> Sequence[Node] | None:
        """Straight from the product, the sum or the average that the value is."""
        node = self.graph.producers.get(below)
        if node is None:
            return None
        clip: dict[str, Arg] = {"low": low, "high": high}
        if node.op in LAYERS:
            return self._product(rounding, node, onto, clip)
        if (names := addends(node, self.graph)) and all(name in self.codes.names for name in names):
            return self._sum(rounding, names, onto, clip)
        found = window(node, self.graph)
        if isinstance(found, Window) and source(node) in self.codes.names:
            return self._average(rounding, node, found, onto, clip)
        return None

    def _product(self, rounding: Node, layer: Node, onto: Grid, clip: dict[str, Arg]) -> Sequence[Node] | None:
        below, rounder = layer.ref("input"), self.graph.producers.get(layer.ref("weight"))
        bias = layer.args.get("bias")
        if rounder is None or rounder.op != ROUNDED_WEIGHT or self.codes.dtypes.get(below) != "i8":
            return None
        if isinstance(bias, Ref) and bias.name not in self.weights:
            return None
        bits, onto_input = rounder.args["bits"], self.codes.grids[below]
        assert isinstance(bits, int)
        largest = max(-onto_input.low, onto_input.high)
        if reason := why_sum_overflows(layer, self.graph, weight_bits=bits, largest=largest):
            raise PlanError(f"lower-integer: %{layer.name}: {reason}")
        type_ = self.graph.type(layer.ref("weight"))
        weight = Value(self._fresh(f"{layer.name}.codes"), replace(type_, dtype="i8"))
        scale = Value(self._fresh(f"{layer.name}.scale"), TensorType("f32", type_.shape[:1]))
        quantize = Node("intarsia.quantize_channels", dict(rounder.args), (weight, scale), layer.source)
        dyadic, numbers = self._dyadic(layer.name, Ref(scale.name), onto_input.scale / onto.scale, type_.shape[0])
        made = [quantize, dyadic]
        args: dict[str, Arg] = {"input": Ref(self.codes.names[below]), "weight": Ref(weight.name), "bias": None}
        if isinstance(bias, Ref):
            room = LARGEST_SUM - prod(map(int, type_.shape[1:])) * 2 ** (bits - 1) * largest
            made.append(self._bias(layer, bias, scale, onto_input.scale, room))
            args["bias"] = Ref(made[-1].name)
        exact, numbers = self._exact(layer.name, numbers, weight, args["bias"], grid=onto_input, clip=clip)
        made += exact
        op = "intarsia.linear_i8i8"
        if layer.op == "aten.conv2d":
            op, numbers = "intarsia.conv2d_i8i8", {**numbers, **_geometry(layer)}
        return *made, self._call(op, rounding, {**args, **numbers, **clip})

    def _bias(self, layer: Node, bias: Ref, scale: Value, input_scale: float, largest: int) -> Node:
        """The bias in steps of the sum, from what it was before it was rounded in float; up to ``largest``."""
        rounder = self.graph.producers.get(bias.name)
        given = rounder.args["bias"] if rounder and rounder.op == ROUNDED_BIAS else bias
        args = {"bias": given, "scale": Ref(scale.name), "input_scale": input_scale, "largest": largest}
        assert isinstance(scale.type, TensorType)
        made = Value(self._fresh(f"{layer.name}.bias.codes"), replace(scale.type, dtype="i32"))
        return Node("intarsia.quantize_bias", args, (made,), layer.source)

    def _sum(self, rounding: Node, names: tuple[str, str], onto: Grid, clip: dict[str, Arg]) -> Sequence[Node]:
        one, other = names
        ratios = {"": self.codes.grids[one].scale / onto.scale, "other_": self.codes.grids[other].scale / onto.scale}
        numbers, dyadic = self._numbers(rounding, ratios)
        args = {"input": Ref(self.codes.names[one]), "other": Ref(self.codes.names[other]), **dyadic, **clip}
        call = self._call("intarsia.add_requantized", rounding, args)
        return *numbers, call

    def _average(
        self, rounding: Node, pool: Node, found: Window, onto: Grid, clip: dict[str, Arg]
    ) -> Sequence[Node] | None:
        below = pool.ref("self")
        terms, largest = (
            found.kernel[0] * found.kernel[1],
            max(-self.codes.grids[below].low, self.codes.grids[below].high),
        )
        if terms * largest > LARGEST_SUM:
            raise PlanError(f"lower-integer: %{pool.name}: a sum of {terms:,} codes up to {largest} may overflow int32")
        numbers, dyadic = self._numbers(rounding, {"": self.codes.grids[below].scale / onto.scale / found.divisor})
        geometry: dict[str, Arg] = {"kernel_size": found.kernel, "stride": found.stride, "padding": found.padding}
        args = {"input": Ref(self.codes.names[below]), **geometry, **dyadic, **clip}
        call = self._call("intarsia.avg_pool2d_i8", rounding, args)
        if not found.squeezed:
            return *numbers, call
        inner = Value(self._fresh(f"{pool.name}.codes"), replace(call.type, shape=(*call.type.shape, 1, 1)))
        squeeze: dict[str, Arg] = {"self": Ref(inner.name), "dim": (2, 3)}
        outer = replace(call, op="aten.squeeze.dims", args=squeeze)
        return *numbers, replace(call, outputs=(inner,)), outer

    def _numbers(self, rounding: Node, ratios: dict[str, float]) -> tuple[list[Node], dict[str, Arg]]:
        """Dyadic numbers of whole tensors, and the arguments that pass them, by the arguments' prefix."""
        made: list[Node] = []
        args: dict[str, Arg] = {}
        if self.one is None:
            self.one = Value(self._fresh("one"), TensorType("f32", (1,)))
            fill: dict[str, Arg] = {"size": (1,), "fill_value": 1.0, "dtype": Symbol("torch.float32")}
            made.append(Node("aten.full", fill, (self.one,)))
        for prefix, ratio in ratios.items():
            dyadic_shift(ratio, f"lower-integer: %{rounding.name}")
            node, numbers = self._dyadic(f"{rounding.name}.{prefix}".rstrip("._"), Ref(self.one.name), ratio, 1)
            made.append(node)
            args |= {f"{prefix}{key}": value for key, value in numbers.items()}
        return made, args

    def _dyadic(self, name: str, scale: Ref, factor: float, channels: int | str) -> tuple[Node, dict[str, Arg]]:
        type_ = TensorType("i32", (channels,))
        multiplier = Value(self._fresh(f"{name}.multiplier"), type_)
        shift = Value(self._fresh(f"{name}.shift"), type_)
        node = Node("intarsia.dyadic", {"scale": scale, "factor": factor}, (multiplier, shift))
        return node, {"multiplier": Ref(multiplier.name), "shift": Ref(shift.name)}

    def _exact(
        self, name: str, numbers: dict[str, Arg], weight: Value | None, bias: Arg, *, grid: Grid, clip: dict[str, Arg]
    ) -> tuple[list[Node], dict[str, Arg]]:
        """Numbers near those given that f32 multiplies by exactly, and the call that finds them.

        ``grid`` is that of the integers that are multiplied, by the ``weight`` or by nothing.
        """
        low, high = clip["low"], clip["high"]
        assert isinstance(low, int)
        assert isinstance(high, int)
        channels = weight.type.shape[0] if weight and isinstance(weight.type, TensorType) else 1
        made = tuple(
            Value(self._fresh(f"{name}.exact.{key}"), TensorType("i32", (channels,))) for key in ("multiplier", "shift")
        )
        args: dict[str, Arg] = {"weight": Ref(weight.name) if weight else None, "bias": bias}
        args = {**numbers, **args, "input_low": grid.low, "input_high": grid.high, **clip}
        exact: dict[str, Arg] = {"multiplier": Ref(made[0].name), "shift": Ref(made[1].name)}
        return [Node("intarsia.exact_dyadic", args, made)], exact

    def _call(self, op: str, rounding: Node, args: Mapping[str, Arg]) -> Node:
        """The call that gives the codes of what ``rounding`` rounds."""
        low, high = args["low"], args["high"]
        assert isinstance(low, int)
        assert isinstance(high, int)
        type_ = replace(rounding.type, dtype=integer_dtype(low, high))
        return Node(op, args, (Value(self._fresh(f"{rounding.name}.codes"), type_),), rounding.source)

    def _clipped(self, onto: Grid, clip: Bounds, rounding: Node) -> tuple[int, int]:
        """The codes to which a clamp and the grid's own ends clip; PlanError if they leave one code or none."""
        low = onto.low if clip.low is None else max(onto.low, min(code(clip.low, onto.scale), onto.high))
        high = onto.high if clip.high is None else min(onto.high, max(code(clip.high, onto.scale), onto.low))
        if low < high:
            return low, high
        raise PlanError(
            f"lower-integer: %{rounding.name}: a clamp to {clip.low} to {clip.high} leaves one code of the grid "
            f"{onto.low} to {onto.high} times {onto.scale:.3g}; calibrate on data that reaches it"
        )

    def _fresh(self, name: str) -> str:
        free = fresh(name, self.taken)
        self.taken.add(free)
        return free


def _ends(made: Sequence[Node]) -> tuple[int, int]:
    """Between which the codes lie that the calls make."""
    call = next(node for node in reversed(made) if "low" in node.args)
    low, high = call.args["low"], call.args["high"]
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high


def _geometry(layer: Node) -> dict[str, Arg]:
    """What else a convolution is told, in full."""
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    groups = layer.args.get("groups", 1)
    return {**{key: pair(layer.args.get(key), default) for key, default in pairs.items()}, "groups": groups}
