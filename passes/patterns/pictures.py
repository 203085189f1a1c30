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
    """A PNG: the mask over tokens left, over positions right, queries downwards and keys to the right.

    A pixel is as dark as the share of its pairs that is computed. The strips at the left and the top show frames by
    turns in two greys, and text in orange; over positions, where the order mixes frames, they show text only.

    Args:
        pixels: Width and height of each of the two squares.
    """
    from PIL import Image, ImageDraw

    squares = {
        "tokens": _square(token_shares(mask, pixels), _token_strip(mask), pixels),
        _about_blocks(mask): _square(position_shares(mask, pixels), _position_strip(mask), pixels),
    }
    side = pixels + EDGE + 1
    sheet = Image.new("RGB", (2 * side + 3 * GAP, side + 2 * LINE + 2 * GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), f"{mask.pattern}: {mask.density:.1%}", fill="black")
    for number, (words, square) in enumerate(squares.items()):
        left = GAP + number * (side + GAP)
        pen.text((left, GAP // 2 + LINE), words, fill="gray")
        sheet.paste(square, (left, GAP + 2 * LINE))
    buffer = io.BytesIO()
    colours = Image.new("P", (1, 1))
    colours.putpalette(_palette())
    sheet.quantize(palette=colours, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def token_shares(mask: Mask, parts: int) -> NDArray[np.float64]:
    """The share of pairs that is computed, over tokens cut into at most as many parts along each axis.

    Exact, without the mask over all tokens: tokens of a part are counted by the block that they stand in.
    """
    places = np.arange(mask.layout.tokens) if mask.order is None else mask.order.inverse()
    return _shares(mask, parts, places)


def position_shares(mask: Mask, parts: int) -> NDArray[np.float64]:
    """The share of pairs that is computed, over positions cut into at most as many parts along each axis."""
    return _shares(mask, parts, np.arange(mask.layout.tokens))


def _shares(mask: Mask, parts: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of the mask over pairs of parts of a sequence whose tokens stand at these places."""
    count = len(places)
    parts = min(parts, count)
    part = np.arange(count) * parts // count
    held = []
    for block, blocks in ((mask.block_q, len(mask.table.rows)), (mask.block_k, mask.table.columns)):
        counts = np.zeros((parts, blocks))
        np.add.at(counts, (part, places // block), 1)
        held.append(counts / counts.sum(axis=1, keepdims=True))
    return np.asarray(held[0] @ mask.table.blocks() @ held[1].T)


def _token_strip(mask: Mask) -> NDArray[np.uint8]:
    """A colour (S, 3) for each token."""
    layout = mask.layout
    colours = np.empty((layout.tokens, 3), dtype=np.uint8)
    colours[:] = TEXT
    numbers = np.repeat(np.arange(layout.frames) % 2, layout.frame)
    colours[layout.before : layout.before + layout.video] = np.array(FRAMES, dtype=np.uint8)[numbers]
    return colours


def _position_strip(mask: Mask) -> NDArray[np.uint8]:
    """A colour (S, 3) for each position."""
    colours = _token_strip(mask)
    if mask.order is not None:
        colours[mask.layout.before : mask.layout.before + mask.layout.video] = FRAMES[1]
    return colours


def _palette() -> list[int]:
    """The colours of a picture: shares in steps of 1/32, frames, text, and greys for what is written."""
    shares = np.linspace(0, 1, 33)[:, None]
    ramp = np.array(PAPER) + shares * (np.array(INK, dtype=np.float64) - PAPER)
    greys = np.repeat(np.linspace(0, 255, 16)[:, None], 3, axis=1)
    colours = np.concatenate([ramp, greys, FRAMES, [TEXT]]).round().astype(int)
    return [int(level) for level in colours.reshape(-1)]


def _about_blocks(mask: Mask) -> str:
    words = "blocks" if mask.order is None else "blocks, reordered"
    return f"{words}: {len(mask.table.rows)} x {mask.table.columns}"


def _square(shares: NDArray[np.float64], strip: NDArray[np.uint8], pixels: int) -> Image:
    """The shares as a square, with a strip at the left and the top."""
    from PIL import Image

    levels = np.array(PAPER) + shares[..., None] * (np.array(INK, dtype=np.float64) - PAPER)
    cells = np.arange(pixels) * len(shares) // pixels
    ticks = strip[np.arange(pixels) * len(strip) // pixels]
    drawn = np.full((pixels + EDGE + 1, pixels + EDGE + 1, 3), 255, dtype=np.uint8)
    drawn[EDGE + 1 :, EDGE + 1 :] = levels.round().astype(np.uint8)[np.ix_(cells, cells)]
    drawn[:EDGE, EDGE + 1 :] = ticks[None]
    drawn[EDGE + 1 :, :EDGE] = ticks[:, None]
    return Image.fromarray(drawn)
