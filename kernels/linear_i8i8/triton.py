"""Integer linear layer in Triton: tensor cores multiply int8 into int32, then exact dyadic scaling in int64."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, cdiv, product, product_tile


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A tile of ``product_tile``; steps are shorter on AMD's GPUs, whose programs share less memory."""
    input, (rows, columns) = graph.type(node.ref("input")), graph.type(node.ref("weight")).shape
    tokens = product(input.shape[:-1])
    block_m, block_n = product_tile(tokens, 128)
    bias = isinstance(node.args["bias"], Ref)
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return Launch(
        kernel="intarsia.kernels.linear_i8i8.triton:_linear_i8i8",
        arguments=("input", "weight", *(("bias",) if bias else ()), "multiplier", "shift", "output", tokens),
        types=("*i8", "*i8", *(("*i32",) if bias else ()), "*i32", "*i32", POINTERS[node.type.dtype], "i32"),
        constants={
            **({} if bias else {"b_ptr": None}),
            "n_size": rows,
            "k_size": columns,
            **ends(node),
            "block_m": block_m,
            "block_n": block_n,
            "block_k": 64 if architecture.startswith("gfx") else 128 if block_m > 16 else 256,
        },
        grid=(cdiv(rows, block_n), cdiv(tokens, block_m), "1"),
        warps=8 if block_m > 16 else 4,
        stages=2 if architecture.startswith("gfx") else 3,
        results={"output": node.type},
    )


def ends(node: Node) -> dict[str, int]:
    """The ends to which the call clips its result."""
    low, high = node.args.get("low", -128), node.args.get("high", 127)
    assert isinstance(low, int)
    assert isinstance(high, int)
    return {"low": low, "high": high}


@triton.jit
def _linear_i8i8(
    x_ptr,
    w_ptr,
    b_ptr,
    multiplier_ptr,
    shift_ptr,
    y_ptr,
    m_size,
    n_size: tl.constexpr,
    k_size: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One tile of y (M, N) = x (M, K) times w (N, K) transposed, plus b (N), times multiplier / 2**shift (N)."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * k_size
    w_rows = w_ptr + n.to(tl.int64)[None, :] * k_size
    total = tl.zeros((block_m, block_n), dtype=tl.int32)
    for start in range(0, k_size, block_k):
        k = start + tl.arange(0, block_k)
        x = tl.load(x_rows + k[None, :], mask=(m < m_size)[:, None] & (k < k_size)[None, :], other=0)
        w = tl.load(w_rows + k[:, None], mask=(n < n_size)[None, :] & (k < k_size)[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
    clipped = requantized(total, b_ptr, multiplier_ptr, shift_ptr, n, n < n_size, low, high)
    y = y_ptr + m.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(y, clipped.to(y_ptr.dtype.element_ty), mask=(m < m_size)[:, None] & (n < n_size)[None, :])


@triton.jit
def requantized(total, b_ptr, multiplier_ptr, shift_ptr, n, inside, low: tl.constexpr, high: tl.constexpr):
    """Sums i32 (M, N), plus b, times multiplier / 2**shift at the channels ``n``, rounded half up and clipped: i64."""
    if b_ptr is not None:
        total += tl.load(b_ptr + n, mask=inside, other=0)[None, :]
    multiplier = tl.load(multiplier_ptr + n, mask=inside, other=0)[None, :]
    shift = tl.load(shift_ptr + n, mask=inside, other=1)[None, :]
    return tl.minimum(tl.maximum(rounded(total, multiplier, shift), low), high)


@triton.jit
def rounded(x, multiplier, shift):
    """Integers ``x`` times multiplier / 2**shift, rounded half up: i64, not clipped."""
    wide = shift.to(tl.int64)
    half = tl.full(wide.shape, 1, tl.int64) << (wide - 1)
    return (x.to(tl.int64) * multiplier.to(tl.int64) + half) >> wide
