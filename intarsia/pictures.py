"""Pictures of videos: a GIF each, contact sheets, and the unchanged model beside the engine."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from intarsia.backends.runner import write_video
from intarsia.backends.writing import new_file
from intarsia.models.sheet import contact_sheet

SCALE = 2
"""Factor by which the small frames of the side-by-side picture are enlarged."""


def write_videos(videos: Tensor, captions: Sequence[str], folder: Path) -> list[Path]:
    """A GIF for each video (N, 3, F, H, W) in [-1, 1], named by its number and caption, and one contact sheet."""
    paths: list[Path] = []
    for index, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")
        paths.append(folder / f"{index:03d}-{words}.gif")
        write_video(video, paths[-1])
    sheet = contact_sheet(videos, captions, columns=min(2, len(captions)))
    paths.append(folder / "contact-sheet.png")
    with new_file(paths[-1]) as draft:
        sheet.save(draft)
    return paths


def side_by_side(references: Tensor, ours: Tensor) -> bytes:
    """A PNG: for each pair of videos (N, 3, F, H, W) the reference's frames left, the engine's right."""
    from PIL import Image

    pairs = torch.stack([references, ours], dim=1).flatten(0, 1)
    captions = [
        f"{who} {index}" for index in range(len(references)) for who in ("unchanged model, sample", "engine, sample")
    ]
    sheet = contact_sheet(pairs, captions, columns=2)
    sheet = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
