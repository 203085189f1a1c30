"""Functions of one integer in plain PyTorch: what backends decompose to, equal to ``integers.golden_islands``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from intarsia.kernels.integers.golden_islands import FRACTION, LARGEST, SEGMENT
from intarsia.kernels.integers.reference import integer_dtype


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": torch.tanh,
}
"""What a table can hold, of f64."""


def function_table(function: str, input_scale: float, scale: float, bits: int) -> Tensor:
    """The results of all codes of 8 bits, or the knots of 16, in steps of ``scale``: i32 (256) or (2049)."""
    codes = torch.arange(-128, 128) if bits == 8 else torch.arange(-(2**15), 2**15 + 1, 2**SEGMENT)
    finer = 1 if bits == 8 else 2**FRACTION
    found = FUNCTIONS[function](codes.double() * input_scale) / scale * finer
    return found.round().clamp(-LARGEST, LARGEST).to(torch.int32)


def apply_table(input: Tensor, table: Tensor, low: int = -128, high: int = 127) -> Tensor:
    """What the table says of each code of ``input``: its entry for i8, the line between two knots for i16."""
    wide, known = input.to(torch.int64), table.to(torch.int64)
    if input.dtype == torch.int8:
        return known[wide + 128].clamp(low, high).to(integer_dtype(low, high))
    place, part = (wide + 2**15) >> SEGMENT, wide & (2**SEGMENT - 1)
    total = known[place] * (2**SEGMENT - part) + known[place + 1] * part
    rounded = (total + 2 ** (SEGMENT + FRACTION - 1)) >> (SEGMENT + FRACTION)
    return torch.clamp(rounded, low, high).to(integer_dtype(low, high))
