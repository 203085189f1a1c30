"""Four-bit weights in Triton: unpacked and scaled in registers, multiplied in the input's element type."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def linear_i4(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """``input`` (..., C) times the weight in ``packed`` u8 (R, C/2) and ``scale`` f32 (R, C/group): (..., R).

    The weight in registers has the reference's bits; products accumulate in f32.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    x = input.reshape(-1, columns).contiguous()
    y = torch.empty((len(x), rows), dtype=input.dtype, device=input.device)
    if y.numel():
        block_m = 16 if len(x) <= 16 else 64 if len(x) <= 64 else 128
        block_k = min(group, 32 if input.dtype == torch.float32 else 64)
        grid = (triton.cdiv(rows, 64), triton.cdiv(len(x), block_m))
        with torch.cuda.device_of(input):
            _linear_i4[grid](
                x,
                packed.contiguous(),
                scale.contiguous(),
                bias,
                y,
                len(x),
                rows,
                columns,
                group,
                block_m,
                64,
                block_k,
                num_warps=4,
            )
    return y.view(*input.shape[:-1], rows)


@triton.jit
def _linear_i4(  # noqa: PLR0917
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
