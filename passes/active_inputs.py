"""What a graph of active tokens takes beside the model's own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from intarsia.ir.graph import Graph, Value

ACTIVE = "active"
"""The input that tells which tokens are active, and the named size that counts them."""

ELAPSED, RATE = "elapsed", "rate"
"""The inputs of a step that moves caches along: for each token (N) the noise level less that at which it was last
active, and one over that; both are 0 where it never was."""


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a graph of active tokens: the model's own, ``%active``, ``%elapsed`` and ``%rate``, caches.

    Attributes:
        own: How many inputs are the model's own; they come first.
        clocked: Whether caches move along, so that the step is told how far.
        caches: The caches, last; as many outputs at the end are what they hold after the step.
        size: The named size that counts active tokens.
        tokens: N, all tokens.
    """

    own: int
    clocked: bool
    caches: tuple[Value, ...]
    size: str
    tokens: int

    @classmethod
    def of(cls, graph: Graph) -> Self | None:
        """Of a graph that ``active-tokens`` made; None for any other."""
        names = [value.name for value in graph.inputs]
        if ACTIVE not in names:
            return None
        own, clocked = names.index(ACTIVE), RATE in names
        (counted,) = (size for size in graph.sizes if size.name == graph.type(ACTIVE).shape[0])
        assert counted.maximum is not None
        return cls(own, clocked, graph.inputs[own + (3 if clocked else 1) :], counted.name, counted.maximum)
