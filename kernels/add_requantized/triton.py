"""The sum of two tensors of integers in Triton, each scaled by its own dyadic number: one pass over memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

from math import prod

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node
from intarsia.kernels.launch import ALIGNMENT, POINTERS, Launch, cdiv, product
from intarsia.kernels.linear_i8i8.triton import ends, rounded

BLOCK = 1024
"""Elements of one program: 8 for each of 128 threads, 16 bytes of i16."""


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each block of elements; pictures have their channels last, as convolutions give them."""
    input, other = graph.type(node.ref("input")), graph.type(node.ref("other"))
    elements = product(input.shape)
    known = prod(extent for extent in input.shape if isinstance(extent, int))
    last = (0, 2, 3, 1) if len(input.shape) == 4 else tuple(range(len(input.shape)))
    numbers = ("multiplier", "shift", "other_multiplier", "other_shift")
    return Launch(
        kernel="intarsia.kernels.add_requantized.triton:_add_requantized",
        arguments=("input", "other", *numbers, "output", elements),
        types=(POINTERS[input.dtype], POINTERS[other.dtype], *("*i32",) * 4, POINTERS[node.type.dtype], "i64"),
        constants={**ends(node), "block": BLOCK},
        grid=(cdiv(elements, BLOCK), "1", "1"),
        warps=4,
        stages=1,
        results={"output": node.type},
        layouts={"input": last, "other": last, "output": last},
        aligned=(elements,) if known % ALIGNMENT == 0 else (),
    )


@triton.jit
def _add_requantized(
    x_ptr,
    other_ptr,
    multiplier_ptr,
    shift_ptr,
    other_multiplier_ptr,
    other_shift_ptr,
    y_ptr,
    elements,
    low: tl.constexpr,
    high: tl.constexpr,
    block: tl.constexpr,
):
    """One block of y = x times its dyadic number + other times its own, each rounded half up, then clipped."""
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < elements
    zero = tl.zeros((block,), dtype=tl.int32)
    x, other = tl.load(x_ptr + i, mask=inside, other=0), tl.load(other_ptr + i, mask=inside, other=0)
    left = rounded(x, tl.load(multiplier_ptr) + zero, tl.load(shift_ptr) + zero)
    right = rounded(other, tl.load(other_multiplier_ptr) + zero, tl.load(other_shift_ptr) + zero)
    clipped = tl.minimum(tl.maximum(left + right, low), high)
    tl.store(y_ptr + i, clipped.to(y_ptr.dtype.element_ty), mask=inside)
