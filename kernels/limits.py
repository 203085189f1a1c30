"""Limits that several operators share: about a graph's call as a reason or None, about tensors as a check."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.program import split_constant
from intarsia.ir.target import Target
from intarsia.kernels.integers.reference import integer_dtype

FLOATS = ("f32", "f16", "bf16")
"""Element types of weights and activations that our kernels take."""

CODES = ("i8", "i16", "i32")
"""Element types of integers on a grid."""

GPUS = ("cuda", "rocm")
"""Kinds of target on which our Triton kernels run."""

WIDEST = 16_384
"""Channels of a row that a block of threads holds in registers: 64 f32 for each of 256 threads."""

TERMS = 2**31 // (128 * 128) - 1
"""Products of two int8 whose sum certainly fits into int32."""


def floating(node: Node, arg: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` is no activation that we take: not f32, f16 or bf16."""
    dtype = graph.type(node.ref(arg)).dtype
    return None if dtype in FLOATS else f"{arg} is {dtype}; {node.op} takes {', '.join(FLOATS)}"


def dtype(node: Node, arg: str, expected: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` has the wrong element type."""
    found = graph.type(node.ref(arg)).dtype
    return None if found == expected else f"{arg} is {found}; {node.op} takes {expected}"


def positive(node: Node, arg: str) -> str | None:
    """Why the number passed as ``arg`` is no scale."""
    found = node.args[arg]
    good = isinstance(found, int | float) and found > 0
    return None if good else f"{arg} is {found}; {node.op} takes a positive number"


def weight(node: Node, arg: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` is no weight that can be rounded at build time."""
    name = node.ref(arg)
    type_ = graph.type(name)
    if len(type_.shape) != 2:
        return f"{arg} is {type_}; {node.op} takes a matrix"
    if not all(isinstance(extent, int) for extent in type_.shape):
        return f"{arg} is {type_}; {node.op} takes fixed extents"
    if type_.dtype not in FLOATS:
        return f"{arg} is {type_.dtype}; {node.op} takes {', '.join(FLOATS)}"
    if not _is_constant(name, graph):
        return f"{arg} depends on the model's inputs; only weights are rounded at build time"
    return None


def _is_constant(name: str, graph: Graph) -> bool:
    if any(name == param.name for param in graph.params):
        return True
    constant, _ = split_constant(graph)
    return any(name == value.name for node in constant for value in node.outputs)


def broadcast(node: Node, arg: str, like: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` is not (B or 1, N or 1, C) for the one passed as ``like``, (B, N, C)."""
    found, wanted = graph.type(node.ref(arg)), graph.type(node.ref(like))
    fits = len(found.shape) == len(wanted.shape) == 3 and found.shape[2] == wanted.shape[2]
    if fits and all(one in (1, other) for one, other in zip(found.shape, wanted.shape, strict=True)):
        return None
    return f"{arg} is {found}, {like} {wanted}; {node.op} takes (B or 1, N or 1, C) and (B, N, C)"


def rows(node: Node, arg: str, graph: Graph, target: Target) -> str | None:
    """Why the rows of the tensor passed as ``arg``, (B, N, C), are none for our GPU kernels; None elsewhere."""
    if target.kind not in GPUS:
        return None
    if reason := floating(node, arg, graph):
        return reason
    channels = graph.type(node.ref(arg)).shape[-1]
    if isinstance(channels, int) and channels <= WIDEST:
        return None
    return f"{arg} has {channels} channels; on a GPU {node.op} takes a fixed number up to {WIDEST:,}"


def integers(node: Node, graph: Graph) -> str | None:
    """Why the call is no product of int8 that int32 holds."""
    for arg in ("input", "weight"):
        if reason := dtype(node, arg, "i8", graph):
            return reason
    terms = graph.type(node.ref("weight")).shape[1:]
    if not all(isinstance(extent, int) for extent in terms):
        return f"weight is {graph.type(node.ref('weight'))}; {node.op} takes fixed extents"
    if prod(map(int, terms)) > TERMS:
        return f"a sum has {prod(map(int, terms)):,} terms; int32 certainly holds {TERMS:,}"
    if isinstance(node.args.get("bias"), Ref) and (reason := dtype(node, "bias", "i32", graph)):
        return reason
    return dyadic(node, graph) or ends(node)


def codes(node: Node, arg: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` holds no codes: not i8, i16 or i32."""
    found = graph.type(node.ref(arg)).dtype
    return None if found in CODES else f"{arg} is {found}; {node.op} takes {', '.join(CODES)}"


def narrow_codes(node: Node, arg: str, graph: Graph) -> str | None:
    """Why the tensor passed as ``arg`` holds no codes of 8 or 16 bits."""
    found = graph.type(node.ref(arg)).dtype
    return None if found in CODES[:2] else f"{arg} is {found}; {node.op} takes {', '.join(CODES[:2])}"


def number(node: Node) -> str | None:
    """Why the integers ``multiplier`` and ``shift`` are no dyadic number."""
    multiplier, shift = node.args["multiplier"], node.args["shift"]
    if isinstance(multiplier, int) and isinstance(shift, int) and 0 <= multiplier < 2**31 and 1 <= shift <= 62:
        return None
    return f"multiplier and shift are {multiplier} and {shift}; {node.op} takes 31 bits and a shift of 1 to 62"


def dyadic(node: Node, graph: Graph, *, prefix: str = "") -> str | None:
    """Why multiplier and shift, their names after ``prefix``, are no dyadic numbers."""
    return dtype(node, f"{prefix}multiplier", "i32", graph) or dtype(node, f"{prefix}shift", "i32", graph)


def ends(node: Node, *, widest: int = 32) -> str | None:
    """Why ``low`` and ``high`` are no ends of a range of integers of at most ``widest`` bits."""
    low, high = node.args.get("low", -128), node.args.get("high", 127)
    largest = 2 ** (widest - 1)
    if isinstance(low, int) and isinstance(high, int) and -largest <= low < high < largest:
        return None
    return f"low and high are {low} and {high}; {node.op} takes rising integers of {widest} bits"


def result_dtype(op: str, low: int, high: int) -> torch.dtype:
    """The element type of codes from ``low`` to ``high``; raise unless they rise and i32 holds them."""
    rising = -(2**31) <= low < high < 2**31
    torch._check(rising, lambda: f"{op}: low and high are rising integers of 32 bits, found {low} and {high}")
    return integer_dtype(low, high)


def check_codes(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless the tensor holds codes: int8, int16 or int32."""
    good = tensor.dtype in (torch.int8, torch.int16, torch.int32)
    torch._check(good, lambda: f"{op}: {name} is int8, int16 or int32, found {tensor.dtype}")


def check_number(op: str, multiplier: int, shift: int) -> None:
    """Raise unless multiplier / 2**shift is a dyadic number."""
    good = 0 <= multiplier < 2**31 and 1 <= shift <= 62
    torch._check(good, lambda: f"{op}: multiplier has 31 bits and shift is 1 to 62, found {multiplier} and {shift}")


def check_broadcast(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless the tensor is (B or 1, N or 1, C) for ``like`` (B, N, C)."""
    shape, wanted = tensor.shape, like.shape
    torch._check(len(shape) == 3, lambda: f"{op}: {name} is (B or 1, N or 1, C), found {len(shape)} axes")
    torch._check(shape[2] == wanted[2], lambda: f"{op}: {name} ends in {wanted[2]}, found {shape[2]}")
    for axis in range(2):
        fits = shape[axis] in (1, wanted[axis])
        torch._check(fits, lambda: f"{op}: {name} is {tuple(wanted)} or 1 in its first axes, found {tuple(shape)}")


def check_i8(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless input and weight are int8, and bias int32 with one number for each row of weight."""
    for name, tensor in (("input", input), ("weight", weight)):
        torch._check(tensor.dtype == torch.int8, lambda: f"{op}: {name} is int8, found {tensor.dtype}")  # noqa: B023
    if bias is not None:
        torch._check(bias.dtype == torch.int32, lambda: f"{op}: bias is int32, found {bias.dtype}")
        torch._check(bias.shape == weight.shape[:1], lambda: f"{op}: bias is ({weight.shape[0]},)")


def check_dyadic(op: str, multiplier: Tensor, shift: Tensor, channels: int) -> None:
    """Raise unless multiplier and shift are int32 (C)."""
    for name, tensor in (("multiplier", multiplier), ("shift", shift)):
        torch._check(tensor.dtype == torch.int32, lambda: f"{op}: {name} is int32, found {tensor.dtype}")  # noqa: B023
        torch._check(tensor.shape == (channels,), lambda: f"{op}: {name} is ({channels},)")  # noqa: B023
