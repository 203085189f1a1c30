"""Pictures as networks of ImageNet read them, and the twenty that come with the package foolbox."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from intarsia.ir.errors import MissingEnvironment

if TYPE_CHECKING:
    from PIL.Image import Image

SHARE = 0.875  # of the shorter side that is kept: 224 of 256 pixels


def square(picture: "Image", side: int) -> Tensor:
    """The middle of a picture as pixels (3, side, side), uint8, scaled bicubically."""
    import numpy
    from PIL import Image

    width, height = picture.size
    kept = min(width, height) * SHARE
    left, top = (width - kept) / 2, (height - kept) / 2
    box = (left, top, left + kept, top + kept)
    scaled = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(numpy.array(scaled)).permute(2, 0, 1).contiguous()


def squares(pictures: Sequence["Image"], side: int) -> Tensor:
    """Pixels (N, 3, side, side), uint8, of the middles of the pictures."""
    return torch.stack([square(picture, side) for picture in pictures])


def normalised(pixels: Tensor, *, mean: float, deviation: float) -> Tensor:
    """(pixels - mean) / deviation as f32, both in 0 to 255."""
    return (pixels.float() - mean) / deviation


def foolbox_pictures() -> tuple[list["Image"], Tensor]:
    """Twenty pictures of ImageNet and their labels (20), int64, as the installed package foolbox (MIT) holds them.

    Too few to give an accuracy, enough to see that a network still recognises things. They are ImageNet's, not ours to
    ship. Raises MissingEnvironment, with the command to run, where the package is not installed.
    """
    from PIL import Image

    spec = find_spec("foolbox")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    files = sorted(folder.glob("imagenet_*.jpg")) if folder else []
    if not files:
        raise MissingEnvironment("twenty pictures of ImageNet are part of a package; pip install --no-deps foolbox")
    pictures = [Image.open(file).convert("RGB") for file in files]
    return pictures, torch.tensor([int(file.stem.rpartition("_")[2]) for file in files])
