"""Layers that get bits: what they hold and compute, what each choice of bits costs them, and which must agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum

from intarsia.ir.errors import UsageError

MEASURES = ("size", "bops", "latency")
"""What can be limited: bytes of weights, operations on bits, seconds of one call."""


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer.

    Attributes:
        name: The node's name.
        parameters: Number of its weights.
        macs: Multiply-adds of one call.
        perturbation: What an option, ``w8a8`` or ``w4a4``, costs in accuracy; a layer with one option keeps it.
        seconds: How long a call takes with each option; empty where nobody knows.
    """

    name: str
    parameters: float
    macs: float
    perturbation: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])

    def cost(self, option: str, measure: str) -> float:
        """What an option takes: ``size`` bytes, ``bops`` (weight bits x activation bits x multiply-adds), ``latency``
        seconds, or ``perturbation``.
        """
        weights, activations = bits(option)
        match measure:
            case "size":
                return self.parameters * weights / 8
            case "bops":
                return self.macs * weights * activations
            case "latency":
                return self.seconds[option]
            case _:
                return self.perturbation[option]

    @property
    def options(self) -> tuple[str, ...]:
        """From the fewest bits to the most."""
        return tuple(sorted(self.perturbation, key=bits))


@dataclass(frozen=True)
class Problem:
    """Layers, and which of them must agree, by their numbers in ``layers``."""

    layers: tuple[Layer, ...]
    ties: tuple[tuple[int, ...], ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Every option of any layer, from the fewest bits to the most."""
        return tuple(sorted({option for layer in self.layers for option in layer.perturbation}, key=bits))

    @property
    def measures(self) -> tuple[str, ...]:
        """What is known of every layer: ``latency`` only where all seconds are."""
        timed = all(layer.perturbation.keys() <= layer.seconds.keys() for layer in self.layers)
        return MEASURES if timed else MEASURES[:2]

    def extent(self, measure: str) -> tuple[float, float]:
        """What the measure is with every layer at its fewest bits, and at its most."""
        fewest = fsum(layer.cost(layer.options[0], measure) for layer in self.layers)
        return fewest, fsum(layer.cost(layer.options[-1], measure) for layer in self.layers)


def bits(option: str) -> tuple[int, int]:
    """Bits of weights and of activations of ``w4a8``; UsageError for anything else."""
    found = re.fullmatch(r"w(\d+)a(\d+)", option)
    if found is None:
        raise UsageError(f"bits: expected an option such as w8a8 or w4a8, found {option!r}")
    return int(found[1]), int(found[2])


def shown(value: float, measure: str) -> str:
    """``6.5 MiB``, ``72 G`` or ``3.2 ms``: six digits in the unit that fits the measure."""
    factor, unit = {"size": (2.0**20, "MiB"), "bops": (1e9, "G"), "latency": (1e-3, "ms")}[measure]
    return f"{value / factor:.6g} {unit}"
