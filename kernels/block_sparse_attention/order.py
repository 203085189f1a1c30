"""An order of tokens as a short text: nested loops of equal strides, one piece after the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.errors import SpecError

_PIECE = re.compile(r"\d+:\d+\*\d+(\+\d+\*\d+)*")


@dataclass(frozen=True)
class Piece:
    """The numbers ``start + i * stride + ...`` of nested loops, each ``(count, stride)``, the outer ones first."""

    start: int
    loops: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.start}:" + "+".join(f"{count}*{stride}" for count, stride in self.loops)

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return prod(count for count, _ in self.loops)


@dataclass(frozen=True)
class TokenOrder:
    """Which token stands at each position: the numbers of all pieces, one piece after the other.

    ``0:3600*1+21*3600`` takes, of 21 frames of 3600 tokens, all frames of the first place, then of the second, ...
    """

    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` wrote; SpecError if it is not of that form."""
        parts = text.split(",")
        if not all(_PIECE.fullmatch(part) for part in parts):
            raise SpecError(f"expected an order of tokens such as '0:8*1+4*8,32:6*1', found {text[:60]!r}")
        return cls(tuple(map(_piece, parts)))

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """The order that gives these numbers, as runs of consecutive ones."""
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][0] + runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([number, 1])
        return cls(tuple(Piece(start, ((count, 1),)) for start, count in runs))

    @property
    def count(self) -> int:
        """How many positions there are."""
        return sum(piece.count for piece in self.pieces)

    def indices(self) -> NDArray[np.int64]:
        """The token at each position (S)."""
        return self._indices

    def inverse(self) -> NDArray[np.int64]:
        """The position of each token (S); ValueError if the order leaves one out or names one twice."""
        if not np.array_equal(np.sort(self._indices), np.arange(self.count)):
            raise ValueError(f"order {str(self)[:60]!r}: it does not name each of {self.count} tokens once")
        return np.argsort(self._indices, kind="stable")

    def __str__(self) -> str:
        return ",".join(map(str, self.pieces))

    @cached_property
    def _indices(self) -> NDArray[np.int64]:
        return np.concatenate([_numbers(piece) for piece in self.pieces])


def _piece(text: str) -> Piece:
    start, loops = text.split(":")
    pairs = (loop.split("*") for loop in loops.split("+"))
    return Piece(int(start), tuple((int(count), int(stride)) for count, stride in pairs))


def _numbers(piece: Piece) -> NDArray[np.int64]:
    found = np.array([piece.start], dtype=np.int64)
    for count, stride in piece.loops:
        found = (found[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return found
