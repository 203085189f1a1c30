"""What a pattern is, and the registry of patterns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir import registry
from intarsia.ir.errors import SpecError, UsageError
from intarsia.ir.spec import Spec, construct, spec_of
from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable

PATTERNS: dict[str, str] = {
    "dense": "intarsia.passes.patterns.dense:Dense",
    "diagonal": "intarsia.passes.patterns.diagonal:Diagonal",
    "multi-diagonal": "intarsia.passes.patterns.multi_diagonal:MultiDiagonal",
    "radial": "intarsia.passes.patterns.radial:Radial",
    "random": "intarsia.passes.patterns.random_blocks:Random",
    "skip": "intarsia.passes.patterns.skip:Skip",
    "sliding-tile": "intarsia.passes.patterns.sliding_tile:SlidingTile",
    "tile-offsets": "intarsia.passes.patterns.tile_offsets:TileOffsets",
    "vertical-stripe": "intarsia.passes.patterns.vertical_stripe:VerticalStripe",
}
"""Patterns that come with Intarsia, by name; others join by entry points of the group ``intarsia.patterns``."""

GROUP = "intarsia.patterns"


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys a query attends to, block by block.

    Subclasses are frozen dataclasses; ``str`` of a pattern is ``name(key=value)``, from which ``find_pattern`` makes it
    again. A subclass says what cannot be done by a ValueError, in its constructor or in ``blocks`` and ``order``.

    Attributes:
        may_be_empty: Whether a query may attend to nothing, which gives zeros; otherwise ``table`` refuses it.
        mean: Share of what a head gives that is the mean of all values, in place of what the blocks leave out; the
            rest is attention to the blocks. Every pattern takes it: ``diagonal(density=0.25, mean=0.3)``.
    """

    name: ClassVar[str]
    may_be_empty: ClassVar[bool] = False
    mean: float = field(default=0.0, kw_only=True)

    @abstractmethod
    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> NDArray[np.bool_]:
        """Which blocks of keys each block of queries attends to (blocks of queries, blocks of keys), over positions.

        Raises:
            ValueError: The pattern does not fit this layout or these blocks.
        """

    def order(self, layout: TokenLayout) -> TokenOrder | None:
        """Which token stands at each position; None where they stand as they come."""
        return None

    def table(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockTable:
        """The blocks as a table that is known to be sound.

        Raises:
            UsageError: The pattern does not fit, a block of queries attends to nothing, or the order of tokens is none;
                one line with the pattern, the layout and the blocks.
        """
        return _table(self, layout, block_q, block_k)

    def __str__(self) -> str:
        return str(spec_of(self.name, self))


def find_pattern(text: str) -> Pattern:
    """The pattern that ``name(key=value)`` or ``path/to/file.py:ClassName(key=value)`` stands for.

    Raises:
        UsageError: No such pattern, file or class.
        SpecError: The notation, a key or a value is wrong.
    """
    if ".py:" in text:
        return _checked(registry.from_file(text, Pattern, kind="pattern"))  # type: ignore[type-abstract]
    spec = Spec.parse(text)
    found = registry.find(spec.name, PATTERNS, group=GROUP, kind="pattern")
    made = construct(found, spec)
    assert isinstance(made, Pattern)
    return _checked(made)


def _checked(pattern: Pattern) -> Pattern:
    """The pattern; SpecError unless its mean is a share."""
    if not 0 <= pattern.mean <= 1:
        raise SpecError(f"{pattern}: mean is {pattern.mean}; it is a share from 0 to 1")
    return pattern


@lru_cache(maxsize=128)
def _table(pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int) -> BlockTable:
    where = f"{pattern} at {layout}, blocks of {block_q} x {block_k}"
    try:
        _check_order(pattern.order(layout), layout)
        blocks = pattern.blocks(layout, block_q, block_k)
        _check_blocks(blocks, pattern, (-(-layout.tokens // block_q), -(-layout.tokens // block_k)))
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    return BlockTable.of(blocks)


def _check_order(order: TokenOrder | None, layout: TokenLayout) -> None:
    if order is None:
        return
    if order.count != layout.tokens:
        raise ValueError(f"its order names {order.count} tokens; there are {layout.tokens}")
    order.inverse()


def _check_blocks(blocks: NDArray[np.bool_], pattern: Pattern, expected: tuple[int, int]) -> None:
    if blocks.dtype != np.bool_ or blocks.shape != expected:
        raise ValueError(f"its blocks are {blocks.dtype} {blocks.shape}; they must be bool {expected}")
    empty = np.flatnonzero(~blocks.any(axis=1))
    if len(empty) and not pattern.may_be_empty:
        raise ValueError(
            f"{len(empty)} of {expected[0]} blocks of queries attend to nothing, the first is block {empty[0]}; "
            "keep at least one block in each row"
        )
