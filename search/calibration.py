"""Between which numbers activations lie: measured on calibration data, call by call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.ir.errors import SpecError, UsageError
from intarsia.ir.execute import call
from intarsia.ir.graph import Node
from intarsia.ir.program import Program, materialize
from intarsia.ir.spec import Spec, construct
from intarsia.passes.calibrate import places, range_of
from intarsia.passes.quantize_integer_grids import Range, why_no_grid
from intarsia.passes.quantize_integer_roles import LAYERS
from intarsia.search.histogram import Histogram
from intarsia.search.progress import Progress, Silent
from intarsia.search.sensitivity import Batch

SHOWN = 6
"""Dead channels of a layer that a warning lists."""


@dataclass(frozen=True)
class Method(ABC):
    """How numbers that were seen become a range."""

    name: ClassVar[str]

    @abstractmethod
    def begin(self) -> Seen:
        """What takes in one value, batch after batch."""


class Seen(ABC):
    """What is kept of one value."""

    @abstractmethod
    def take(self, numbers: Tensor) -> None:
        """Take in the numbers of one batch, finite and in f32."""

    @abstractmethod
    def range(self) -> Range:
        """The range of all that was taken in."""


@dataclass(frozen=True)
class MinMax(Method):
    """The least and the largest number of a batch, in a moving average over batches.

    Source: HAWQ-V3 (arXiv 2011.10680), appendix H, and its code (``act_range_momentum``, 0.99).

    Attributes:
        momentum: Share of what was known; the first batch counts alone.
        widest: Whether the least and the largest number of all batches is taken instead.
    """

    name: ClassVar[str] = "minmax"
    momentum: float = 0.99
    widest: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it is at least 0 and below 1")

    def begin(self) -> Seen:
        """Two numbers."""
        return _Ends(self.momentum, self.widest)


@dataclass(frozen=True)
class Percentile(Method):
    """The range that holds a share of all numbers, at most as many left out on either side.

    Attributes:
        keep: Percent of the numbers that lie inside.
    """

    name: ClassVar[str] = "percentile"
    keep: float = 99.99

    def __post_init__(self) -> None:
        if not 50 <= self.keep <= 100:
            raise ValueError(f"keep is {self.keep}; it is a percentage from 50 to 100")

    def begin(self) -> Seen:
        """A histogram."""
        return _Counted(lambda seen: seen.percentile(self.keep / 100))


@dataclass(frozen=True)
class LeastError(Method):
    """The range on whose grid rounding and clipping change the numbers least, in the mean square.

    Attributes:
        bits: Of the grid, 4 or 8, as ``quantize-integer`` makes it.
    """

    name: ClassVar[str] = "mse"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; it is 4 or 8")

    def begin(self) -> Seen:
        """A histogram."""
        return _Counted(lambda seen: seen.least_error(self.bits))


METHODS = {method.name: method for method in (MinMax, Percentile, LeastError)}


def find_method(text: str) -> Method:
    """The method that ``minmax``, ``percentile(keep=99.9)`` or ``mse(bits=4)`` stands for; SpecError if none."""
    spec = Spec.parse(text)
    if spec.name not in METHODS:
        raise SpecError(f"method {spec.name!r} is unknown. Known: {', '.join(METHODS)}")
    return construct(METHODS[spec.name], spec)


def calibrate(
    program: Program,
    batches: Iterable[Batch],
    method: Method,
    *,
    progress: Progress | None = None,
    total: int | None = None,
) -> dict[str, str]:
    """For each place of the pass ``calibrate`` its option, as ``range(low=-1.25, high=3.5)``.

    Args:
        program: The program, batch norms folded; it runs in eager PyTorch, node by node.
        batches: Inputs of calls, in the graph's order; taken one at a time.
        total: How many batches there are, where that is known; for the progress bar.

    Raises:
        UsageError: No batch, or a number in a batch, or in what the network makes of it, is not finite.
    """
    told = Silent() if progress is None else progress
    wanted = places(program.graph)
    if not wanted:
        raise UsageError(f"graph {program.graph.name}: nothing to calibrate; it has no convolution and no linear layer")
    seen = {name: method.begin() for name in wanted}
    ready, count = materialize(program), 0
    told.start("calibration", total)
    for batch in batches:
        for name, tensor in tensors_of(ready, batch):
            if name in seen:
                seen[name].take(_finite(tensor, name, count))
        count += 1
        told.advance()
    told.finish()
    if not count:
        raise UsageError("calibration data: there is none; give at least one batch")
    return {name: _option(kept.range()) for name, kept in seen.items()}


def warnings(options: Mapping[str, str], program: Program) -> tuple[str, ...]:
    """A line for each place whose range has no grid, such as one of 0, and for each layer with dead channels.

    Those are channels whose weights are all zero; ``program`` is the one that was calibrated.
    """
    ready = materialize(program)
    lines = [why_no_grid(place, range_of(option)) for place, option in options.items()]
    lines += [_dead_channels(node, ready) for node in ready.graph.find(*LAYERS)]
    return tuple(line for line in lines if line)


def tensors_of(program: Program, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one call, by name, each let go after its last use."""
    graph = program.graph
    table: dict[str, Any] = dict(program.weights)
    last = {name: node for node in graph.nodes for name in node.inputs}
    for value, tensor in zip(graph.inputs, batch, strict=True):
        table[value.name] = tensor
        yield value.name, tensor
    with torch.no_grad():
        for node in graph.nodes:
            for value, found in zip(node.outputs, call(node, table), strict=True):
                table[value.name] = found
                if isinstance(found, Tensor):
                    yield value.name, found
            for name in set(node.inputs):
                if last[name] is node and name not in program.weights:
                    table.pop(name, None)


def _dead_channels(layer: Node, program: Program) -> str | None:
    weight = program.weights.get(layer.ref("weight"))
    if weight is None:
        return None
    found = (weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()
    if not found:
        return None
    listed = ", ".join(map(str, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
    return f"%{layer.name}: the weights of {len(found)} of {len(weight)} channels are all zero: dead channels {listed}"


def _option(found: Range) -> str:
    low, high = (float(f"{end:.7g}") for end in found)
    return str(Spec("range", {"low": low, "high": high}))


def _finite(tensor: Tensor, name: str, number: int) -> Tensor:
    numbers = tensor.detach().float().flatten()
    if not torch.isfinite(numbers).all():
        kind = "NaN" if torch.isnan(numbers).any() else "infinity"
        raise UsageError(f"calibration data, batch {number}: %{name} holds {kind}; leave that sample out, or mend it")
    return numbers


class _Ends(Seen):
    def __init__(self, momentum: float, widest: bool) -> None:
        self.momentum, self.widest = momentum, widest
        self.ends: Range | None = None

    def take(self, numbers: Tensor) -> None:
        low, high = float(numbers.min()), float(numbers.max())
        if self.ends is None:
            self.ends = low, high
        elif self.widest:
            self.ends = min(low, self.ends[0]), max(high, self.ends[1])
        else:
            known = self.momentum
            self.ends = known * self.ends[0] + (1 - known) * low, known * self.ends[1] + (1 - known) * high

    def range(self) -> Range:
        assert self.ends is not None
        return self.ends


class _Counted(Seen):
    def __init__(self, ranged: Callable[[Histogram], Range]) -> None:
        self.ranged, self.counts = ranged, Histogram()

    def take(self, numbers: Tensor) -> None:
        self.counts.take(numbers)

    def range(self) -> Range:
        return self.ranged(self.counts)
