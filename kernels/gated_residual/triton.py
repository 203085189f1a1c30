"""Gated residual sum in Triton: one pass over memory, computed in f32."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ir.graph import Graph, Node
from intarsia.kernels.launch import POINTERS, Launch, cdiv, product, strides

BLOCK = 2048
"""Channels of one program: 16 for each of 128 threads, two 16-byte loads of 16-bit numbers."""


def launch(node: Node, graph: Graph, architecture: str) -> Launch:
    """A program for each token and each block of channels."""
    residual, input, gate = (graph.type(node.ref(arg)) for arg in ("residual", "input", "gate"))
    channels = residual.shape[2]
    assert isinstance(channels, int)
    block = min(BLOCK, triton.next_power_of_2(channels))
    steps, aligned = strides(graph, node, "gate", (0, 1))
    return Launch(
        kernel="intarsia.kernels.gated_residual.triton:_gated_residual",
        arguments=("residual", "input", "gate", "output", *steps, str(residual.shape[1])),
        types=(*(POINTERS[one.dtype] for one in (residual, input, gate, node.type)), "i64", "i64", "i32"),
        constants={"channels": channels, "block": block},
        grid=(product(residual.shape[:2]), cdiv(channels, block), "1"),
        warps=4,
        stages=1,
        results={"output": node.type},
        aligned=aligned,
    )


@triton.jit
def _gated_residual(
    residual_ptr,
    x_ptr,
    gate_ptr,
    y_ptr,
    gate_batch,
    gate_token,
    tokens,
    channels: tl.constexpr,
    block: tl.constexpr,
):
    """One block of channels of y (B, N, C) = residual (B, N, C) + x (B, N, C) times gate, at its strides."""
    row = tl.program_id(0)
    c = tl.program_id(1) * block + tl.arange(0, block)
    offset = row.to(tl.int64) * channels + c
    gate_row = gate_ptr + (row // tokens).to(tl.int64) * gate_batch + (row % tokens).to(tl.int64) * gate_token
    residual = tl.load(residual_ptr + offset, mask=c < channels, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=c < channels, other=0.0).to(tl.float32)
    gate = tl.load(gate_row + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, (residual + x * gate).to(y_ptr.dtype.element_ty), mask=c < channels)
