"""Where the attention of each head falls: on which keys, and how far from the query; and patterns that follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.ir.program import Program
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.attention_sites import Site
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.columns import columns_of
from intarsia.passes.patterns.offsets import Distances
from intarsia.passes.patterns.tile_offsets import TileOffsets
from intarsia.passes.patterns.vertical_stripe import VerticalStripe
from intarsia.passes.sparse_attention import DENSE, SKIP
from intarsia.search.head_errors import Heads, dense_answer, scores, walk
from intarsia.search.head_table import Floats
from intarsia.search.sensitivity import Batch

ROWS = 64
"""Queries whose attention is looked at."""


GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are spread evenly, wherever one stops."""


@dataclass(frozen=True)
class Mass:
    """Where the attention of a site's heads falls, in the mean over calls and some queries.

    Attributes:
        columns: What each key gets (H, S).
        offsets: With what probability a video's query attends to the key at each distance along frames, rows and
            columns (H, 2 frames - 1, 2 height - 1, 2 width - 1), the query itself in the middle; 0 where none was seen.
    """

    columns: Floats
    offsets: Floats


def attention_mass(program: Program, batches: Sequence[Batch], heads: Heads) -> dict[str, Mass]:
    """Where the attention of every site's heads falls on these calls."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def answer(site: Site, tables: Sequence[Mapping[str, Any]]) -> Sequence[Tensor]:
        rows = _rows(site.layout.tokens)
        for table in tables:
            weights = torch.softmax(scores(site, table, rows, heads.graph), dim=-1).mean(0)
            found = weights.mean(1) / len(tables), _by_distance(weights, rows, site.layout) / len(tables)
            known = sums.get(site.name)
            sums[site.name] = found if known is None else (known[0] + found[0], known[1] + found[1])
        return [dense_answer(site, table, heads.graph) for table in tables]

    with torch.no_grad():
        walk(program, batches, heads.sites, answer)
    return {name: Mass(columns.double().numpy(), offsets.double().numpy()) for name, (columns, offsets) in sums.items()}


def calibrated(heads: Heads, mass: Mapping[str, Mass]) -> Heads:
    """The same heads, with stripes whose columns and tiles whose distances are those that each head looks at."""
    options: list[tuple[str, ...]] = []
    for site in heads.sites:
        block = heads.pass_.block_of(site.layout)
        for head, offered in enumerate(heads.of_site(site)):
            columns = mass[site.name].columns[head]
            by_block = np.add.reduceat(columns, np.arange(0, len(columns), block))
            distances = Distances(mass[site.name].offsets[head], site.layout, block)
            options.append(tuple(_followed(option, by_block, distances) for option in offered))
    return replace(heads, options=tuple(options))


def _followed(option: str, columns: Floats, distances: Distances) -> str:
    """The pattern with what it leaves open taken from the mass of blocks of keys and of distances."""
    pattern = None if option in (DENSE, SKIP) else find_pattern(option)
    if isinstance(pattern, VerticalStripe) and pattern.columns is None:
        layout, block = distances.layout, distances.block
        chosen = columns_of(columns, layout, block, block, density=pattern.density, sink=pattern.sink)
        return str(replace(pattern, columns=chosen))
    if isinstance(pattern, TileOffsets) and pattern.offsets is None:
        found = distances.pattern(pattern.density)
        return str(replace(pattern, tile=found.tile, offsets=found.offsets))
    return option


def _rows(tokens: int) -> Tensor:
    """Numbers of queries, one in each of equal parts, at another place of each, so that all columns of frames occur."""
    if tokens <= ROWS:
        return torch.arange(tokens)
    parts = torch.arange(ROWS, dtype=torch.float64)
    return ((parts + parts * GOLDEN % 1) * tokens / ROWS).long()


def _by_distance(weights: Tensor, rows: Tensor, layout: TokenLayout) -> Tensor:
    """Mean probabilities by distance, as in ``Mass.offsets``, from weights (H, R, S) of the queries ``rows`` (R)."""
    extents = (layout.frames, layout.height, layout.width)
    sums = weights.new_zeros(len(weights), *(2 * extent - 1 for extent in extents))
    seen = weights.new_zeros(sums.shape[1:])
    video = weights[:, :, layout.before : layout.before + layout.video].unflatten(2, extents)
    for number, row in enumerate((rows - layout.before).tolist()):
        if 0 <= row < layout.video:
            place = (row // layout.frame, row % layout.frame // layout.width, row % layout.width)
            window = tuple(slice(e - 1 - p, 2 * e - 1 - p) for e, p in zip(extents, place, strict=True))
            sums[:, *window] += video[:, number]
            seen[window] += 1
    return sums / seen.clamp(min=1)
