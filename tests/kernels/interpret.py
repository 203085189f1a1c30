"""Run our Triton kernels in Triton's interpreter and print their errors as JSON; started by test_triton.py.

A process of its own: TRITON_INTERPRET must be set before kernels are imported, and stays set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from intarsia.kernels.linear_i4 import reference as reference_i4
from intarsia.kernels.linear_i4 import triton as triton_i4
from intarsia.kernels.linear_i8 import reference as reference_i8
from intarsia.kernels.linear_i8 import triton as triton_i8

SHAPES = ((1, 40, 64), (5, 130, 96), (17, 24, 128), (70, 70, 64), (0, 8, 64))
"""Tokens, rows and columns; none of the first two divides a block."""


def errors() -> Iterator[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        for tokens, rows, columns in SHAPES:
            for bias in (None, torch.randn(rows, generator=generator).to(dtype)):
                x = torch.randn(tokens, columns, generator=generator).to(dtype)
                weight = torch.randn(rows, columns, generator=generator)
                case = f"{dtype} {tokens} {rows} {columns} {bias is not None}"
                codes, scale = reference_i8.quantize_rows(weight)
                found = triton_i8.linear_i8(x, codes, scale, bias)
                yield f"i8 {case}", _error(found, reference_i8.linear_i8(x, codes, scale, bias))
                for group in (32, 64, 128):
                    if columns % group == 0:
                        packed, scale = reference_i4.quantize_groups(weight, group)
                        found = triton_i4.linear_i4(x, packed, scale, bias, group)
                        expected = reference_i4.linear_i4(x, packed, scale, bias, group)
                        yield f"i4 {case} {group}", _error(found, expected)


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude; infinite if types differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


if __name__ == "__main__":
    print(json.dumps(dict(errors())))
