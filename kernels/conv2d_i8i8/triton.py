"""Integer convolution in Triton: an implicit product of patches and weights, channels last, on tensor cores.

A row of the product is a place of the result, a column an output channel; its terms run over the taps of the window
and, fastest, over input channels. Patches are never stored: each step reads its part from the input.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, cdiv, product, product_tile
from intarsia.kernels.linear_i8i8.triton import ends, requantized

LAST = (0, 2, 3, 1)
"""Channels last: of the input, of the weight, of the result."""


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each tile of places and output channels of each group."""
    input, weight = graph.type(node.ref("input")), graph.type(node.ref("weight"))
    rows, depth, *window = (_fixed(extent) for extent in weight.shape)
    groups = _fixed(node.args["groups"])
    batch, _, *extents = node.type.shape
    places = product((batch, *extents))
    block_m, widest = product_tile(places, 128)
    block_n = min(widest, max(16, triton.next_power_of_2(rows // groups)))
    ragged = 32 if depth * window[0] * window[1] <= 32 else 64
    block_k = next((block for block in (128, 64, 32) if depth % block == 0), ragged)
    amd, bias = architecture.startswith("gfx"), isinstance(node.args["bias"], Ref)
    sides = {key: [_fixed(one) for one in _pair(node.args[key])] for key in ("stride", "padding", "dilation")}
    sizes = tuple(str(extent) for extent in (*input.shape[2:], *extents, places))
    return Launch(
        kernel="intarsia.kernels.conv2d_i8i8.triton:_conv2d_i8i8",
        arguments=("input", "weight", *(("bias",) if bias else ()), "multiplier", "shift", "output", *sizes),
        types=(
            *("*i8", "*i8", *(("*i32",) if bias else ()), "*i32", "*i32", POINTERS[node.type.dtype]),
            *(("i32",) * len(sizes)),
        ),
        constants={
            **({} if bias else {"b_ptr": None}),
            "rows": rows // groups,
            "depth": depth,
            "groups": groups,
            **{f"{name}_{key}": sides[key][axis] for key in sides for axis, name in enumerate(("down", "across"))},
            "taps": window[0] * window[1],
            "tap_columns": window[1],
            **ends(node),
            "block_m": block_m,
            "block_n": block_n,
            "block_k": min(block_k, 64) if amd else block_k,
        },
        grid=(cdiv(rows // groups, block_n), cdiv(places, block_m), str(groups)),
        warps=8 if block_m == 128 else 4,
        stages=2 if amd else 3,
        results={"output": node.type},
        layouts={"input": LAST, "weight": LAST, "output": LAST},
    )


def _fixed(extent: Arg) -> int:
    assert isinstance(extent, int)
    return extent


def _pair(numbers: Arg) -> tuple[Arg, ...]:
    assert isinstance(numbers, tuple)
    return numbers


@triton.jit
def _conv2d_i8i8(
    x_ptr,
    w_ptr,
    b_ptr,
    multiplier_ptr,
    shift_ptr,
    y_ptr,
    height,
    width,
    out_height,
    out_width,
    m_size,
    rows: tl.constexpr,
    depth: tl.constexpr,
    groups: tl.constexpr,
    down_stride: tl.constexpr,
    across_stride: tl.constexpr,
    down_padding: tl.constexpr,
    across_padding: tl.constexpr,
    down_dilation: tl.constexpr,
    across_dilation: tl.constexpr,
    taps: tl.constexpr,
    tap_columns: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One tile of y (N, OH, OW, O) = x (N, H, W, C) with w (O, kh, kw, C/groups), plus b (O), requantized."""
    group = tl.program_id(2)
    local = tl.program_id(0) * block_n + tl.arange(0, block_n)
    n = group * rows + local
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    top = (m // out_width) % out_height * down_stride - down_padding
    left = m % out_width * across_stride - across_padding
    picture = m // (out_width * out_height) * height
    x_group = x_ptr + group * depth
    w_rows = w_ptr + n.to(tl.int64)[None, :] * (taps * depth)
    total = tl.zeros((block_m, block_n), dtype=tl.int32)
    for start in range(0, taps * depth, block_k):
        k = start + tl.arange(0, block_k)
        if depth % block_k == 0:
            tap = start // depth  # the same for the whole step
            y = top + tap // tap_columns * down_dilation
            x = left + tap % tap_columns * across_dilation
            inside = ((m < m_size) & (y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
            place = ((picture + y) * width + x).to(tl.int64)[:, None]
            channel = (start % depth + tl.arange(0, block_k))[None, :]
        else:
            tap = (k // depth)[None, :]
            y = top[:, None] + tap // tap_columns * down_dilation
            x = left[:, None] + tap % tap_columns * across_dilation
            inside = (m < m_size)[:, None] & (k < taps * depth)[None, :]
            inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = ((picture[:, None] + y) * width + x).to(tl.int64)
            channel = (k % depth)[None, :]
        values = tl.load(x_group + place * (groups * depth) + channel, mask=inside, other=0)
        weights = tl.load(w_rows + k[:, None], mask=(local < rows)[None, :] & (k < taps * depth)[:, None], other=0)
        total = tl.dot(values, weights, total, out_dtype=tl.int32)
    clipped = requantized(total, b_ptr, multiplier_ptr, shift_ptr, n, local < rows, low, high)
    target = y_ptr + m.to(tl.int64)[:, None] * (groups * rows) + n[None, :]
    tl.store(target, clipped.to(y_ptr.dtype.element_ty), mask=(m < m_size)[:, None] & (local < rows)[None, :])
