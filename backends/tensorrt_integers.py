"""Integer operators as TensorRT computes them: int8 in and out of products, everything between in f32 whole numbers.

    %y: i8 = intarsia.conv2d_i8i8(%q, %w, ...)           DequantizeLinear(both) -> Conv -> QuantizeLinear
    %y: i16 = intarsia.conv2d_i8i8(%q, %w, ...)          the same, then Floor(x + 1/2) and Clip: whole numbers in f32
    %y: i16 = intarsia.add_requantized(%a, %b, ...)      each operand times its number, Floor(x + 1/2); Add; Clip
    %y: i8 = aten.relu(%q), max_pool2d, cat              DequantizeLinear -> the operator -> QuantizeLinear

TensorRT has no 16-bit integers, so the residual trunk stays in f32, where every such number is exact. It has no dyadic
numbers either: a multiplier b / 2**c becomes the scale of its channel, in f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.rewrite import renamed
from intarsia.ir.types import TensorType

PRODUCTS = (
    "intarsia.linear_i8i8",
    "intarsia.conv2d_i8i8",
    "intarsia.requantize",
    "intarsia.add_requantized",
    "intarsia.avg_pool2d_i8",
)
"""Operators of ours that become three or more of ONNX's, their dyadic numbers in f32."""

ON_INTEGERS = (
    "aten.relu",
    "aten.relu_",
    "aten.max_pool2d",
    "aten.cat",
    "aten.clamp",
    "aten.hardtanh",
    "aten.pad",
    "aten.constant_pad_nd",
)
"""Operators of PyTorch that compute with codes; TensorRT has them in floats alone."""

MOVES = (
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "slice",
    "select",
)
"""Operators of PyTorch that leave elements as they are."""

_F32 = Symbol("torch.float32")
_I8_ENDS = (-128, 127)


def takes_i16(node: Node) -> bool:
    """Whether the call may read or give 16-bit integers, which are whole numbers in f32 then."""
    domain, _, rest = node.op.partition(".")
    known = node.op in (*PRODUCTS, *ON_INTEGERS, "intarsia.quantize_static", "intarsia.dequantize_static")
    return known or (domain == "aten" and rest.partition(".")[0] in MOVES)


def lowered(node: Node, graph: Graph) -> Sequence[Node] | None:
    """What stands in place of a call that reads or gives integers; None if it may stay."""
    if node.op in PRODUCTS:
        return _Calls(node, graph).product()
    if node.op == "intarsia.quantize_static":
        return _Calls(node, graph).quantized()
    if node.op == "intarsia.dequantize_static" and graph.type(node.ref("input")).dtype != "i8":
        return _Calls(node, graph).dequantized()
    dtypes = {graph.type(value.name).dtype for value in node.outputs if isinstance(value.type, TensorType)}
    if node.op in ON_INTEGERS and dtypes == {"i8"}:
        return _Calls(node, graph).in_floats()
    return [replace(node, outputs=_wide(node))] if "i16" in dtypes else None


def _wide(node: Node) -> tuple[Value, ...]:
    """The node's results, 16-bit integers among them as f32."""
    return tuple(
        replace(value, type=replace(value.type, dtype="f32"))
        if isinstance(value.type, TensorType) and value.type.dtype == "i16"
        else value
        for value in node.outputs
    )


