"""Spread outliers of the channels that linear layers read over all channels, or move them into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from intarsia.ir.errors import PlanError, SpecError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.program import split_constant
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.smooth_linear_maps import Factors, Map, Rotation, map_of
from intarsia.passes.smooth_linear_moves import Rewriting

LAYER = "aten.linear"
KEEP = "keep"


@dataclass(frozen=True)
class SmoothLinear(Pass):
    """Change what linear layers read and their weights by the same factors, so that rounding both costs less.

        %n: f32[N, 64] = aten.layer_norm(input=%h, normalized_shape=[64], weight=%g, bias=%b, ...)
        %q: f32[N, 64] = aten.linear(input=%n, weight=%to_q)
        %k: f32[N, 64] = aten.linear(input=%n, weight=%to_k)

    becomes, where ``smooth(factors='ghf...')`` is chosen at ``n``, a letter for the factor of each channel,

        %n.rows: f32[64] = aten.mul.Tensor(self=%g, other=%smooth.inverses)                and the same for %b
        %n: f32[N, 64] = aten.layer_norm(input=%h, normalized_shape=[64], weight=%n.rows, bias=%n.rows_, ...)
        %q.columns: f32[64, 64] = aten.mul.Tensor(self=%to_q, other=%smooth.factors)       and the same for %to_k
        %q: f32[N, 64] = aten.linear(input=%n, weight=%q.columns)
        %k: f32[N, 64] = aten.linear(input=%n, weight=%k.columns)

    and ``rotate(block=64)`` multiplies neighbouring channels and the weight's columns by a Hadamard matrix, which is
    its own inverse. The input's side goes where it costs nothing: into the affine of a norm, the rows of a linear layer
    (through attention, as far as heads allow), a scale and shift of few numbers; where there is none of these it is one
    multiplication of the input. ``smooth(factors='...', shifts='...', unit=0.01)`` also subtracts a number from each
    channel, which the bias adds again: grids are symmetric, and what a GELU gives is not. ``search.smoothing`` finds
    factors and shifts.

    Sources: SmoothQuant (arXiv 2211.10438), section 4; QuaRot (arXiv 2404.00456), section 4; Outlier Suppression+
    (arXiv 2304.09145), section 3, for the shifts.

    Attributes:
        block: Channels that a rotation offered mixes, at most; fewer where their number is no multiple.
    """

    name: ClassVar[str] = "smooth-linear"
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"block is {self.block}; it is a power of two, 2 or more")

    def choices(self, graph: Graph, target: Target) -> Choices:
        """At each value that linear layers read ``keep`` and a rotation; other blocks and factors are taken too."""
        found: dict[str, tuple[str, ...]] = {}
        for place in places(graph):
            block = _largest_block(place.channels, self.block)
            found[place.value] = (KEEP, str(Rotation(block))) if block > 1 else (KEEP,)
        return found

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Values that stay as they are, each with the reason."""
        return _refused(graph)

    def unlisted(self, graph: Graph, target: Target, chosen: Chosen) -> dict[str, str]:
        """Options that are none, or of another number of channels."""
        channels = {place.value: place.channels for place in places(graph)}
        reasons = {place: _why_not(option, channels[place]) for place, option in chosen.items()}
        return {place: reason for place, reason in reasons.items() if reason}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with the chosen inputs changed; PlanError for a place or an option that is none."""
        wanted = {place: option for place, option in chosen.items() if option != KEEP}
        if not wanted:
            return graph
        known = {place.value: place for place in places(graph)}
        maps: dict[str, Map] = {}
        for value, option in wanted.items():
            if value not in known:
                why = _refused(graph).get(value, "no linear layer reads it")
                raise PlanError(f"{self.name}: nothing to choose at %{value}; {why}")
            if reason := _why_not(option, known[value].channels):
                raise PlanError(f"{self.name}: %{value}: {reason}")
            maps[value] = map_of(option)
        rewriting = Rewriting(graph)
        for value, map_ in maps.items():
            rewriting.change(value, known[value].layers, map_)
        return rewriting.graph()


@dataclass(frozen=True)
class Place:
    """A value that linear layers read.

    Attributes:
        layers: Names of these layers, in execution order; they share the factors.
        channels: Extent of the value's last axis.
    """

    value: str
    layers: tuple[str, ...]
    channels: int


def places(graph: Graph) -> tuple[Place, ...]:
    """Every value whose channels can be changed together with the weights of all linear layers that read it."""
    refused = _refused(graph)
    return tuple(
        Place(value, layers, int(graph.type(value).shape[-1]))
        for value, layers in _readers(graph).items()
        if value not in refused
    )


def _readers(graph: Graph) -> Mapping[str, tuple[str, ...]]:
    """Linear layers by the value that they read, but for values that parameters alone determine."""
    constant = _constant(graph)
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.find(LAYER):
        value = node.ref("input")
        if value not in constant:
            found[value] = (*found.get(value, ()), node.name)
    return found


def _refused(graph: Graph) -> dict[str, str]:
    constant = _constant(graph)
    reasons: dict[str, str] = {}
    for value, layers in _readers(graph).items():
        type_ = graph.type(value)
        if not isinstance(type_.shape[-1], int):
            reasons[value] = f"it is {type_}; factors are of a fixed number of channels"
        for name in layers:
            weight = graph.producers[name].ref("weight")
            if weight not in constant:
                reasons[value] = f"the weight of %{name}, %{weight}, depends on the model's inputs"
            elif len(graph.type(weight).shape) != 2:
                reasons[value] = f"the weight of %{name} is {graph.type(weight)}; a linear layer's is a matrix"
    return reasons


def _constant(graph: Graph) -> frozenset[str]:
    """Everything that parameters alone determine."""
    constant, _ = split_constant(graph)
    made = (value.name for node in constant for value in node.outputs)
    return frozenset((*(param.name for param in graph.params), *made))


def _largest_block(channels: int, most: int) -> int:
    """The largest power of two that divides the channels, at most so large."""
    return min(channels & -channels, most)


def _why_not(option: str, channels: int) -> str | None:
    """Why a value of so many channels does not take the option; None if it does."""
    try:
        found = map_of(option)
    except SpecError as error:
        return str(error)
    if isinstance(found, Factors) and len(found.digits) != channels:
        return f"{len(found.digits)} factors are given for {channels} channels"
    if isinstance(found, Rotation) and channels % found.block:
        return f"{channels} channels are no multiple of block={found.block}"
    return None
