"""A user's calibration data: a folder of arrays or pictures, one file of arrays, or a function of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intarsia.ir import registry
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES
from intarsia.ir.types import TensorType

ARRAYS = (".npy", ".npz")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scaling:
    """How pictures become numbers: ``(value / 255 - mean) / std``, channel by channel or alike for all."""

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if any(number <= 0 for number in self.std):
            raise UsageError(f"--std {','.join(map(str, self.std))}: every number is above 0")


def batches(data: str, graph: Graph, *, samples: int, scaling: Scaling) -> Iterator[Batch]:
    """Inputs of at most ``samples`` calls, in the graph's order.

    Args:
        data: A folder of ``.npy``, ``.npz`` or pictures, in the order of their names, one sample a file; one such file
            of arrays with samples along the first axis; or ``loader.py:function``, which yields tensors or tuples of
            them. Arrays of ``.npz`` are named after the graph's inputs.
        scaling: Of pictures, which are resized to the input's extents.

    Raises:
        UsageError: No data, or a file that does not fit; one line with the file.
    """
    if ".py:" in data:
        return islice(_from_function(data, graph), samples)
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*ARRAYS, *PICTURES))
        if not files:
            raise UsageError(f"--data {data}: holds no {', '.join((*ARRAYS, *PICTURES))}")
        return (_from_file(file, graph, scaling) for file in files[:samples])
    if path.suffix.lower() not in ARRAYS:
        raise UsageError(f"--data {data}: expected a folder, an .npy or .npz file, or loader.py:function")
    return islice(_rows(path, graph), samples)


def _from_function(data: str, graph: Graph) -> Iterator[Batch]:
    found = registry.function_from_file(data, kind="data")
    yielded = found()
    if not isinstance(yielded, Iterable):
        raise UsageError(f"--data {data}: it returns {type(yielded).__name__}; expected an iterable of tensors")
    for number, one in enumerate(yielded):
        parts = one if isinstance(one, tuple | list) else (one,)
        yield _fitted([torch.as_tensor(part) for part in parts], graph, f"--data {data}, item {number}")


def _from_file(file: Path, graph: Graph, scaling: Scaling) -> Batch:
    """One file as one sample."""
    if file.suffix.lower() in PICTURES:
        return _fitted([_picture(file, _only(graph, file), scaling)], graph, str(file))
    return _fitted([torch.from_numpy(array) for array in _arrays(file, graph)], graph, str(file))


def _rows(file: Path, graph: Graph) -> Iterator[Batch]:
    """One file whose first axis is samples, each given to the graph as a batch of one."""
    arrays = _arrays(file, graph)
    if len({array.shape[:1] for array in arrays}) != 1 or not arrays[0].ndim or not arrays[0].shape[0]:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UsageError(f"{file}: its arrays are {shapes}; the first axis is samples, as many in each")
    for number in range(arrays[0].shape[0]):
        yield _fitted([torch.from_numpy(array[number]) for array in arrays], graph, f"{file}, sample {number}")


def _arrays(file: Path, graph: Graph) -> list[NDArray[np.generic]]:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as arrays: {error}") from error
    if isinstance(found, np.ndarray):
        return [found]
    with found:
        missing = [value.name for value in graph.inputs if value.name not in found.files]
        if missing:
            raise UsageError(
                f"{file}: holds {', '.join(found.files) or 'nothing'}; the graph's {missing[0]!r} is missing"
            )
        return [found[value.name] for value in graph.inputs]


def _only(graph: Graph, file: Path) -> TensorType:
    """The one input that pictures can be."""
    types = [cast("TensorType", value.type) for value in graph.inputs]
    if len(types) != 1 or len(types[0].shape) != 4 or not all(isinstance(extent, int) for extent in types[0].shape[1:]):
        told = ", ".join(map(str, types))
        raise UsageError(f"{file}: the graph takes {told}; pictures are for one input (batch, channels, height, width)")
    return types[0]


def _picture(file: Path, type_: TensorType, scaling: Scaling) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    channels, height, width = (cast("int", extent) for extent in type_.shape[1:])
    if channels not in (1, 3):
        raise UsageError(f"{file}: the graph takes {channels} channels; pictures have 1 or 3")
    try:
        with Image.open(file) as opened:
            resized = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"{file}: cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(np.array(resized)).reshape(height, width, channels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (scaling.mean, scaling.std))
    if not {len(scaling.mean), len(scaling.std)} <= {1, channels}:
        raise UsageError(f"--mean and --std have {len(scaling.mean)} and {len(scaling.std)} numbers; 1 or {channels}")
    return (pixels - mean) / std


def _fitted(parts: list[Tensor], graph: Graph, where: str) -> Batch:
    """The tensors in the types of the graph's inputs, a batch axis of one put in front where only that is missing."""
    if len(parts) != len(graph.inputs):
        raise UsageError(f"{where}: holds {len(parts)} arrays; the graph takes {len(graph.inputs)} inputs")
    found = []
    for part, value in zip(parts, graph.inputs, strict=True):
        type_ = cast("TensorType", value.type)
        whole = part[None] if part.ndim == len(type_.shape) - 1 else part
        fixed = zip(whole.shape, type_.shape, strict=False)
        if whole.ndim != len(type_.shape) or any(isinstance(dim, int) and extent != dim for extent, dim in fixed):
            raise UsageError(f"{where}: {value.name} is {tuple(part.shape)}; the graph takes {type_}")
        found.append(whole.to(DTYPES[type_.dtype]))
    return tuple(found)
