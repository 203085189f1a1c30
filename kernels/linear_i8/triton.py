"""Eight-bit weights in Triton: widened in registers, multiplied in the input's element type, scaled once at the end."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def linear_i8(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``input`` (..., C) times ``weight`` int8 (R, C) times ``scale`` f32 (R), plus ``bias`` (R): (..., R).

    Products accumulate in f32, and the weight is never rounded to the input's type: closer to exact than the reference.
    """
    rows, columns = weight.shape
    x = input.reshape(-1, columns).contiguous()
    y = torch.empty((len(x), rows), dtype=input.dtype, device=input.device)
    if y.numel():
        block_m = 16 if len(x) <= 16 else 64 if len(x) <= 64 else 128
        block_k = 32 if input.dtype == torch.float32 else 64
        grid = (triton.cdiv(rows, 128), triton.cdiv(len(x), block_m))
        with torch.cuda.device_of(input):
            _linear_i8[grid](
                x, weight.contiguous(), scale, bias, y, len(x), rows, columns, block_m, 128, block_k, num_warps=8
            )
    return y.view(*input.shape[:-1], rows)


@triton.jit
def _linear_i8(  # noqa: PLR0917
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
