"""What every pattern must satisfy; run it on a pattern of your own in one line."""

from __future__ import annotations

import numpy as np

from intarsia.ir.spec import Spec, construct
from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.patterns.base import Pattern
from intarsia.passes.patterns.grid import Grid
from intarsia.passes.patterns.masks import Mask


def check_pattern(pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int) -> None:
    """Raise AssertionError, in one sentence, unless the pattern keeps its promises at this layout in these blocks.

    The promises: its notation makes it again; the same pattern gives the same blocks; no row is empty unless it may be;
    text attends to everything and everything to text, unless no block is computed at all; its order, if it has one,
    leaves text where it is; it stays within ``density`` if it has a field of this name; tables and orders read back.

    Raises:
        UsageError: The pattern does not fit the layout.
    """
    again = construct(type(pattern), Spec.parse(str(pattern)))
    if again != pattern or str(again) != str(pattern):
        raise AssertionError(f"{pattern}: its notation makes {again!r}, not the same pattern again")
    mask = Mask(pattern, layout, block_q, block_k)
    blocks, where = pattern.blocks(layout, block_q, block_k), f"{pattern} at {layout}"
    if not np.array_equal(blocks, again.blocks(layout, block_q, block_k)):
        raise AssertionError(f"{where}: the same pattern gives other blocks when it is asked again")
    if not np.array_equal(BlockTable.parse(str(mask.table)).blocks(), blocks):
        raise AssertionError(f"{where}: the table of its blocks does not read back")
    if blocks.any() and not blocks[Grid(layout, block_q, block_k).text()].all():
        raise AssertionError(f"{where}: not all rows and columns of text are kept")
    if mask.order is not None:
        _check_order(mask.order, layout, where)
    asked = getattr(pattern, "density", 1.0)
    if mask.density > asked * (1 + 1e-9):
        raise AssertionError(f"{where}: its density is {mask.density}, more than the {asked} asked for")


def _check_order(order: TokenOrder, layout: TokenLayout, where: str) -> None:
    tokens, first, end = order.indices(), layout.before, layout.before + layout.video
    text = np.r_[0:first, end : layout.tokens]
    if not np.array_equal(tokens[text], text):
        raise AssertionError(f"{where}: its order moves text")
    if TokenOrder.parse(str(order)) != order:
        raise AssertionError(f"{where}: its order does not read back")
