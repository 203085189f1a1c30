"""Softmax and norms of integers in plain PyTorch: what backends decompose to, equal to ``integers.golden_islands``."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.kernels.integers.golden_islands import NORMED, ONE
from intarsia.kernels.integers.reference import integer_dtype


def exponentials(scale: float, bits: int) -> Tensor:
    """e**(-``scale`` * d) with 30 digits for d from 0 to 255, for 16 bits after those for 256 * d: (256) or (512)."""
    fine = torch.arange(256)
    steps = fine if bits == 8 else torch.cat([256 * fine, fine])
    powers: Tensor = torch.exp(-scale * steps.double()) * 2**ONE
    return powers.round().to(torch.int32)


def integer_softmax(
    input: Tensor, table: Tensor, multiplier: int, shift: int, low: int = -128, high: int = 127
) -> Tensor:
    """Softmax of ``input`` i8 or i16 over the last axis, times ``multiplier`` / 2**``shift``, rounded half up."""
    wide, known = input.to(torch.int64), table.to(torch.int64)
    below = wide.amax(dim=-1, keepdim=True) - wide
    if input.dtype == torch.int8:
        powers = known[below]
    else:
        powers = (known[below >> 8] * known[256 + (below & 255)] + 2 ** (ONE - 1)) >> ONE
    total = powers.sum(dim=-1, keepdim=True)
    length = bit_length(total)
    number = (reciprocal(torch.bitwise_right_shift(total, length - 31)) * multiplier) >> 31
    digits = (length + (shift - 1)).clamp(max=62)
    return _shifted(powers * number, digits).clamp(low, high).to(integer_dtype(low, high))


def norm_numbers(
    weight: Tensor | None, bias: Tensor | None, scale: float, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight i32 (C) and bias i64 (C) in steps of ``scale``, and the digits behind the bias's point, i32 (1)."""
    factor = torch.ones(channels, dtype=torch.float64) if weight is None else weight.double()
    summand = torch.zeros_like(factor) if bias is None else bias.double()
    factor, summand = factor / scale, summand / scale
    exponents = [torch.frexp(numbers.abs().amax(dim=0, keepdim=True)).exponent for numbers in (factor, summand)]
    digits = torch.minimum(30 + NORMED - exponents[0], 60 - exponents[1]).clamp(1, 48)
    finer = torch.bitwise_left_shift(torch.ones_like(digits, dtype=torch.int64), digits).double()
    codes = (factor * finer / 2.0**NORMED).round().to(torch.int32)
    return codes, (summand * finer).round().to(torch.int64), digits.to(torch.int32)


def integer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    epsilon: int,
    centered: bool,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """``input`` i8 or i16 (..., C), normalized over the last axis, times ``weight``, plus ``bias``."""
    wide, count = input.to(torch.int64), input.shape[-1]
    total = wide.sum(dim=-1, keepdim=True)
    if not centered:
        total = torch.zeros_like(total)
    spread = count * (wide * wide).sum(dim=-1, keepdim=True) - total * total + epsilon
    half = (bit_length(spread) + 1) >> 1
    root = inverse_root(torch.bitwise_left_shift(spread, 62 - 2 * half) >> 31)
    normed = _shifted((count * wide - total) * root, half + (ONE - NORMED))
    result = _shifted(normed * weight.to(torch.int64) + bias, shift.to(torch.int64))
    return result.clamp(low, high).to(integer_dtype(low, high))


def bit_length(number: Tensor) -> Tensor:
    """How many binary digits positive numbers below 2**62 have."""
    powers = torch.bitwise_left_shift(torch.ones_like(number).unsqueeze(-1), torch.arange(62, device=number.device))
    return (number.unsqueeze(-1) >= powers).sum(dim=-1)


def reciprocal(number: Tensor) -> Tensor:
    """1 / x with 30 digits, for x from 1/2 to 1 with 31."""
    found = 3031741621 - ((2021161080 * number) >> 31)
    for _ in range(3):
        found = (found * ((2**62 - number * found) >> 31)) >> ONE
    return found


def inverse_root(number: Tensor) -> Tensor:
    """1 / sqrt(x) with 30 digits, for x from 1/4 to 1 with 31."""
    found = 2290047081 - ((1308598332 * number) >> 31)
    for _ in range(4):
        found = (found * ((3 * 2**61 - number * ((found * found) >> ONE)) >> 31)) >> 31
    return found


def _shifted(number: Tensor, digits: Tensor) -> Tensor:
    """``number`` / 2**``digits``, rounded half up."""
    half = torch.bitwise_left_shift(torch.ones_like(digits), digits - 1)
    return torch.bitwise_right_shift(number + half, digits)
