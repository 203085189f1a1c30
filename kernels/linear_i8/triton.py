"""Eight-bit weights in Triton: widened in registers, multiplied in the input's element type, scaled once at the end.

Products accumulate in f32, and the weight is never rounded to the input's type: closer to exact than the reference.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, cdiv, product, product_tile


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A tile of ``product_tile``; steps are shorter for f32, whose operands take more registers."""
    input, (rows, columns) = graph.type(node.ref("input")), graph.type(node.ref("weight")).shape
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    tokens = product(input.shape[:-1])
    block_m, block_n = product_tile(tokens, 128)
    bias = node.args["bias"]
    biases = (POINTERS[graph.type(bias.name).dtype],) if isinstance(bias, Ref) else ()
    return Launch(
        kernel="intarsia.kernels.linear_i8.triton:_linear_i8",
        arguments=("input", "weight", "scale", *(("bias",) if biases else ()), "output", tokens),
        types=(POINTERS[input.dtype], "*i8", "*fp32", *biases, POINTERS[input.dtype], "i32"),
        constants={
            **({} if biases else {"b_ptr": None}),
            "n_size": rows,
            "k_size": columns,
            "block_m": block_m,
            "block_n": block_n,
            "block_k": 32 if input.dtype == "f32" else 64 if block_m > 16 else 256,
        },
        grid=(cdiv(rows, block_n), cdiv(tokens, block_m), "1"),
        warps=8 if block_m > 16 else 4,
        stages=3,
        results={"output": node.type},
    )


@triton.jit
def _linear_i8(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    m_size,
    n_size: tl.constexpr,
    k_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One tile of y (M, N) = x (M, K) times w (N, K) transposed, times s (N), plus b (N)."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * k_size
    w_rows = w_ptr + n.to(tl.int64)[None, :] * k_size
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for start in range(0, k_size, block_k):
        k = start + tl.arange(0, block_k)
        x = tl.load(x_rows + k[None, :], mask=(m < m_size)[:, None] & (k < k_size)[None, :], other=0.0)
        w = tl.load(w_rows + k[:, None], mask=(n < n_size)[None, :] & (k < k_size)[:, None], other=0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision="ieee")
    total *= tl.load(s_ptr + n, mask=n < n_size, other=0.0)[None, :]
    if b_ptr is not None:
        total += tl.load(b_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(m < m_size)[:, None] & (n < n_size)[None, :])
