"""Modulated layer norm in Triton: a token's channels stay in registers, one pass over memory, computed in f32."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.launch import POINTERS, Launch, product, strides


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each token, with a warp for each 512 channels."""
    input = graph.type(node.ref("input"))
    channels, eps = input.shape[2], node.args["eps"]
    assert isinstance(channels, int)
    assert isinstance(eps, int | float)
    affine = [arg for arg in ("weight", "bias") if isinstance(node.args[arg], Ref)]
    operands = ("input", *affine, "scale", "shift")
    scale_steps, scale_aligned = strides(graph, node, "scale", (0, 1))
    shift_steps, shift_aligned = strides(graph, node, "shift", (0, 1))
    block = triton.next_power_of_2(channels)
    return Launch(
        kernel="intarsia.kernels.modulated_norm.triton:_modulated_norm",
        arguments=(*operands, "output", *scale_steps, *shift_steps, str(input.shape[1])),
        types=(
            *(POINTERS[graph.type(node.ref(arg)).dtype] for arg in operands),
            POINTERS[node.type.dtype],
            *("i64",) * 4,
            "i32",
        ),
        constants={
            **{f"{arg}_ptr": None for arg in ("weight", "bias") if arg not in affine},
            "channels": channels,
            "eps": float(eps),
            "block": block,
        },
        grid=(product(input.shape[:2]), "1", "1"),
        warps=min(16, max(1, block // 512)),
        stages=1,
        results={"output": node.type},
        aligned=tuple(dict.fromkeys(scale_aligned + shift_aligned)),
    )


@triton.jit
def _modulated_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    scale_batch,
    scale_token,
    shift_batch,
    shift_token,
    tokens,
    channels: tl.constexpr,
    eps: tl.constexpr,
    block: tl.constexpr,
):
    """One row of y (B, N, C) = norm of x (B, N, C), affine (C), times 1 + scale plus shift, at their strides."""
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    c = tl.arange(0, block)
    offset = row.to(tl.int64) * channels + c
    x = tl.load(x_ptr + offset, mask=c < channels, other=0.0).to(tl.float32)
    centred = tl.where(c < channels, x - tl.sum(x) / channels, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred) / channels + eps)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    scale_row = scale_ptr + batch * scale_batch + token * scale_token
    shift_row = shift_ptr + batch * shift_batch + token * shift_token
    scale = tl.load(scale_row + c, mask=c < channels, other=0.0).to(tl.float32)
    shift = tl.load(shift_row + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, (y * (1 + scale) + shift).to(y_ptr.dtype.element_ty), mask=c < channels)