@dataclass
class _Calls:
    """What is written in place of one node."""

    node: Node
    graph: Graph
    made: list[Node] = field(default_factory=list[Node])

    def product(self) -> Sequence[Node]:
        node, result = self.node, TensorType("f32", self.node.type.shape)
        if node.op == "intarsia.add_requantized":
            left, right = self._scaled("input", ""), self._scaled("other", "other_")
            return self._stored(self._call("aten.add.Tensor", "sum", result, self=left, other=right), is_whole=True)
        if node.op == "intarsia.requantize":
            return self._stored(self._multiplied("input", "", node.args["axis"]))
        if node.op == "intarsia.avg_pool2d_i8":
            return self._stored(self._average(result))
        factor, wide = self._factor(""), TensorType("f32", self.graph.type(node.ref("multiplier")).shape)
        number = self._number("input")
        bias = node.args["bias"] and self._call("aten.mul.Tensor", "bias", wide, self=node.args["bias"], other=factor)
        args: dict[str, Arg] = {"input": number, "weight": node.args["weight"], "scale": factor, "bias": bias}
        window = {key: node.args[key] for key in ("stride", "padding", "dilation", "groups") if key in node.args}
        op = "intarsia.linear_i8" if node.op == "intarsia.linear_i8i8" else "intarsia_tensorrt.conv2d_i8"
        return self._stored(self._call(op, "product", result, **args, **window))

    def quantized(self) -> Sequence[Node] | None:
        """Codes of a float: QuantizeLinear, clipped before where the ends are others than int8's; in f32 beyond it."""
        low, high = self._ends()
        if (low, high) == _I8_ENDS:
            return None
        node, scale = self.node, self.node.args["scale"]
        type_ = self.graph.type(node.ref("input"))
        assert isinstance(scale, float)
        if self.node.type.dtype == "i8":
            ends = {"min": low * scale, "max": high * scale}
            clipped = self._call("aten.clamp", "clipped", type_, self=node.args["input"], **ends)
            return [*self.made, replace(node, args={"input": clipped, "scale": scale})]
        wide = replace(type_, dtype="f32")
        number = self._call("aten._to_copy", "wide", wide, self=node.args["input"], dtype=_F32)
        steps = self._call("aten.div.Tensor", "steps", wide, self=number, other=scale)
        whole = self._call("aten.round", "whole", wide, self=steps)
        return [
            *self.made,
            replace(node, op="aten.clamp", args={"self": whole, "min": low, "max": high}, outputs=_wide(node)),
        ]

    def dequantized(self) -> Sequence[Node]:
        """A float of i16, which is one already, or of i32."""
        node, type_ = self.node, replace(self.node.type, dtype="f32")
        real = self._call("aten.mul.Tensor", "real", type_, self=self._number("input"), other=node.args["scale"])
        return [*self.made, replace(node, op="aten._to_copy", args={"self": real, "dtype": node.args["dtype"]})]

    def in_floats(self) -> Sequence[Node]:
        """The operator between DequantizeLinear and QuantizeLinear, both of scale 1."""
        node, names = self.node, {}
        for name in dict.fromkeys(node.inputs):
            type_ = TensorType("f32", self.graph.type(name).shape)
            args: dict[str, Arg] = {"input": Ref(name), "scale": 1.0, "dtype": _F32}
            names[name] = self._call("intarsia.dequantize_static", f"{name}.wide", type_, **args).name
        args = {key: renamed(arg, names) for key, arg in node.args.items()}
        answer = self._call(node.op, "result", replace(node.type, dtype="f32"), **args)
        return [*self.made, replace(node, op="intarsia.quantize_static", args={"input": answer, "scale": 1.0})]

    def _average(self, result: TensorType) -> Ref:
        window = self.node.args["kernel_size"]
        assert isinstance(window, tuple)
        sides = {key: self.node.args[key] for key in ("kernel_size", "stride", "padding")}
        mean = self._call("aten.avg_pool2d", "mean", result, self=self._number("input"), **sides)
        terms = prod(size for size in window if isinstance(size, int))
        sums = self._call("aten.mul.Tensor", "sum", result, self=mean, other=float(terms))
        return self._call("aten.mul.Tensor", "product", result, self=sums, other=self._column("", 1))

    def _scaled(self, key: str, prefix: str) -> Ref:
        """An operand times its dyadic number, rounded half up."""
        return self._whole(self._multiplied(key, prefix, 0), prefix)

    def _multiplied(self, key: str, prefix: str, axis: Arg) -> Ref:
        type_ = TensorType("f32", self.graph.type(self.node.ref(key)).shape)
        assert isinstance(axis, int)
        column = self._column(prefix, axis)
        return self._call("aten.mul.Tensor", f"{prefix}product", type_, self=self._number(key), other=column)

    def _column(self, prefix: str, axis: int) -> Ref:
        """The dyadic numbers in f32 along ``axis`` of the result, or one for all."""
        factor, rows = self._factor(prefix), self.graph.type(self.node.ref(f"{prefix}multiplier"))
        rank = len(self.node.type.shape)
        shape = tuple(rows.shape[0] if index == axis % rank else 1 for index in range(rank))
        return self._call("aten.reshape", f"{prefix}column", TensorType("f32", shape), self=factor, shape=shape)

    def _factor(self, prefix: str) -> Ref:
        """The dyadic numbers in f32."""
        multiplier, shift = (self.node.args[f"{prefix}{key}"] for key in ("multiplier", "shift"))
        rows = self.graph.type(self.node.ref(f"{prefix}multiplier"))
        down = self._call("aten.neg", f"{prefix}down", rows, self=shift)
        wide = TensorType("f32", rows.shape)
        return self._call("aten.ldexp.Tensor", f"{prefix}factor", wide, self=multiplier, other=down)

    def _number(self, key: str) -> Ref:
        """An operand's integers in f32; those of 16 bits are there already."""
        type_ = self.graph.type(self.node.ref(key))
        wide = TensorType("f32", type_.shape)
        match type_.dtype:
            case "i16":
                return Ref(self.node.ref(key))
            case "i8":
                args: dict[str, Arg] = {"input": self.node.args[key], "scale": 1.0, "dtype": _F32}
                return self._call("intarsia.dequantize_static", f"{key}.wide", wide, **args)
            case _:
                return self._call("aten._to_copy", f"{key}.wide", wide, self=self.node.args[key], dtype=_F32)

    def _stored(self, answer: Ref, *, is_whole: bool = False) -> Sequence[Node]:
        """The result from f32: int8 by QuantizeLinear, wider integers rounded half up and clipped in f32."""
        (low, high), node = self._ends(), self.node
        wide = TensorType("f32", node.type.shape)
        if node.type.dtype == "i8":
            if (low, high) != _I8_ENDS:
                answer = self._call("aten.clamp", "clipped", wide, self=answer, min=low, max=high)
            return [*self.made, replace(node, op="intarsia.quantize_static", args={"input": answer, "scale": 1.0})]
        whole = answer if is_whole else self._whole(answer, "")
        if node.type.dtype == "i16":
            args: dict[str, Arg] = {"self": whole, "min": low, "max": high}
            return [*self.made, replace(node, op="aten.clamp", args=args, outputs=_wide(node))]
        clipped = self._call("aten.clamp", "clipped", wide, self=whole, min=low, max=high)
        return [*self.made, replace(node, op="aten._to_copy", args={"self": clipped, "dtype": Symbol("torch.int32")})]

    def _whole(self, answer: Ref, prefix: str) -> Ref:
        type_ = TensorType("f32", self.node.type.shape)
        above = self._call("aten.add.Tensor", f"{prefix}half", type_, self=answer, other=0.5)
        return self._call("aten.floor", f"{prefix}whole", type_, self=above)

    def _ends(self) -> tuple[int, int]:
        low, high = self.node.args.get("low", -128), self.node.args.get("high", 127)
        assert isinstance(low, int)
        assert isinstance(high, int)
        return low, high

    def _call(self, op: str, part: str, type_: TensorType, /, **args: Arg) -> Ref:
        self.made.append(Node(op, args, (Value(f"{self.node.name}.{part}", type_),), self.node.source))
        return Ref(self.made[-1].name)
