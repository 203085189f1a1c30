"""A user's calibration data as inputs of calls: from a folder, one file of arrays, or a function of theirs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from intarsia.calibration_files import ARRAYS, Scaling, count, files_in, samples
from intarsia.ir import registry
from intarsia.ir.errors import InvalidGraph, UsageError
from intarsia.ir.graph import Graph, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.sizes import Dim, names, solve
from intarsia.ir.types import TensorType
from intarsia.passes.calibrate import places

SAMPLES_A_CALL = 16
"""Samples of one call where the graph leaves their number open."""

Batch = tuple[Tensor, ...]
Item = tuple[str, Sequence[Tensor]]
"""Where a sample or a call comes from, for messages, and its tensors."""


@dataclass(frozen=True)
class Batches:
    """Inputs of calls, in the graph's order, read one call at a time; UsageError for data that does not fit.

    Attributes:
        total: How many calls there are; None where a function tells only as it goes.
    """

    total: int | None
    made: Callable[[], Iterator[Batch]] = field(repr=False)

    def __iter__(self) -> Iterator[Batch]:
        return self.made()


def read(data: str, graph: Graph, *, limit: int, seed: int = 0, scaling: Scaling | None = None) -> Batches:
    """At most ``limit`` samples as inputs of calls, as many a call as the graph takes.

    Args:
        data: A folder of ``.npy``, ``.npz`` and pictures; one ``.npy`` or ``.npz`` with samples along the first axis,
            named after the graph's inputs where these are several; or ``loader.py:function``, which takes nothing and
            yields the inputs of one call after the other, a tensor or a tuple of them.
        limit: Of more samples in files, so many are drawn; of a function the first are taken.
        seed: Of the draw; those that are drawn stay in the order of files and rows.
        scaling: Of pictures, which need one.

    Raises:
        UsageError: There is no data, or it does not fit; one line with the file.
    """
    if ".py:" in data:
        each = max(1, _samples_a_call(graph)[0])
        calls = max(1, limit // each)
        return Batches(None, lambda: _varied(islice(_yielded(data, graph), calls), data))
    path = Path(data)
    if not path.exists():
        raise UsageError(f"--data {data}: there is no such file or folder")
    if not path.is_dir() and path.suffix.lower() not in ARRAYS:
        raise UsageError(f"--data {data}: expected a folder, an .npy or .npz file, or loader.py:function")
    least, most = _samples_a_call(graph)
    if not most:
        told = ", ".join(f"%{value.name} {value.type}" for value in graph.inputs)
        raise UsageError(f"--data {data}: {told}: first axes that differ are no samples; use loader.py:function")
    files = files_in(path) if path.is_dir() else [path]
    rows = [(file, row) for file in files for row in range(count(file, graph))]
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(limit, len(rows))))
    whole, rest = divmod(len(drawn), most)
    calls, taken = (whole + 1, len(drawn)) if rest >= least else (whole, whole * most)
    if not calls:
        raise UsageError(f"--data {data}: {len(drawn)} samples to take; one call of {graph.name} takes {least}")
    chosen = [rows[index] for index in drawn[:taken]]
    return Batches(calls, lambda: _varied(_stacked(_items(chosen, graph, scaling), graph, most), data))


def _samples_a_call(graph: Graph) -> tuple[int, int]:
    """How few and how many samples one call takes, by the first axis of all inputs; 0 where they do not share one."""
    first = {_type(value).shape[:1] for value in graph.inputs}
    if len(first) != 1 or not (shape := first.pop()):
        return 0, 0
    if isinstance(shape[0], int):
        return shape[0], shape[0]
    size = next((size for size in graph.sizes if size.name == shape[0]), None)
    if size is None:
        return 0, 0
    return size.minimum, max(size.minimum, min(SAMPLES_A_CALL, size.maximum or SAMPLES_A_CALL))


def _items(chosen: Sequence[tuple[Path, int]], graph: Graph, scaling: Scaling | None) -> Iterator[Item]:
    """The chosen samples, each file opened once."""
    by_file: dict[Path, list[int]] = {}
    for file, row in chosen:
        by_file.setdefault(file, []).append(row)
    for file, rows in by_file.items():
        yield from samples(file, rows, graph, scaling)


def _stacked(items: Iterator[Item], graph: Graph, each: int) -> Iterator[Batch]:
    """Calls of ``each`` samples; the last may have fewer."""
    while group := list(islice(items, each)):
        rows = [_checked(tensors, graph, where, skipped=1) for where, tensors in group]
        for (where, _), row in zip(group, rows, strict=True):
            if [part.shape for part in row] != [part.shape for part in rows[0]]:
                raise UsageError(f"{where}: differs in extents from {group[0][0]}, which is in the same call")
        yield _sized(tuple(map(torch.stack, zip(*rows, strict=True))), graph, group[0][0])


def _yielded(data: str, graph: Graph) -> Iterator[Batch]:
    """Calls as a user's function gives them."""
    found = registry.function_from_file(data, kind="data")
    for number, one in enumerate(from_function(found, data)):
        yield one_call(one if isinstance(one, tuple | list) else (one,), graph, f"--data {data}, item {number}")


