"""Samples in files: arrays and pictures, counted first and read when they are wanted."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.types import TensorType

if TYPE_CHECKING:
    from PIL.Image import Image

ARRAYS = (".npy", ".npz")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

MARGIN = 0.0625
"""Share of a picture that is cut off at each border before it is scaled: 224 of 256 pixels remain, as for ImageNet."""

Arrays = Sequence[NDArray[np.generic]]


@dataclass(frozen=True)
class Scaling:
    """How pictures become numbers: ``(value / 255 - mean) / std``, channel by channel or alike for all."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(number <= 0 for number in self.std):
            raise UsageError(f"--std {','.join(map(str, self.std))}: every number is above 0")


def files_in(folder: Path) -> list[Path]:
    """Arrays and pictures of a folder and of those in it, in the order of their paths; UsageError if there are none."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in (*ARRAYS, *PICTURES)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise UsageError(f"--data {folder}: holds no {', '.join((*ARRAYS, *PICTURES))}")
    return files


def count(file: Path, graph: Graph) -> int:
    """How many samples a file holds: one picture, one sample as an array, or several along a first axis of their own.

    Raises:
        UsageError: It is not such a file, or its arrays do not agree.
    """
    if file.suffix.lower() in PICTURES:
        return 1
    shapes = [array.shape for array in _open(file, graph)]
    if all(len(shape) == len(_type(value.type).shape) - 1 for shape, value in zip(shapes, graph.inputs, strict=True)):
        return 1
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        told = ", ".join(map(str, shapes))
        raise UsageError(f"{file}: its arrays are {told}; the first axis is samples, at least one and as many in each")
    return int(shapes[0][0])


def samples(
    file: Path, rows: Sequence[int], graph: Graph, scaling: Scaling | None
) -> Iterator[tuple[str, list[Tensor]]]:
    """Where each of these samples is, for messages, and its tensors, in the graph's order, without a batch axis.

    Raises:
        UsageError: The file cannot be read, or is a picture and the graph takes none, or there is no ``scaling``.
    """
    if file.suffix.lower() in PICTURES:
        yield str(file), [_picture(file, _picture_type(graph, file), scaling)]
        return
    arrays = _open(file, graph)
    for row in rows:
        where = f"{file}, sample {row}"
        yield (
            where,
            [
                _tensor(array[row] if array.ndim == len(_type(value.type).shape) else array, f"{where}, {value.name}")
                for array, value in zip(arrays, graph.inputs, strict=True)
            ],
        )


def _open(file: Path, graph: Graph) -> Arrays:
    """The file's arrays, in the order of the graph's inputs; those of ``.npy`` stay on disk until they are indexed."""
    try:
        if file.suffix.lower() == ".npy":
            return _for_inputs({"": np.load(file, mmap_mode="r", allow_pickle=False)}, graph, file)
        with np.load(file, allow_pickle=False) as found:
            return _for_inputs(found, graph, file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: cannot be read as arrays: {reason}") from error


def _for_inputs(found: Mapping[str, NDArray[np.generic]], graph: Graph, file: Path) -> Arrays:
    wanted = [value.name for value in graph.inputs]
    if len(found) == len(wanted) == 1:
        return list(found.values())
    if "" in found:
        raise UsageError(
            f"{file}: holds one array; the graph takes {', '.join(wanted)}: use .npz with arrays of these names"
        )
    if missing := [name for name in wanted if name not in found]:
        holds = ", ".join(found) or "nothing"
        raise UsageError(f"{file}: holds {holds}; the graph takes {', '.join(wanted)}: {missing[0]} is missing")
    return [found[name] for name in wanted]


def _tensor(array: NDArray[np.generic], where: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise UsageError(f"{where}: holds {array.dtype}, no numbers") from error


def _picture_type(graph: Graph, file: Path) -> tuple[int, int, int]:
    """Channels, height and width of the one input that pictures can be."""
    shapes = [_type(value.type).shape for value in graph.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or not all(isinstance(extent, int) for extent in shapes[0][1:]):
        told = ", ".join(str(value.type) for value in graph.inputs)
        raise UsageError(f"{file}: the graph takes {told}; pictures are for one input (batch, channels, height, width)")
    channels, height, width = (int(extent) for extent in shapes[0][1:])
    if channels not in (1, 3):
        raise UsageError(f"{file}: the graph takes {channels} channels; pictures have 1 or 3")
    return channels, height, width


def _picture(file: Path, extents: tuple[int, int, int], scaling: Scaling | None) -> Tensor:
    """A picture of the input's size as it is, the middle of any other, scaled bicubically."""
    from PIL import Image

    channels, height, width = extents
    if scaling is None:
        raise UsageError(
            f"{file}: say how the network reads pictures: --mean 0.5 --std 0.5 for numbers from -1 to 1, "
            "--mean 0 --std 1 for 0 to 1, or what it was trained with"
        )
    if not {len(scaling.mean), len(scaling.std)} <= {1, channels}:
        raise UsageError(f"--mean and --std have {len(scaling.mean)} and {len(scaling.std)} numbers; 1 or {channels}")
    try:
        with Image.open(file) as opened:
            fitted = _fitted(opened, "L" if channels == 1 else "RGB", (width, height), file)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: cannot be read as a picture: {reason}") from error
    pixels = torch.from_numpy(np.array(fitted)).reshape(height, width, channels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (scaling.mean, scaling.std))
    return (pixels - mean) / std


def _fitted(picture: Image, mode: str, size: tuple[int, int], file: Path) -> Image:
    from PIL import Image, ImageOps

    if picture.mode.startswith(("I", "F")):
        raise UsageError(f"{file}: has more than 8 bits a channel, of which Pillow keeps white; save it as .npy")
    converted = picture.convert(mode)
    return converted if converted.size == size else ImageOps.fit(converted, size, Image.Resampling.BICUBIC, MARGIN)


def _type(found: object) -> TensorType:
    return cast("TensorType", found)
