"""The same keys for all queries: text, first frames, and the columns that calibration found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid, check_density, check_sink

_COLUMNS = re.compile(r"|\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class VerticalStripe(Pattern):
    """Whole columns of blocks, and the text's rows.

    Source: Sparse-vDiT (arXiv 2506.03065), section 4.2, mode 4, which leaves the choice of columns open.

    Attributes:
        density: Share of all pairs of a query and a key that is computed at most, text and sink included.
        columns: Blocks of keys beside text and sink, as runs: ``0-3,9``; ``columns.columns_of`` chooses them by mass.
            They belong to one size of blocks. None takes as many as the density allows, spread evenly.
        sink: First frames that every query attends to.
    """

    name: ClassVar[str] = "vertical-stripe"
    density: float
    columns: str | None = None
    sink: int = 1

    def __post_init__(self) -> None:
        check_density(self.density)
        check_sink(self.sink)
        if self.columns is not None and not (isinstance(self.columns, str) and _COLUMNS.fullmatch(self.columns)):
            raise ValueError(f"columns is {self.columns!r}; it is runs of blocks such as '0-3,9'")

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """Columns and the text's rows; ValueError if they are more than the density or beyond the sequence."""
        grid = Grid(layout, block_q, block_k)
        kept = always(grid, self.sink)
        if self.columns is None:
            free = np.flatnonzero(~kept.all(axis=0))
            return widest(grid, kept, [evenly(free, count) for count in range(len(free) + 1)], self.density)
        kept[:, _numbers(self.columns, grid.shape[1])] = True
        grid.budget(self.density, kept)
        return kept


def always(grid: Grid, sink: int) -> Blocks:
    """What a stripe keeps without being asked: the text's rows and columns, and the columns of the first frames."""
    return grid.text() | grid.sink(sink)


def widest(grid: Grid, kept: Blocks, choices: list[NDArray[np.int64]], density: float) -> Blocks:
    """``kept`` with the last of the choices of columns that the density allows; ValueError if it allows none."""
    budget = grid.budget(density, kept)
    prices = (grid.sizes_q @ ~kept) * grid.sizes_k
    affordable = [columns for columns in choices if prices[columns].sum() <= budget]
    found = kept.copy()
    found[:, affordable[-1]] = True
    return found


def evenly(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """``count`` of the numbers, in the middles of as many equal parts."""
    return numbers[(2 * np.arange(count) + 1) * len(numbers) // (2 * count)] if count else numbers[:0]


def _numbers(text: str, count: int) -> list[int]:
    pairs = (part.partition("-") for part in text.split(",") if part)
    runs = [(int(first), int(last or first)) for first, _, last in pairs]
    found = [number for first, last in runs for number in range(first, last + 1)]
    if sorted(set(found)) != found:
        raise ValueError(f"columns {text!r} are not ascending")
    if found and found[-1] >= count:
        raise ValueError(f"columns {text!r} go beyond the {count} blocks of keys")
    return found
