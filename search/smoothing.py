"""How to change the channels that linear layers read so that rounding costs least: measured on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from intarsia.ir.errors import UsageError
from intarsia.ir.program import Program, materialize
from intarsia.kernels.fake_quantize.reference import fake_quantize, fake_quantize_channels
from intarsia.passes.quantize_integer_grids import grid, why_no_grid
from intarsia.passes.quantize_integer_layers import BITS
from intarsia.passes.smooth_linear import KEEP, Place, places
from intarsia.passes.smooth_linear_maps import Factors, Map, Rotation
from intarsia.search.calibration import Method, MinMax, tensors_of
from intarsia.search.progress import Progress, Silent
from intarsia.search.sensitivity import Batch

ALPHAS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of an outlier that are moved into the weights. SmoothQuant takes 0.5 for most networks, 0.75 for others."""

ROWS = 2048
"""Rows of each value on which layers are compared, of all batches together."""

SHIFTED = "shifted"

WORTH = 0.6
"""A shift is made where it leaves at most this share of the error that is left without: it costs one more call."""

GAIN = 0.95
"""A change is made where it leaves at most this share of the error; a tie is not worth a call."""


@dataclass(frozen=True)
class Smoothing:
    """What to do at each place of the pass ``smooth-linear``.

    Attributes:
        chosen: The pass's options, by place; a place that is best left alone is absent.
        best: What was chosen in words: ``alpha=0.5``, ``rotate(block=64)`` or ``keep``.
        errors: By place, for each thing tried, the squared error that rounding makes in the results of the layers that
            read it, relative to their squares.
    """

    chosen: Mapping[str, str]
    best: Mapping[str, str]
    errors: Mapping[str, Mapping[str, float]]


def smooth(
    program: Program,
    batches: Iterable[Batch],
    *,
    bits: str | Mapping[str, str] = "w8a8",
    method: Method | None = None,
    alphas: Sequence[float] = ALPHAS,
    blocks: Sequence[int] = (),
    progress: Progress | None = None,
    total: int | None = None,
) -> Smoothing:
    """For each value that linear layers read the factors, or the rotation, with which rounding changes them least.

    A channel's factor is max|X|**alpha / max|W|**(1 - alpha), X over all batches, W over all layers that read it; alpha
    is searched for each value by the error of its layers' results, as is whether a rotation does better. The same data
    gives the same answer. Sources: SmoothQuant (arXiv 2211.10438), equation 4; AWQ (arXiv 2306.00978), section 3.2.

    Args:
        program: The program as ``smooth-linear`` will see it; it runs in eager PyTorch, node by node.
        batches: Inputs of calls, in the graph's order; taken one at a time.
        bits: ``w8a8`` and the like, for all layers or by layer; layers left out are rounded to ``w8a8``.
        method: How ranges will be found (``minmax(widest=True)`` unless given), as ``calibrate`` takes it.
        blocks: Blocks of rotations to try; such a rotation is a small product at run time where it cannot be folded.
        total: How many batches there are, where that is known; for the progress bar.

    Raises:
        UsageError: No batch, no linear layer, or a number that is not finite.
    """
    told = Silent() if progress is None else progress
    ready = materialize(program)
    wanted = {place.value: place for place in places(program.graph)}
    if not wanted:
        raise UsageError(f"graph {program.graph.name}: nothing to smooth; it has no linear layer")
    seen = _seen(ready, wanted, batches, told, total)
    told.start("smoothing", len(wanted))
    errors: dict[str, dict[str, float]] = {}
    chosen: dict[str, str] = {}
    best: dict[str, str] = {}
    for place in wanted.values():
        trial = _Trial(place, ready, seen[place.value], bits, method or MinMax(widest=True))
        maps = trial.maps(alphas, blocks)
        errors[place.value] = {name: trial.error(map_) for name, map_ in maps.items()}
        found = _least(errors[place.value])
        best[place.value] = found
        if (map_ := maps[found]) is not None:
            chosen[place.value] = str(map_)
        told.advance(note=f"{place.value}: {found}")
    told.finish()
    return Smoothing(chosen, best, errors)