def one_call(parts: Sequence[object], graph: Graph, where: str) -> Batch:
    """The inputs of one call as a user gives them, a first axis of 1 put in front where only that is missing.

    Raises:
        UsageError: They are not what the graph takes; one line that begins with ``where``.
    """
    if not all(isinstance(part, Tensor) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UsageError(f"{where}: is {kinds}; expected a tensor, or a tuple of tensors")
    if len(parts) != len(graph.inputs):
        raise UsageError(f"{where}: has {len(parts)} tensors; the graph takes {len(graph.inputs)}")
    whole = [
        part[None] if part.ndim == len(_type(value).shape) - 1 else part
        for part, value in zip(cast("Sequence[Tensor]", parts), graph.inputs, strict=True)
    ]
    return _sized(_checked(whole, graph, where, skipped=0), graph, where)


def from_function(function: Callable[[], object], data: str) -> Iterator[object]:
    """What a user's function gives, one item after the other; UsageError for whatever it raises."""
    try:
        found = function()
        if not isinstance(found, Iterable):
            raise UsageError(f"--data {data}: it returns {type(found).__name__}; expected an iterable of tensors")
        yield from found
    except UsageError:
        raise
    except Exception as error:  # the function is the user's own, and may raise anything
        reason = " ".join(str(error).split())
        raise UsageError(f"--data {data}: it raised {type(error).__name__}: {reason}") from error


def _checked(tensors: Sequence[Tensor], graph: Graph, where: str, *, skipped: int) -> Batch:
    """The tensors in the inputs' element types, their extents being the inputs' without the first ``skipped``."""
    found = []
    for tensor, value in zip(tensors, graph.inputs, strict=True):
        type_, dtype = _type(value), DTYPES[_type(value).dtype]
        wanted = type_.shape[skipped:]
        fits = len(wanted) == tensor.ndim and all(
            extent == dim if isinstance(dim, int) else extent > 0
            for extent, dim in zip(tensor.shape, wanted, strict=True)
        )
        if not fits:
            raise UsageError(f"{where}: {value.name} is {tuple(tensor.shape)}; the graph takes {type_}")
        if tensor.is_floating_point() != dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"{where}: {value.name} holds {kind}; the graph takes {type_}, as the network reads it")
        if torch.isnan(tensor).any() or (torch.isinf(tensor).any() and value.name in places(graph)):
            kind = "NaN" if torch.isnan(tensor).any() else "infinity"
            raise UsageError(f"{where}: {value.name} holds {kind}; leave that sample out, or mend it")
        found.append(tensor.detach().to("cpu", dtype))
    return tuple(found)


def _sized(batch: Batch, graph: Graph, where: str) -> Batch:
    """The inputs of a call; UsageError where no sizes of the graph give these extents."""
    extents: dict[Dim, int] = {}
    for tensor, value in zip(batch, graph.inputs, strict=True):
        for extent, dim in zip(tensor.shape, _type(value).shape, strict=True):
            if names(dim) and extents.setdefault(dim, extent) != extent:
                raise UsageError(f"{where}: {dim} is {extents[dim]} and {extent}; one call has one {dim}")
    try:
        found = solve(extents)
    except InvalidGraph as error:
        raise UsageError(f"{where}: {error}") from error
    for size in graph.sizes:
        if size.name in found and not size.minimum <= found[size.name] <= (size.maximum or found[size.name]):
            raise UsageError(f"{where}: {size.name} is {found[size.name]}; the graph takes {size}")
    return batch


def _varied(batches: Iterator[Batch], data: str) -> Iterator[Batch]:
    """The batches; UsageError behind the last one if all numbers of all of them were the same."""
    seen: set[float] = set()
    for batch in batches:
        for tensor in batch if len(seen) < 2 else ():
            if tensor.is_floating_point() and tensor.numel() > 1:
                seen |= {float(tensor.min()), float(tensor.max())}
        yield batch
    if len(seen) == 1:
        raise UsageError(f"--data {data}: every number of it is {seen.pop()}; give samples like those of its use")


def _type(value: Value) -> TensorType:
    return cast("TensorType", value.type)
