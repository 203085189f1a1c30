"""RMS norm and rotary embedding in Triton: a token's heads stay in registers, one pass over memory, computed in f32."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, product, strides


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each token, with a warp for each 512 channels."""
    input = graph.type(node.ref("input"))
    channels, heads, eps = input.shape[2], node.args["heads"], node.args["eps"]
    assert isinstance(channels, int)
    assert isinstance(heads, int)
    assert isinstance(eps, int | float)
    pointer, weight = POINTERS[input.dtype], node.args["weight"]
    steps, aligned = strides(graph, node, "input", (0, 1))
    block = triton.next_power_of_2(channels)
    weights = (POINTERS[graph.type(weight.name).dtype],) if isinstance(weight, Ref) else ()
    return Launch(
        kernel="intarsia.kernels.norm_rope.triton:_norm_rope",
        arguments=("input", *(("weight",) if weights else ()), "cos", "sin", "output", *steps, str(input.shape[1])),
        types=(pointer, *weights, "*fp32", "*fp32", pointer, "i64", "i64", "i32"),
        constants={
            **({} if weights else {"weight_ptr": None}),
            "channels": channels,
            "pairs": channels // heads // 2,
            "eps": float(eps),
            "block": block,
        },
        grid=(product(input.shape[:2]), "1", "1"),
        warps=min(16, max(1, block // 512)),
        stages=1,
        results={"output": node.type},
        aligned=aligned,
    )


@triton.jit
def _norm_rope(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_batch,
    x_token,
    tokens,
    channels: tl.constexpr,
    pairs: tl.constexpr,
    eps: tl.constexpr,
    block: tl.constexpr,
):
    """One row of y (B, N, C): x (B, N, C), at its strides, over its root mean square, times weight (C), then turned.

    Every head turns by the same angles, cos and sin (N, pairs).
    """
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    c = tl.arange(0, block)
    x = tl.load(x_ptr + batch * x_batch + token * x_token + c, mask=c < channels, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x) / channels + eps)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (block // 2, 2)))
    pair = tl.arange(0, block // 2)
    angle = token * pairs + pair % pairs
    cos = tl.load(cos_ptr + angle, mask=2 * pair < channels, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=2 * pair < channels, other=0.0)
    y = tl.interleave(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(y_ptr + row.to(tl.int64) * channels + c, y.to(y_ptr.dtype.element_ty), mask=c < channels)
