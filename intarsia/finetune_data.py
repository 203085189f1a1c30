"""A user's data for fine-tuning: samples of files in memory, drawn anew each epoch, or calls that a function yields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from intarsia.calibration_data import from_function, one_call, read
from intarsia.calibration_files import Scaling
from intarsia.ir import registry
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.types import TensorType
from intarsia.search.finetune_loss import Call

EVERYTHING = 10**9
"""More samples than fit into memory: none is left out."""


@dataclass(frozen=True)
class Samples:
    """Samples along the first axis of each input, in the graph's order, and their classes where they are known."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over all numbers."""
        digest = sha256()
        for tensor in (*self.inputs, *([] if self.labels is None else [self.labels])):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    def taken(self, rows: Tensor) -> Samples:
        """Those of these rows."""
        inputs = tuple(tensor[rows] for tensor in self.inputs)
        return Samples(inputs, None if self.labels is None else self.labels[rows])

    def calls(self, rows: Tensor, each: int) -> Iterator[Call]:
        """Calls of ``each`` of these rows; what is left over is not used."""
        for start in range(0, len(rows) - each + 1, each):
            part = self.taken(rows[start : start + each])
            yield Call(part.inputs, part.labels)

    def epoch(self, number: int, *, each: int, seed: int) -> Iterator[Call]:
        """All samples in an order that seed and number decide."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return self.calls(torch.randperm(len(self), generator=generator), each)

    def split(self, share: float, *, seed: int) -> tuple[Samples, Samples]:
        """These without a share of them, and that share, drawn by the seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = round(share * len(self))
        return self.taken(order[count:].sort().values), self.taken(order[:count].sort().values)


def is_function(data: str) -> bool:
    """Whether ``data`` is ``loader.py:function`` rather than files."""
    return ".py:" in data


def read_samples(data: str, labels: Path | None, graph: Graph, scaling: Scaling | None, *, option: str) -> Samples:
    """All samples of a folder or file, as ``calibration_data.read`` takes it, with their labels in the same order.

    Args:
        option: What the labels are called in messages, such as ``--labels``.

    Raises:
        UsageError: There is no data, it does not fit the graph, or there are not as many labels.
    """
    calls = list(read(data, graph, limit=EVERYTHING, scaling=scaling))
    parts = list(zip(*calls, strict=True))
    if any(len({tuple(tensor.shape[1:]) for tensor in part}) > 1 for part in parts):
        raise UsageError(f"--data {data}: samples differ in extents; use loader.py:function, which yields whole calls")
    inputs = tuple(torch.cat(part) for part in parts)
    return Samples(inputs, None if labels is None else _labels(labels, len(inputs[0]), option))


def function_calls(data: str, graph: Graph) -> Callable[[int], Iterator[Call]]:
    """The calls of an epoch as a user's function yields them, which takes the epoch's number or nothing.

    What it yields is the inputs of a call in the graph's order, and labels (N) behind them where there are any.

    Raises:
        UsageError: There is no such function; later, what it yields is not what the graph takes.
    """
    found = cast("Callable[..., object]", registry.function_from_file(data, kind="data"))
    numbered = bool(inspect.signature(found).parameters)
    return lambda epoch: _function_calls(partial(found, epoch) if numbered else found, data, graph)


def samples_a_call(graph: Graph) -> int | None:
    """How many samples a call of the graph takes; None where it leaves that open."""
    first = {
        value.type.shape[0] if isinstance(value.type, TensorType) and value.type.shape else 0 for value in graph.inputs
    }
    found = first.pop()
    if first or found == 0:
        raise UsageError(f"graph {graph.name}: its inputs share no first axis; use loader.py:function for --data")
    return found if isinstance(found, int) else None


def _function_calls(function: Callable[[], object], data: str, graph: Graph) -> Iterator[Call]:
    count = len(graph.inputs)
    for number, one in enumerate(from_function(function, data)):
        parts: Sequence[object] = one if isinstance(one, tuple | list) else (one,)
        where = f"--data {data}, item {number}"
        labels = parts[count] if len(parts) == count + 1 else None
        if labels is not None and not isinstance(labels, Tensor):
            raise UsageError(f"{where}: its labels are {type(labels).__name__}; expected a tensor")
        yield Call(one_call(parts if labels is None else parts[:count], graph, where), labels)


def _labels(path: Path, count: int, option: str) -> Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{option} {path}: cannot be read as .npy: {' '.join(str(error).split())}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        told = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise UsageError(f"{option} {path}: holds {told}; expected one whole number a sample")
    if len(found) != count:
        raise UsageError(f"{option} {path}: has {len(found)} labels; there are {count} samples")
    return torch.from_numpy(found.astype(np.int64))
