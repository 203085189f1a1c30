"""A contact sheet: many videos on one picture, a strip of frames for each, with a caption."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTION_HEIGHT = 12  # pixels
GAP = 6  # pixels between strips


def contact_sheet(videos: Tensor, captions: Sequence[str], *, columns: int) -> "Image":
    """A picture of the videos (B, 3, F, H, W) in [-1, 1], a strip of F frames each, B captions over them."""
    from PIL import Image, ImageDraw

    count, _, frames, height, width = videos.shape
    cell_width, cell_height = frames * width + GAP, height + CAPTION_HEIGHT + GAP
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        left = GAP + place % columns * cell_width
        top = GAP + place // columns * cell_height
        pen.text((left, top), caption, fill="black")
        sheet.paste(Image.fromarray(_strip(video).numpy()), (left, top + CAPTION_HEIGHT))
    return sheet


def _strip(video: Tensor) -> Tensor:
    """Frames side by side (H, F*W, 3), uint8, of a video (3, F, H, W)."""
    levels = ((video.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(2, 1, 3, 0).flatten(1, 2).contiguous()
