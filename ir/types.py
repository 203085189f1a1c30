"""What the compiler knows about a value without looking at its data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from .errors import ParseError
from .sizes import Dim, evaluate

BITS: Mapping[str, int] = {
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "f8e5m2": 8,
    "i64": 64, "i32": 32, "i16": 16, "i8": 8, "u64": 64, "u32": 32, "u16": 16, "u8": 8,
    "b1": 8, "c64": 64, "c128": 128,
}  # fmt: skip
"""Bits that one element takes in memory, by element type; a boolean takes a byte."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and extents of a tensor, e.g. ``bf16[2, N, 64]``."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def elements(self, sizes: Mapping[str, int] | None = None) -> int:
        """Number of elements once every name in the shape is replaced by its size."""
        return prod(evaluate(dim, sizes or {}) for dim in self.shape)

    def bytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes of memory that one such tensor takes."""
        return self.elements(sizes) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A number that the graph computes with, such as a dynamic size: ``int``, ``float`` or ``bool``."""

    kind: str

    def __str__(self) -> str:
        return self.kind


Type = TensorType | ScalarType

_TENSOR = re.compile(r"(\w+)\[([^\]]*)\]")
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def parse_type(text: str) -> Type:
    """Read ``bf16[2, N, 64]`` or ``int`` back; ParseError if it is neither or the element type is unknown."""
    if text in {"int", "float", "bool"}:
        return ScalarType(text)
    match = _TENSOR.fullmatch(text)
    if match is None or match[1] not in BITS:
        raise ParseError(f"expected a type such as bf16[2, N, 64] or int, found {text!r}")
    parts = [part.strip() for part in _split(match[2])] if match[2].strip() else []
    if not all(parts):
        raise ParseError(f"expected an extent between the commas of {text!r}")
    return TensorType(match[1], tuple(int(part) if _INTEGER.fullmatch(part) else part for part in parts))


def _split(text: str) -> list[str]:
    """The text cut at its commas, those inside parentheses excepted."""
    if "(" not in text:
        return text.split(",")
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
