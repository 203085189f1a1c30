"""How a Triton kernel is launched: one description for eager calls, ahead-of-time compilation and engines."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from intarsia import kernels
from intarsia.ir.errors import MissingEnvironment, Unsupported
from intarsia.ir.execute import type_of
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.operators import DTYPES, resolve
from intarsia.ir.sizes import Dim, evaluate
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType

POINTERS: Mapping[str, str] = {
    "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i64": "*i64", "i32": "*i32",
    "i16": "*i16", "i8": "*i8", "u8": "*u8",
}  # fmt: skip
"""Triton's spelling of a pointer by our element type."""

ALIGNMENT = 16
"""Bytes that every pointer is a multiple of, and elements that every argument in ``Launch.aligned`` is."""


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel for operands of these types; where extents are names, expressions of them.

    Attributes:
        kernel: Import path, ``intarsia.kernels.attention.triton:_attention``.
        arguments: Run-time arguments in the kernel's order: an operand or a result by its name, ``stride(query, 0)``
            in elements, or an expression of the graph's sizes, ``2*N``. Compiled code takes two more pointers after
            them, to scratch memory that our kernels do not use: a launcher passes nulls.
        types: Triton's spelling of each argument: ``*fp16``, ``i32``, ``i64``.
        constants: The kernel's other parameters, fixed when it is compiled; None stands for an absent operand.
        grid: Programs along each of three axes, expressions of sizes.
        warps: Warps of one program.
        stages: Depth of the software pipeline.
        results: The type of each result by its name.
        layouts: Axes of an operand or a result from the slowest to the fastest in memory; one that is absent lies row
            by row, unless the kernel is told its strides. ``prepare`` copies an operand that lies otherwise.
        aligned: Arguments (strides) that are multiples of 16; ``prepare`` copies an operand that breaks it.
    """

    kernel: str
    arguments: tuple[str, ...]
    types: tuple[str, ...]
    constants: Mapping[str, int | float | bool | str | None]
    grid: tuple[str, str, str]
    warps: int
    stages: int
    results: Mapping[str, TensorType]
    layouts: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    aligned: tuple[str, ...] = ()

    @cached_property
    def strided(self) -> Mapping[str, tuple[tuple[int, bool], ...]]:
        """Operands that need not lie row by row: the axes of the strides that the kernel is told, and if aligned."""
        table: dict[str, list[tuple[int, bool]]] = {}
        for text in dict.fromkeys(self.arguments):
            if match := _STRIDE.fullmatch(text):
                table.setdefault(match[1], []).append((int(match[2]), text in self.aligned))
        return {name: tuple(axes) for name, axes in table.items()}


def launch_of(node: Node, graph: Graph, architecture: str) -> Launch | None:
    """How the call is launched on ``architecture``; None if its operator has no Triton kernel.

    Raises:
        Unsupported: The kernel does not take these operands; the reason is ``why_not``'s.
        MissingEnvironment: Triton is not installed.
    """
    contract = kernels.operators().get(node.op)
    path = None if contract is None else contract.LAUNCHES.get(node.op)
    if contract is None or path is None:
        return None
    if reason := contract.why_not(node, graph, _gpu(architecture)):
        raise Unsupported(f"%{node.name}: {node.op} has no kernel for {architecture}: {reason}")
    found: Launch = imported(path)(node, graph, architecture)
    return found


def run(op: str, arguments: Mapping[str, Any]) -> Tensor:
    """Launch the operator's kernel on tensors by the names of the operator's parameters; gives the only result."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()))
    types = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    others = tuple((name, value) for name, value in arguments.items() if name not in tensors)
    launch = _launch(op, types, others, architecture_of(first.device))
    results = allocate(launch, {}, first.device)
    if all(result.numel() for result in results.values()):
        with torch.cuda.device_of(first):
            start(launch, {**prepare(launch, tensors), **results}, {})
    (result,) = results.values()
    return result


