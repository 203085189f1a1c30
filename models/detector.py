"""Reads the label back off a video: nearest colour, best-fitting outline, way the centroid went. Nothing is learnt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.models.shapes import (
    BACKGROUND,
    CENTROID_DROPS,
    COLOURS,
    MOTIONS,
    PALETTE,
    SHAPES,
    SIZE,
    STRAIGHT_FRAMES,
    Label,
    coverage,
)

FAINTEST = 0.25  # coverage under this is noise
SMALLEST = 20.0  # pixels a frame; the smallest shape drawn covers 64


@dataclass(frozen=True)
class Recognised:
    """Shares of videos, 0 to 1, whose shape, colour, motion, and all three, were read as asked."""

    shape: float
    colour: float
    motion: float
    all: float


def read(videos: Tensor) -> list[Label | None]:
    """What each of the videos (B, 3, F, 32, 32) in [-1, 1] shows; None where a frame shows no object."""
    videos = videos.float()
    colour = _colours(videos)
    cover = _covers(videos, colour)
    area = cover.sum((-1, -2))
    centroid = _centroids(cover, area)
    shape = _outlines(cover, area, centroid)
    motion = _headings(centroid)
    seen = (area > SMALLEST).all(1)
    rows = zip(seen.tolist(), shape.tolist(), colour.tolist(), motion.tolist(), strict=True)
    return [Label(SHAPES[s], COLOURS[c], MOTIONS[m]) if there else None for there, s, c, m in rows]


def recognised(asked: Sequence[Label], shown: Sequence[Label | None]) -> Recognised:
    """How often what is shown is what was asked for; a video that shows no object counts as wrong in everything."""
    pairs = list(zip(asked, shown, strict=True))

    def share(*kinds: str) -> float:
        right = [b is not None and all(getattr(a, kind) == getattr(b, kind) for kind in kinds) for a, b in pairs]
        return sum(right) / len(right)

    return Recognised(share("shape"), share("colour"), share("motion"), share("shape", "colour", "motion"))


def _colours(videos: Tensor) -> Tensor:
    """Places in COLOURS (B): nearest to the mean of the pixels that differ most from the background."""
    contrast = videos - videos.new_tensor(BACKGROUND)[:, None, None, None]
    weight = contrast.norm(dim=1, keepdim=True)
    weight = weight * (weight > weight.amax((2, 3, 4), keepdim=True) / 2)
    mean = (videos * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4)).clamp(min=1e-6)
    return torch.cdist(mean, videos.new_tensor(PALETTE)).argmin(1)


def _covers(videos: Tensor, colour: Tensor) -> Tensor:
    """Coverage (B, F, 32, 32): where each pixel lies on the line from the background (0) to the object's colour (1)."""
    ground = videos.new_tensor(BACKGROUND)
    ink = videos.new_tensor(PALETTE)[colour] - ground
    along = torch.einsum("bcfhw,bc->bfhw", videos - ground[:, None, None, None], ink)
    cover = (along / ink.square().sum(1)[:, None, None, None]).clamp(0, 1)
    return cover * (cover > FAINTEST)


def _centroids(cover: Tensor, area: Tensor) -> Tensor:
    """Centres of mass (B, F, 2), x then y, in pixels."""
    grid = torch.arange(SIZE, device=cover.device) + 0.5
    across = (cover * grid).sum((-1, -2))
    down = (cover * grid[:, None]).sum((-1, -2))
    return torch.stack([across, down], dim=-1) / area.clamp(min=1e-6)[..., None]


def _outlines(cover: Tensor, area: Tensor, centroid: Tensor) -> Tensor:
    """Places in SHAPES (B): the shape that, drawn with this area at this centroid, differs least over all frames."""
    radius = (area / math.pi).sqrt()
    misfits = []
    for place, drop in enumerate(CENTROID_DROPS):
        centre = centroid - torch.stack([torch.zeros_like(radius), drop * radius], dim=-1)
        drawn = coverage(torch.full((len(cover),), place, device=cover.device), radius, centre)
        misfits.append((drawn - cover).abs().sum((1, 2, 3)))
    return torch.stack(misfits).argmin(0)


def _headings(centroid: Tensor) -> Tensor:
    """Places in MOTIONS (B), from how far the centroid went before any wall could turn it."""
    gone = centroid[:, STRAIGHT_FRAMES] - centroid[:, 0]
    # As MOTIONS: left, right, up, down.
    return torch.stack([-gone[:, 0], gone[:, 0], -gone[:, 1], gone[:, 1]]).argmax(0)
