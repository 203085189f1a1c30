"""Attention maps of a layer's heads side by side, with the masks over them, as a small picture."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intarsia.search.explain_heads import abridged

PARTS = 96
"""Parts, at most, into which tokens are pooled along each axis."""

SIDE, GAP, FOOT = 112, 10, 34
"""Pixels of a map on the page, between maps, and for what is written below."""

PAPER, INK = (246, 244, 239), (32, 68, 122)  # computed: little attention, much
DIM, LOST = (222, 216, 206), (196, 84, 28)  # not computed: little attention, much
LEVELS, SHARES = 24, 5
EMPTY = LEVELS * SHARES

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeadMap:
    """Attention of one head, pooled.

    Attributes:
        weights: Mean attention from a query of a part to a key of a part (P, P).
        computed: The share of these pairs that the pattern computes (P, P).
        kept: The share of all attention that falls on pairs which are computed.
    """

    weights: Floats
    computed: Floats
    kept: float


@dataclass(frozen=True)
class MapLabel:
    """What stands at the map of a head: its left edge and centre (pixels), pattern, and the attention that it keeps."""

    left: float
    at: float
    pattern: str
    kept: str
    skipped: bool
    text: str


@dataclass(frozen=True)
class AttentionStrip:
    """The heads of a layer side by side: a PNG as data URI, sizes in pixels."""

    layer: str
    picture: str
    width: int
    height: int
    side: int
    labels: tuple[MapLabel, ...]


def strip(layer: str, maps: Sequence[HeadMap | None], options: Sequence[str]) -> AttentionStrip:
    """The maps of a layer side by side."""
    width = len(maps) * (SIDE + GAP) - GAP
    labels = tuple(_label(layer, head, one, options[head]) for head, one in enumerate(maps))
    return AttentionStrip(layer, _data_uri(_picture(maps)), width, SIDE + FOOT, SIDE, labels)


def _label(layer: str, head: int, one: HeadMap | None, option: str) -> MapLabel:
    left = head * (SIDE + GAP)
    kept = "" if one is None else f"keeps {one.kept:.0%}"
    told = f"{layer}#{head}: {abridged(option)}{f', {kept} of its attention' if kept else ''}"
    return MapLabel(left + 0.5, left + SIDE / 2, f"{head}: {short(option)}", kept, one is None, told)


def short(option: str) -> str:
    """A pattern in a word or two: ``stripe 25`` of ``vertical-stripe(density=0.25, columns='0-3')``."""
    mode, _, rest = option.rpartition(".py:")[2].partition("(")
    density = re.search(r"density=([0-9.]+)", rest)
    words = mode.removeprefix("vertical-").replace("multi-diagonal", "multi-diag.")
    return f"{words} {100 * float(density[1]):.3g}" if density else words


def _picture(maps: Sequence[HeadMap | None]) -> bytes:
    """A PNG of colours by number: how much attention, and how much of it is computed; nothing for skipped heads."""
    from PIL import Image

    shown = next((one.weights.shape[0] for one in maps if one is not None), PARTS)
    gap = round(GAP * shown / SIDE)
    drawn = np.full((shown, len(maps) * (shown + gap) - gap), EMPTY, dtype=np.uint8)
    for head, one in enumerate(maps):
        if one is not None:
            drawn[:, head * (shown + gap) : head * (shown + gap) + shown] = _levels(one)
    picture = Image.fromarray(drawn)
    picture.putpalette(_palette())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, transparency=EMPTY)
    return buffer.getvalue()


def _levels(one: HeadMap) -> NDArray[np.uint8]:
    """Numbers of colours (P, P): attention from a hundredth of an even share to all of it, on a logarithmic scale."""
    parts = one.weights.shape[0]
    even = np.log10(np.maximum(one.weights / max(one.weights.mean(), 1e-300), 1e-9))
    level = np.clip((even + 2) / (2 + np.log10(parts)), 0, 1) * (LEVELS - 1)
    share = one.computed * (SHARES - 1)
    return np.asarray(share.round() * LEVELS + level.round(), dtype=np.uint8)


def _palette() -> list[int]:
    """Colours by number, shares of what is computed times levels of attention, and one for nothing."""
    level = np.linspace(0, 1, LEVELS)[None, :, None]
    share = np.linspace(0, 1, SHARES)[:, None, None]
    lost = np.array(DIM) + level * (np.array(LOST, dtype=np.float64) - DIM)
    computed = np.array(PAPER) + level * (np.array(INK, dtype=np.float64) - PAPER)
    colours = (lost + share * (computed - lost)).round().astype(int).reshape(-1)
    return [*(int(value) for value in colours), 255, 255, 255]


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
