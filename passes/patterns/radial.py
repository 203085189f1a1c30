"""A window that halves as the distance in frames doubles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Blocks, Grid, check_density, check_sink


@dataclass(frozen=True)
class Radial(Pattern):
    """Keys near the query's place, the nearer the more frames lie between, and the text's rows and columns.

    In a frame at a distance of t frames, g bits long, the window reaches w / 2^g tokens from the query's place. Where
    that is less than a block, it is one block, and only in frames whose t is a multiple of block * 2^g / w, rounded up
    to a power of two. The density gives w, which the paper's code takes from the size of a frame.
    Source: Radial Attention (arXiv 2506.19852) and mit-han-lab/radial-attention, ``attn_mask.py``.

    Attributes:
        density: Share of all pairs of a query and a key that is computed, text and sink included.
        sink: First frames that every query attends to.
    """

    name: ClassVar[str] = "radial"
    density: float
    sink: int = 1

    def __post_init__(self) -> None:
        check_density(self.density)
        check_sink(self.sink)

    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> Blocks:
        """Blocks by their middles' places and frames, with text and sink; ValueError if those exceed the density."""
        grid = Grid(layout, block_q, block_k)
        middles = (np.clip(middle // 2 - layout.before, 0, layout.video - 1) for middle in grid.middles())
        (frames_q, places_q), (frames_k, places_k) = (np.divmod(middle, layout.frame) for middle in middles)
        frames = np.abs(frames_q[:, None] - frames_k[None, :])
        places = np.abs(places_q[:, None] - places_k[None, :])
        bits = np.frexp(frames)[1]
        power_of_two = np.maximum(frames & -frames, 1)  # the largest that divides the distance
        block = max(block_q, block_k)
        thinned = np.where(frames > 0, (block << bits) // power_of_two, 0)
        width = np.where((frames > 0) & (places < block), 0, places << bits)
        nearness = frames * layout.frame + places  # decides among equals
        distance = np.maximum(thinned, width) * layout.video + nearness
        return grid.fill(grid.text() | grid.sink(self.sink), distance, self.density)
