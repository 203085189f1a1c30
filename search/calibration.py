"""Between which numbers activations lie: measured on calibration data, call by call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.ir.errors import SpecError, UsageError
from intarsia.ir.execute import call
from intarsia.ir.program import Program, materialize
from intarsia.ir.spec import Spec, construct
from intarsia.passes.calibrate import places
from intarsia.search.progress import Progress, Silent
from intarsia.search.sensitivity import Batch

BINS = 4096
"""Of a histogram, on both sides of 0 together."""

Range = tuple[float, float]
"""The least and the largest number."""


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
    """The range that holds a share of all numbers, with as many left out on either side.

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
        return _Histogram(lambda seen: seen.percentile(self.keep / 100))


@dataclass(frozen=True)
class LeastError(Method):
    """The range on whose symmetric grid rounding and clipping change the numbers least, in the mean square.

    Attributes:
        bits: Of the grid.
    """

    name: ClassVar[str] = "mse"
    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; it is 2 to 16")

    def begin(self) -> Seen:
        """A histogram."""
        return _Histogram(lambda seen: seen.least_error(self.bits))


METHODS = {method.name: method for method in (MinMax, Percentile, LeastError)}


def find_method(text: str) -> Method:
    """The method that ``minmax``, ``percentile(keep=99.9)`` or ``mse(bits=4)`` stands for; SpecError if none."""
    spec = Spec.parse(text)
    if spec.name not in METHODS:
        raise SpecError(f"method {spec.name!r} is unknown. Known: {', '.join(METHODS)}")
    return construct(METHODS[spec.name], spec)


def calibrate(
    program: Program, batches: Iterable[Batch], method: Method, *, progress: Progress | None = None, total: int = 0
) -> dict[str, str]:
    """For each place of the pass ``calibrate`` its option, as ``range(low=-1.25, high=3.5)``.

    Args:
        program: The program, batch norms folded; it runs in eager PyTorch, node by node.
        batches: Inputs of calls, in the graph's order; taken one at a time.
        total: How many batches there are, for the progress bar.

    Raises:
        UsageError: No batch, or a number in a batch, or in what the network makes of it, is not finite.
    """
    told = Silent() if progress is None else progress
    wanted = places(program.graph)
    if not wanted:
        raise UsageError(f"graph {program.graph.name}: nothing to calibrate; it has no convolution and no linear layer")
    seen = {name: method.begin() for name in wanted}
    ready, count = materialize(program), 0
    told.start("calibration", total or None)
    for batch in batches:
        for name, tensor in _values(ready, batch):
            if name in seen:
                seen[name].take(_finite(tensor, name, count))
        count += 1
        told.advance()
    told.finish()
    if not count:
        raise UsageError("calibration data: there is none; give at least one batch")
    return {name: _option(kept.range()) for name, kept in seen.items()}


def warnings(options: dict[str, str]) -> tuple[str, ...]:
    """A line for each place that was zero throughout, which has no scale."""
    return tuple(
        f"%{place} was zero on all calibration data: a dead value; its layers can only be kept"
        for place, option in options.items()
        if option == _option((0.0, 0.0))
    )


def _option(found: Range) -> str:
    low, high = (float(f"{end:.7g}") for end in found)
    return str(Spec("range", {"low": low, "high": high}))


def _finite(tensor: Tensor, name: str, number: int) -> Tensor:
    numbers = tensor.detach().float().flatten()
    if not torch.isfinite(numbers).all():
        kind = "NaN" if torch.isnan(numbers).any() else "infinity"
        raise UsageError(f"calibration data, batch {number}: %{name} holds {kind}; leave that sample out, or mend it")
    return numbers


def _values(program: Program, batch: Batch) -> Iterator[tuple[str, Tensor]]:
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


class _Histogram(Seen):
    """Counts in equal bins from minus ``limit`` to ``limit``, which doubles when a larger number comes."""

    def __init__(self, ranged: Callable[[_Histogram], Range]) -> None:
        self.ranged = ranged
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.low, self.high = float("inf"), float("-inf")

    def take(self, numbers: Tensor) -> None:
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
        largest = max(abs(self.low), abs(self.high))
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            self._double()
        if self.limit > 0:
            self.counts += torch.histc(numbers, BINS, -self.limit, self.limit).double()

    def range(self) -> Range:
        return (self.low, self.high) if self.limit == 0.0 else self.ranged(self)

    def percentile(self, keep: float) -> Range:
        """The middle of the bins that hold this share of the numbers, inside of what was seen."""
        share = self.counts.cumsum(0) / self.counts.sum()
        beyond = (1 - keep) / 2
        first = int(torch.searchsorted(share, beyond, right=True))
        last = int(torch.searchsorted(share, 1 - beyond))
        edges = self._edges()
        low, high = float(edges[first]), float(edges[min(last, BINS - 1) + 1])
        return max(low, self.low), min(high, self.high)

    def least_error(self, bits: int) -> Range:
        """The ends of the symmetric grid of least squared error, inside of what was seen."""
        edges = self._edges()
        middles = (edges[1:] + edges[:-1]) / 2
        codes = 2 ** (bits - 1) - 1
        largest = max(abs(self.low), abs(self.high))
        tried = [largest * part / 100 for part in range(20, 101)]
        best = min(tried, key=lambda clip: self._error(middles, clip / codes, codes))
        return max(-best, self.low), min(best, self.high)

    def _error(self, middles: Tensor, scale: float, codes: int) -> float:
        """Squared error of a grid over the histogram; inside of a bin numbers are taken as spread evenly."""
        rounded = (middles / scale).round().clamp(-codes - 1, codes) * scale
        return float((self.counts * (rounded - middles).square()).sum())

    def _double(self) -> None:
        halved = self.counts.reshape(-1, 2).sum(1)
        quarter = BINS // 4
        self.counts = torch.cat([torch.zeros(quarter), halved, torch.zeros(quarter)]).double()
        self.limit *= 2

    def _edges(self) -> Tensor:
        return torch.linspace(-self.limit, self.limit, BINS + 1, dtype=torch.float64)