@dataclass
class _Seen:
    """What is kept of a value: the least and the largest number of each channel (C), and some rows (R, C)."""

    low: Tensor | None = None
    high: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def take(self, rows: Tensor) -> None:
        """Take in rows (N, C) of one batch."""
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.rows.append(_spread(rows, ROWS))
        if len(self.rows) > 1:
            self.rows = [_spread(part, max(1, ROWS // len(self.rows))) for part in self.rows]

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest numbers."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high


@dataclass(frozen=True)
class _Trial:
    """The layers that read one value, and what they read."""

    place: Place
    program: Program
    seen: _Seen
    bits: str | Mapping[str, str]
    method: Method

    def maps(self, alphas: Sequence[float], blocks: Sequence[int]) -> dict[str, Map | None]:
        """What is tried, by name; None leaves things as they are."""
        low, high = self.seen.ends()
        weight = torch.stack([found.abs().amax(0) for found in self._weights()]).amax(0).log2()
        made: dict[str, Map | None] = {KEEP: None}
        for alpha in alphas:
            exponents = _exponents(torch.maximum(high, -low).log2(), weight, alpha)
            made[f"alpha={alpha}"] = Factors.nearest(exponents.tolist())
            exponents = _exponents(((high - low) / 2).log2(), weight, alpha)
            factors = torch.exp2(torch.tensor(Factors.nearest(exponents.tolist()).exponents))
            middles = (low + high) / 2 / factors
            made[f"alpha={alpha}, {SHIFTED}"] = Factors.nearest(exponents.tolist(), middles.tolist())
        rotations = (Rotation(block) for block in blocks if self.place.channels % block == 0)
        return made | {str(rotation): rotation for rotation in rotations}

    def error(self, map_: Map | None) -> float:
        """Squared error of the layers' results with all that is rounded, relative to their squares, summed."""
        rows = torch.cat(self.seen.rows)
        changed = _applied(map_, rows, inverse=False)
        taken = self.method.begin()
        taken.take(changed.flatten())
        if why_no_grid(self.place.value, taken.range()):
            return 0.0
        total = 0.0
        for layer, weight in zip(self.place.layers, self._weights(), strict=True):
            option = self.bits if isinstance(self.bits, str) else self.bits.get(layer, "w8a8")
            weight_bits, input_bits = BITS.get(option, BITS["w8a8"])
            onto = grid(taken.range(), input_bits)
            rounded = fake_quantize(changed, onto.scale, onto.low, onto.high)
            columns = _applied(map_, weight, inverse=True)
            exact = linear(changed, columns)
            found = linear(rounded, fake_quantize_channels(columns, weight_bits))
            total += float((found - exact).square().sum() / linear(rows, weight).square().sum().clamp_min(1e-30))
        return total

    def _weights(self) -> list[Tensor]:
        nodes = (self.program.graph.producers[layer] for layer in self.place.layers)
        return [self.program.weights[node.ref("weight")].float() for node in nodes]


def _applied(map_: Map | None, tensor: Tensor, *, inverse: bool) -> Tensor:
    """The last axis changed as a layer's input, or (``inverse``) as its weight."""
    match map_:
        case None:
            return tensor
        case Factors():
            factors = torch.exp2(torch.tensor(map_.exponents))
            if inverse:
                return tensor * factors
            return tensor / factors - torch.tensor(map_.offsets) if map_.shifts else tensor / factors
        case Rotation(block):
            matrix = torch.ones(1, 1)
            while len(matrix) < block:
                matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
            rotated: Tensor = tensor.unflatten(-1, (-1, block)) @ (matrix * block**-0.5)
            return rotated.flatten(-2)


def _seen(
    ready: Program, wanted: Mapping[str, Place], batches: Iterable[Batch], told: Progress, total: int | None
) -> dict[str, _Seen]:
    """What all batches make of the values."""
    seen = {name: _Seen() for name in wanted}
    count = 0
    told.start("magnitudes", total)
    for batch in batches:
        for name, tensor in tensors_of(ready, batch):
            if name not in seen:
                continue
            rows = tensor.detach().float().flatten(0, -2)
            if not torch.isfinite(rows).all():
                raise UsageError(f"calibration data, batch {count}: %{name} is not finite; leave that sample out")
            seen[name].take(rows)
        count += 1
        told.advance()
    told.finish()
    if not count:
        raise UsageError("calibration data: there is none; give at least one batch")
    return seen


def _spread(rows: Tensor, most: int) -> Tensor:
    """Of rows (N, C) at most so many, evenly spread."""
    if len(rows) <= most:
        return rows.clone()
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


def _exponents(value: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Binary logarithms of factors of mean 0; 0 for a channel whose values or weights are all zero."""
    known = torch.isfinite(value) & torch.isfinite(weight)
    exponents = alpha * value - (1 - alpha) * weight
    mean = exponents[known].mean() if bool(known.any()) else 0.0
    return torch.where(known, exponents - mean, 0.0)


def _least(errors: Mapping[str, float]) -> str:
    """What leaves the least error; less of a change unless the gain is worth it."""
    plain = {name: error for name, error in errors.items() if not name.endswith(SHIFTED)}
    found, shifted = min(plain, key=plain.__getitem__), min(errors, key=errors.__getitem__)
    if errors[shifted] <= WORTH * errors[found]:
        found = shifted
    return found if errors[found] <= GAIN * errors[KEEP] and errors[KEEP] > 0 else KEEP
