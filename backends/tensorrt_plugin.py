"""Our Triton kernels as ahead-of-time plugins of TensorRT: PTX, a launch, and whole numbers between inputs and outputs.

Written against the documented interface of ``tensorrt.plugin`` (TensorRT 10.9 and later; ``tensorrt_rtx`` has none) and
not yet run on a GPU. What TensorRT asks of a kernel, and how ours comes to it:

* Parameters are inputs, then whole numbers of at most 32 bits, then outputs. Ours are in another order and have two
  more pointers, to scratch memory that they do not use; in PTX a parameter is known by its name, so that declarations
  are put in order and the two left out, and the code stays as it is. Strides are compiled as 32 bits.
* Tensors lie row by row: strides are products of extents. A result that our kernel lays out in another order of axes
  (attention's, tokens before heads) is an output of that shape.
* An ONNX node ``intarsia_NAME`` with attribute ``plugin_namespace="intarsia"`` stands for the plugin.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.sizes import Dim, names
from intarsia.ir.types import TensorType
from intarsia.kernels.ahead import compile_launch
from intarsia.kernels.launch import Launch, launch_of

NAMESPACE = "intarsia"


@dataclass(frozen=True)
class Plugin:
    """One kernel for operands of these types, as TensorRT is told of it.

    Attributes:
        name: Inside the namespace ``intarsia``.
        inputs: The types of the inputs, by name, in the kernel's order.
        outputs: The same of the outputs, axes in their order in memory.
        function: The entry in ``ptx``.
        ptx: The code; its parameters are inputs, extras, outputs.
        extras: Expressions of the graph's sizes.
        grid: Blocks along three axes, expressions of the graph's sizes.
        threads: Threads of a block.
        shared_bytes: Shared memory of a block.
        sizes: Where each named size is found: input and axis.
    """

    name: str
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    function: str
    ptx: str
    extras: tuple[str, ...]
    grid: tuple[str, str, str]
    threads: int
    shared_bytes: int
    sizes: Mapping[str, tuple[int, int]]

    @property
    def id(self) -> str:
        """What ``tensorrt.plugin`` calls it: ``intarsia::modulated_norm``."""
        return f"{NAMESPACE}::{self.name}"


def plugin_of(node: Node, graph: Graph, architecture: str) -> Plugin:
    """The call's kernel as a plugin for ``architecture``.

    Raises:
        Unsupported: The operator has no kernel, or a size of it is the extent of no input.
        MissingEnvironment: Triton is not installed.
    """
    launch = launch_of(node, graph, architecture)
    if launch is None:
        raise Unsupported(f"%{node.name}: {node.op} has no Triton kernel that could be a plugin")
    launch = replace(launch, types=tuple("i32" if type_ == "i64" else type_ for type_ in launch.types))
    compiled = compile_launch(launch, architecture)
    inputs = {name: graph.type(node.ref(name)) for name in launch.arguments if isinstance(node.args.get(name), Ref)}
    outputs = {name: _as_laid_out(launch, name) for name in launch.arguments if name in launch.results}
    extras = [text for text in launch.arguments if text not in inputs and text not in outputs]
    order = [launch.arguments.index(text) for text in (*inputs, *outputs)]
    middle = [index for index, text in enumerate(launch.arguments) if text in extras]
    grid = launch.grid
    expressions = tuple(_expression(launch.arguments[index], inputs) for index in middle)
    return Plugin(
        name=node.op.removeprefix("intarsia."),
        inputs=inputs,
        outputs=outputs,
        function=compiled.name,
        ptx=reorder(compiled.assembly, [*order[: len(inputs)], *middle, *order[len(inputs) :]]),
        extras=expressions,
        grid=grid,
        threads=compiled.warps * compiled.threads_per_warp,
        shared_bytes=compiled.shared_bytes,
        sizes=_found({size for text in (*expressions, *grid) for size in names(_number(text))}, inputs, node),
    )


def reorder(ptx: str, order: Sequence[int]) -> str:
    """The code with its parameters declared in this order, by index, those left out gone.

    Raises:
        Unsupported: The code reads a parameter that is left out.
    """
    entry = re.search(r"(\.entry\s+\w+\s*\()(.*?)(\n\s*\))", ptx, flags=re.DOTALL)
    if entry is None:
        raise Unsupported("the PTX has no entry with parameters")
    declared = [line.strip().rstrip(",") for line in entry[2].strip().splitlines()]
    body = ptx[entry.end() :]
    for index in set(range(len(declared))) - set(order):
        name = re.split(r"[\s\[]+", declared[index])[-1]
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise Unsupported(f"the code reads its parameter {index}, which TensorRT does not pass")
    kept = ",\n".join(f"\t{declared[index]}" for index in order)
    return f"{ptx[: entry.start()]}{entry[1]}\n{kept}{entry[3]}{body}"


def register(trt: Any, trtp: Any, plugin: Plugin) -> None:
    """Make the plugin known to ``tensorrt`` (``trt``) by ``tensorrt.plugin`` (``trtp``)."""
    parameter, either = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    tensors = [parameter(name, either, annotation=trtp.TensorDesc) for name in plugin.inputs]
    outputs = trtp.TensorDesc if len(plugin.outputs) == 1 else tuple[(trtp.TensorDesc,) * len(plugin.outputs)]  # type: ignore[misc]
    made = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]

    def describe(*inputs: Any) -> Any:
        found = tuple(
            trtp.from_shape_expr(
                tuple(_dim(trtp, extent, plugin, inputs) for extent in type_.shape), _dtype(trt, type_)
            )
            for type_ in plugin.outputs.values()
        )
        return found if len(found) > 1 else found[0]

    def implement(*arguments: Any) -> Any:
        inputs = arguments[: len(plugin.inputs)]
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (_dim(trtp, text, plugin, inputs) for text in plugin.grid)
        launch.block_x, launch.shared_mem = plugin.threads, plugin.shared_bytes
        numbers = [trtp.SymInt32(_dim(trtp, text, plugin, inputs)) for text in plugin.extras]
        return plugin.function, plugin.ptx, launch, trtp.SymIntExprs.from_tuple(numbers)

    describe.__signature__ = inspect.Signature(tensors, return_annotation=outputs)  # type: ignore[attr-defined]
    last = [parameter(name, either) for name in ("outputs", "tactic")]
    implement.__signature__ = inspect.Signature([*tensors, *last], return_annotation=made)  # type: ignore[attr-defined]
    trtp.register(plugin.id)(describe)
    trtp.aot_impl(plugin.id)(implement)


def _as_laid_out(launch: Launch, name: str) -> TensorType:
    type_ = launch.results[name]
    order = launch.layouts.get(name, tuple(range(len(type_.shape))))
    return TensorType(type_.dtype, tuple(type_.shape[axis] for axis in order))


_STRIDE = re.compile(r"stride\((.+), (\d+)\)")


def _expression(argument: str, inputs: Mapping[str, TensorType]) -> str:
    """The argument as an expression of sizes; a stride, row by row, is the product of the extents after it."""
    match = _STRIDE.fullmatch(argument)
    if match is None:
        return argument
    later = inputs[match[1]].shape[int(match[2]) + 1 :]
    return "*".join(f"({extent})" for extent in later) or "1"


def _found(sizes: set[str], inputs: Mapping[str, TensorType], node: Node) -> dict[str, tuple[int, int]]:
    """Which axis of which input has each size as its extent."""
    places: dict[str, tuple[int, int]] = {}
    for index, type_ in enumerate(inputs.values()):
        for axis, extent in enumerate(type_.shape):
            if isinstance(extent, str) and extent in sizes:
                places.setdefault(extent, (index, axis))
    if missing := sorted(sizes - places.keys()):
        raise Unsupported(f"%{node.name}: size {missing[0]} is the extent of no input, where a plugin could read it")
    return places


def _number(text: str) -> Dim:
    return int(text) if text.isdigit() else text


def _dim(trtp: Any, dim: Dim, plugin: Plugin, inputs: Sequence[Any]) -> Any:
    """An expression of sizes in TensorRT's own shape expressions, or the number that it is."""
    return dim if isinstance(dim, int) else _symbolic(trtp, ast.parse(dim, mode="eval").body, plugin, inputs)


def _symbolic(trtp: Any, node: ast.expr, plugin: Plugin, inputs: Sequence[Any]) -> Any:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            index, axis = plugin.sizes[name]
            return inputs[index].shape_expr[axis]
        case ast.BinOp(left=left, op=op, right=right):
            first, second = (_symbolic(trtp, side, plugin, inputs) for side in (left, right))
            if isinstance(first, int) and not isinstance(second, int):
                first = trtp.ShapeExpr(first)
            match op:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
                case ast.FloorDiv():
                    return first // second
    raise Unsupported(f"{plugin.id}: TensorRT has no shape expression for {ast.unparse(node)}; only + - * //")


def _dtype(trt: Any, type_: TensorType) -> Any:
    named = {"f32": "FLOAT", "f16": "HALF", "bf16": "BF16", "i64": "INT64", "i32": "INT32", "i8": "INT8", "u8": "UINT8"}
    return getattr(trt.DataType, named[type_.dtype])
