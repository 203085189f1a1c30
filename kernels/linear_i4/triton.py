"""Four-bit weights in Triton: unpacked and scaled in registers, multiplied in the input's element type.

The weight in registers has the reference's bits; products accumulate in f32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, cdiv, product, product_tile


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A tile of ``product_tile``; a step along the columns stays inside one group."""
    input, group = graph.type(node.ref("input")), node.args["group"]
    rows, columns = node.type.shape[-1], input.shape[-1]
    tokens = product(input.shape[:-1])
    block_m, block_n = product_tile(tokens, 64)
    bias = node.args["bias"]
    biases = (POINTERS[graph.type(bias.name).dtype],) if isinstance(bias, Ref) else ()
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    assert isinstance(group, int)
    return Launch(
        kernel="intarsia.kernels.linear_i4.triton:_linear_i4",
        arguments=("input", "packed", "scale", *(("bias",) if biases else ()), "output", tokens),
        types=(POINTERS[input.dtype], "*u8", "*fp32", *biases, POINTERS[input.dtype], "i32"),
        constants={
            **({} if biases else {"b_ptr": None}),
            "n_size": rows,
            "k_size": columns,
            "group": group,
            "block_m": block_m,
            "block_n": block_n,
            "block_k": min(group, 32 if input.dtype == "f32" else 64 if block_m > 16 else 128),
        },
        grid=(cdiv(rows, block_n), cdiv(tokens, block_m), "1"),
        warps=4,
        stages=3,
        results={"output": node.type},
    )


@triton.jit
def _linear_i4(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    m_size,
    n_size: tl.constexpr,
    k_size: tl.constexpr,
    group: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One tile of y (M, N) = x (M, K) times w (N, K) transposed, plus b (N); block_k divides group, group divides K."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * k_size
    w_rows = w_ptr + n.to(tl.int64)[:, None] * (k_size // 2)
    s_rows = s_ptr + n.to(tl.int64) * (k_size // group)
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for start in range(0, k_size, block_k):
        k = start + tl.arange(0, block_k)
        x = tl.load(x_rows + k[None, :], mask=(m < m_size)[:, None], other=0.0)
        half = start // 2 + tl.arange(0, block_k // 2)
        pairs = tl.load(w_rows + half[None, :], mask=(n < n_size)[:, None], other=0).to(tl.int32)
        codes = (tl.interleave(pairs & 0xF, pairs >> 4) ^ 8) - 8
        scale = tl.load(s_rows + start // group, mask=n < n_size, other=0.0)
        w = (codes.to(tl.float32) * scale[:, None]).to(x.dtype)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if b_ptr is not None:
        total += tl.load(b_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(m < m_size)[:, None] & (n < n_size)[None, :])
