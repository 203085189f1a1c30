"""Which columns a vertical stripe takes: those that the queries' attention falls on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.tokens import TokenLayout
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
    free = ~kept.all(axis=0)
    ranked = np.argsort(-mass, kind="stable")
    ranked = ranked[free[ranked]]
    found = widest(grid, kept, [ranked[:count] for count in range(len(ranked) + 1)], density)
    return _runs(found.all(axis=0) & free)


def _runs(columns: NDArray[np.bool_]) -> str:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], columns, [False]]).astype(np.int8)))
    runs = ((int(first), int(end) - 1) for first, end in edges.reshape(-1, 2))
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