def prepare(launch: Launch, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The operands as the kernel reads them: row by row unless it is told strides; copied where they are not."""
    return {name: _prepared(launch, name, tensor) for name, tensor in operands.items()}


def allocate(launch: Launch, sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """Empty results by name, each in the layout that the kernel writes."""
    made = {}
    for name, type_ in launch.results.items():
        order = launch.layouts.get(name, tuple(range(len(type_.shape))))
        shape = [number(type_.shape[axis], sizes) for axis in order]
        back = [order.index(axis) for axis in range(len(order))]
        made[name] = torch.empty(shape, dtype=DTYPES[type_.dtype], device=device).permute(back)
    return made


def values(launch: Launch, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[Tensor | int]:
    """The run-time arguments in the kernel's order, from prepared operands and results by name."""
    return [_value(argument, tensors, sizes) for argument in launch.arguments]


def start(launch: Launch, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Launch through Triton's own compiler, on the current device and stream."""
    kernel = imported(launch.kernel)
    passed = dict(zip(runtime_parameters(launch), values(launch, tensors, sizes), strict=True))
    grid = tuple(number(extent, sizes) for extent in launch.grid)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    kernel[grid](**passed, **launch.constants, **options)


def runtime_parameters(launch: Launch) -> tuple[str, ...]:
    """The kernel's own names of the run-time arguments, in order."""
    return tuple(name for name in _parameters(launch.kernel) if name not in launch.constants)


def number(extent: Dim, sizes: Mapping[str, int]) -> int:
    """What an expression of sizes comes to."""
    if isinstance(extent, str):
        return int(extent) if extent.isdecimal() else evaluate(extent, sizes)
    return extent


def imported(path: str) -> Any:
    """What an import path of a module that imports Triton stands for.

    Raises:
        MissingEnvironment: Triton is not installed; nothing else runs in its place unasked.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingEnvironment(
            f"{module} needs Triton, which is missing; pip install 'intarsia[triton]', or run on the CPU"
        ) from error


@lru_cache(maxsize=64)
def _parameters(kernel: str) -> tuple[str, ...]:
    return tuple(inspect.signature(imported(kernel).fn).parameters)


@lru_cache(maxsize=16)
def architecture_of(device: torch.device) -> str:
    """What a compiler calls the device: ``sm_90``, ``gfx942``; ``sm_80`` for Triton's interpreter on a CPU."""
    if device.type != "cuda":
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def cdiv(extent: Dim, block: int) -> str:
    """The number of blocks that cover ``extent``, as an expression of sizes; a plain number if it is known."""
    if isinstance(extent, int) or extent.isdecimal():
        return str((int(extent) + block - 1) // block)
    return f"({extent} + {block - 1})//{block}"


def product(extents: Sequence[Dim]) -> str:
    """The product of the extents, as an expression of sizes; a plain number if all of them are."""
    known = prod(extent for extent in extents if isinstance(extent, int))
    named = [f"({extent})" for extent in extents if isinstance(extent, str)]
    return "*".join([str(known), *named])


def product_tile(tokens: str, width: int) -> tuple[int, int]:
    """Tokens and rows of the weight in a product's tile: 128 tokens and ``width`` rows.

    If the number of tokens is known when the code is made, the fewest of 16 and 64 that cover it. With 16 the weight is
    read once and nothing else matters, so 32 rows: 5,120 rows are then 160 programs for the 132 multiprocessors of an
    H100, not 40.
    """
    if not tokens.isdecimal() or int(tokens) > 64:
        return 128, width
    return (64, width) if int(tokens) > 16 else (16, 32)


def strides(graph: Graph, node: Node, operand: str, axes: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments for the strides of ``operand`` along ``axes``, 0 where its extent is 1, and those that are aligned.

    They are multiples of 16 in a row-by-row copy, at least, where the last extent is.
    """
    shape = graph.type(node.ref(operand)).shape
    texts = tuple("0" if shape[axis] == 1 else f"stride({operand}, {axis})" for axis in axes)
    last = shape[-1]
    aligned = isinstance(last, int) and last % ALIGNMENT == 0
    return texts, tuple(dict.fromkeys(texts)) if aligned else ()


Signature = tuple[tuple[str, torch.dtype, torch.Size], ...]
"""Operands of an eager call, by name."""


@lru_cache(maxsize=1024)
def _launch(op: str, operands: Signature, others: tuple[tuple[str, Any], ...], architecture: str) -> Launch:
    """The launch for one call with these operands, as a graph of its own."""
    fake = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in operands}
    given = tuple(Value(name, type_of(tensor)) for name, tensor in fake.items())
    args: dict[str, Arg] = {**{name: Ref(name) for name in fake}, **dict(others)}
    node = Node(op, args, (Value("output", type_of(resolve(op)(**fake, **dict(others)))),))
    launch = launch_of(node, Graph("call", given, (), (node,), ("output",)), architecture)
    if launch is None:
        raise Unsupported(f"{op} has no kernel")
    return launch


def _gpu(architecture: str) -> Target:
    kind = "rocm" if architecture.startswith("gfx") else "cuda"
    return Target(architecture, architecture, kind, architecture, {"f32": 1.0}, 1.0, 1, 0.0)


_STRIDE = re.compile(r"stride\((.+), (\d+)\)")


def _value(argument: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor | int:
    if argument in tensors:
        return tensors[argument]
    if argument.isdecimal():
        return int(argument)
    if match := _STRIDE.fullmatch(argument):
        return tensors[match[1]].stride(int(match[2]))
    return evaluate(argument, sizes)


def _prepared(launch: Launch, name: str, tensor: Tensor) -> Tensor:
    axes, order = launch.strided.get(name), launch.layouts.get(name)
    if order is not None:
        found = tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(len(order))])
    elif axes is None:
        found = tensor.contiguous()
    elif tensor.stride(-1) == 1 and all(tensor.stride(axis) % ALIGNMENT == 0 for axis, aligned in axes if aligned):
        found = tensor
    else:
        found = tensor.clone(memory_format=torch.contiguous_format)
    return found if found.data_ptr() % ALIGNMENT == 0 else found.clone()
