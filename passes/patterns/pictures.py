"""Pictures of masks: over tokens as they come, and block by block as a kernel computes them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from intarsia.passes.patterns.masks import Mask

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 8  # pixels between and around the squares
LINE = 14  # pixels of a line of text
EDGE = 4  # pixels of the strips at the left and the top of a square

PAPER, INK = (246, 244, 239), (32, 68, 122)  # not computed, computed
FRAMES, TEXT = ((196, 190, 178), (222, 217, 207)), (200, 96, 40)  # frames by turns, text


def picture(mask: Mask, *, pixels: int = 192) -> bytes:
    """A PNG: the mask over tokens left, the blocks over positions right, queries downwards and keys to the right.

    A pixel is as dark as the share of its pairs that is computed. The strips at the left and the top show frames by
    turns in two greys, and text in orange; over positions, where the order mixes frames, they show text only.

    Args:
        pixels: Width and height of each of the two squares at most; a square that shows fewer tokens or blocks shows
            each as a whole number of pixels.
    """
    from PIL import Image, ImageDraw

    over_tokens = _square(token_shares(mask, pixels), _token_strip(mask), pixels)
    over_blocks = _square(block_shares(mask, pixels), _block_strip(mask), pixels)
    width = 2 * max(over_tokens.width, over_blocks.width, pixels) + 3 * GAP
    sheet = Image.new("RGB", (width, max(over_tokens.height, over_blocks.height) + 2 * LINE + 2 * GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), f"{mask.pattern}: {mask.density:.1%}", fill="black")
    right = (width + GAP) // 2
    for left, words, square in ((GAP, "tokens", over_tokens), (right, _about_blocks(mask), over_blocks)):
        pen.text((left, GAP // 2 + LINE), words, fill="gray")
        sheet.paste(square, (left, GAP + 2 * LINE))
    buffer = io.BytesIO()
    sheet.quantize(32, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def token_shares(mask: Mask, pixels: int) -> NDArray[np.float64]:
    """The share of pairs that is computed, over tokens cut into at most ``pixels`` parts along each axis.

    Exact, without the mask over all tokens: tokens of a part are counted by the block that they stand in.
    """
    count = mask.layout.tokens
    places = np.arange(count) if mask.order is None else mask.order.inverse()
    parts = np.arange(count) * min(pixels, count) // count
    return _shares(mask, parts, places)


def block_shares(mask: Mask, pixels: int) -> NDArray[np.float64]:
    """The share of pairs that is computed, over positions: a cell for each block of keys, at most ``pixels``."""
    count = mask.layout.tokens
    places = np.arange(count)
    blocks = mask.table.columns
    parts = places // mask.block_k if blocks <= pixels else places * pixels // count
    return _shares(mask, parts, places)


def _shares(mask: Mask, parts: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of the mask over pairs of parts, each token of which stands at one of the places."""
    rows, columns = len(mask.table.rows), mask.table.columns
    held_q = np.zeros((parts[-1] + 1, rows))
    held_k = np.zeros((parts[-1] + 1, columns))
    np.add.at(held_q, (parts, places // mask.block_q), 1)
    np.add.at(held_k, (parts, places // mask.block_k), 1)
    held_q /= held_q.sum(axis=1, keepdims=True)
    held_k /= held_k.sum(axis=1, keepdims=True)
    return np.asarray(held_q @ mask.table.blocks() @ held_k.T)


def _token_strip(mask: Mask) -> NDArray[np.uint8]:
    """A colour (S, 3) for each token."""
    layout = mask.layout
    colours = np.empty((layout.tokens, 3), dtype=np.uint8)
    colours[:] = TEXT
    numbers = np.repeat(np.arange(layout.frames) % 2, layout.frame)
    colours[layout.before : layout.before + layout.video] = np.array(FRAMES, dtype=np.uint8)[numbers]
    return colours


def _block_strip(mask: Mask) -> NDArray[np.uint8]:
    """A colour (S, 3) for each position."""
    colours = _token_strip(mask)
    if mask.order is not None:
        colours[mask.layout.before : mask.layout.before + mask.layout.video] = FRAMES[1]
    return colours


def _about_blocks(mask: Mask) -> str:
    words = "blocks" if mask.order is None else "blocks, reordered"
    return f"{words}: {len(mask.table.rows)} x {mask.table.columns}"


def _square(shares: NDArray[np.float64], strip: NDArray[np.uint8], pixels: int) -> Image:
    """The shares as a square of cells of a whole number of pixels, with a strip at the left and the top."""
    from PIL import Image

    scale = max(1, pixels // len(shares))
    side = scale * len(shares)
    levels = np.array(PAPER) + shares[..., None] * (np.array(INK, dtype=np.float64) - PAPER)
    drawn = np.full((side + EDGE + 1, side + EDGE + 1, 3), 255, dtype=np.uint8)
    drawn[EDGE + 1 :, EDGE + 1 :] = np.kron(levels.round().astype(np.uint8), np.ones((scale, scale, 1), dtype=np.uint8))
    ticks = strip[(np.arange(side) * len(strip) // side)]
    drawn[:EDGE, EDGE + 1 :] = ticks[None]
    drawn[EDGE + 1 :, :EDGE] = ticks[:, None]
    return Image.fromarray(drawn)
