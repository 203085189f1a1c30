"""Which columns a vertical stripe takes: those that the queries' attention falls on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.passes.patterns.grid import Grid, check_density
from intarsia.passes.patterns.vertical_stripe import always, widest


def columns_of(
    mass: NDArray[np.floating], layout: TokenLayout, block_q: int, block_k: int, *, density: float, sink: int = 1
) -> str:
    """The blocks of keys with the largest mass that fill the density beside text and sink: ``0-3,9``.

    Args:
        mass: Probability that falls on each block of keys (blocks of keys), summed or averaged over queries, samples
            and heads. Equal ones are taken from the left.
        density: Share of all pairs that ``vertical-stripe`` may compute at most.
        sink: First frames that every query attends to.

    Raises:
        ValueError: Text and sink are more than the density, or ``mass`` is not one finite number for each block.
    """
    check_density(density)
    grid = Grid(layout, block_q, block_k)
    if mass.shape != grid.shape[1:] or not np.isfinite(mass).all():
        raise ValueError(f"mass has the shape {mass.shape}; it is one finite number for each of {grid.shape[1]} blocks")
    kept = always(grid, sink)
    free = np.flatnonzero(~kept.all(axis=0))
    ranked = free[np.argsort(-mass[free], kind="stable")]
    found = widest(grid, kept, [ranked[:count] for count in range(len(ranked) + 1)], density)
    return _runs([int(column) for column in free if found[:, column].all()])


def _runs(columns: Sequence[int]) -> str:
    """Ascending numbers as runs of neighbours: ``0-3,9``."""
    runs = TokenOrder.of(columns).pieces
    return ",".join(f"{run.start}-{run.start + run.count - 1}" if run.count > 1 else f"{run.start}" for run in runs)
