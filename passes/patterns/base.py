"""What a pattern is, and the registry of patterns."""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir import registry
from intarsia.ir.errors import UsageError
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
    """

    name: ClassVar[str]
    may_be_empty: ClassVar[bool] = False

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
        return _from_file(text)
    spec = Spec.parse(text)
    found = registry.find(spec.name, PATTERNS, group=GROUP, kind="pattern")
    made = construct(found, spec)
    assert isinstance(made, Pattern)
    return made


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


def _from_file(text: str) -> Pattern:
    path_text, _, rest = text.partition(".py:")
    path, spec = Path(path_text + ".py"), Spec.parse(rest)
    if not path.is_file():
        raise UsageError(f"pattern {text!r}: there is no file {path}")
    cls = _classes(path.resolve(), path.stat().st_mtime_ns).get(spec.name)
    if cls is None:
        raise UsageError(f"pattern {text!r}: {path} defines no Pattern called {spec.name}")
    return construct(cls, spec)


@lru_cache(maxsize=32)
def _classes(path: Path, changed: int) -> dict[str, type[Pattern]]:
    """The patterns that a file defines, by class name.

    A file that has not ``changed``, which is a time, is imported once: the same notation makes equal patterns.
    """
    module_name = f"intarsia_user_pattern_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's own, and may raise anything
        raise UsageError(f"pattern file {path} cannot be imported: {type(error).__name__}: {error}") from error
    return {
        name: value for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, Pattern)
    }
