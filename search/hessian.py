"""The trace of the loss's Hessian, layer by layer, from products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from intarsia.ir.errors import QualityError
from intarsia.ir.execute import call, evaluate_nodes
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.search.bit_data import Data, check
from intarsia.search.estimate import Estimate
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent

TOLERANCE = 1e-3
"""The mean has settled when a sample moves it by less than this share. Source: HAWQ-V3's PyHessian, hessian.py."""

MOST = 100
"""Samples at most. Source: the same."""

ROUND = 8
"""Vectors that share one gradient; more are computed than used only in the last round."""


@dataclass(frozen=True)
class Trace:
    """What is known of a layer's trace.

    Attributes:
        estimate: Of the trace; each sample is vHv for a vector v of its own, over all data.
        parameters: Number of weights.
        settled: Whether the stopping rule held before the last sample that was allowed.
    """

    estimate: Estimate
    parameters: int
    settled: bool

    @property
    def average(self) -> Estimate:
        """Of the trace / number of weights, which HAWQ-V3 weighs a layer by."""
        return self.estimate.times(1 / self.parameters)


def traces(
    program: Program,
    weights: Mapping[str, str],
    data: Data,
    *,
    journal: Journal,
    progress: Progress | None = None,
    tolerance: float = TOLERANCE,
    most: int = MOST,
    seed: int = 0,
) -> dict[str, Trace]:
    """The trace of each layer's block of the Hessian of the loss, by Hutchinson's method.

    E[vHv] is the trace where v has entries of 1 and -1 with equal chance. A layer is done when a sample moves the mean
    by less than ``tolerance`` x (|mean| + 1e-6), or after ``most`` samples. What is in the journal is not computed
    again, so that a killed run goes on and ends with the same figures.

    Args:
        program: The network in float, weights in memory; ReLU and the like count as they are where they are smooth.
        weights: By layer, the parameter that holds its weights.
        data: What the loss is and what it is the mean over.
        journal: What was computed before, and where new samples go.
        progress: Told of samples.
        tolerance: Of the stopping rule.
        most: Samples at most for each layer.
        seed: Another seed gives other vectors.

    Raises:
        UsageError: No data, data that is not finite, or weights on the meta device.
        QualityError: A sample is not finite.
    Source: HAWQ-V2 (arXiv 1911.03852), section 3.1; PyHessian for the rule.
    """
    check(data, program.graph)
    told = progress or Silent()
    told.start("trace of the Hessian", most * len(weights))
    run = Derivatives(program, data)
    found: dict[str, Trace] = {}
    for layer, weight in weights.items():
        key = f"hessian/{run.fingerprint}/{layer}/{seed}"
        samples: list[float] = []
        for sample in _samples(run, weight, key, journal, most):
            samples.append(sample)
            told.advance(note=layer)
            if settled(samples, tolerance):
                break
        told.advance(most - len(samples))
        found[layer] = Trace(Estimate(tuple(samples)), program.weights[weight].numel(), settled(samples, tolerance))
    told.finish()
    return found


def settled(samples: Sequence[float], tolerance: float) -> bool:
    """Whether the last sample moved the mean by less than the tolerance; never by the first one."""
    if len(samples) < 2:
        return False
    before, after = (Estimate(tuple(samples[:count])).mean for count in (len(samples) - 1, len(samples)))
    return abs(after - before) / (abs(before) + 1e-6) < tolerance


class Derivatives:
    """A program's derivatives by one weight at a time; all that does not depend on the weight is computed once a batch.

    Attributes:
        fingerprint: Sixteen hexadecimal digits that differ for other graphs, weights and data.
    """

    def __init__(self, program: Program, data: Data) -> None:
        self.data = data
        identity = f"{program.graph.fingerprint}{program.fingerprint()}{data.fingerprint}"
        self.fingerprint = sha256(identity.encode()).hexdigest()[:16]
        self._program = program
        self._held: tuple[int, dict[str, Any]] | None = None

    def output(self, weight: str, number: int, value: Tensor) -> Tensor:
        """The first output for the batch of this number, with ``value`` in place of the weight."""
        table = {**self._values(number), weight: value}
        for node in _behind(self._program.graph, weight):
            table.update(zip((made.name for made in node.outputs), call(node, table), strict=True))
        output = table[self._program.graph.outputs[0]]
        assert isinstance(output, Tensor)
        return output

    def unchanged(self, number: int) -> Tensor:
        """The first output for the batch of this number."""
        output = self._values(number)[self._program.graph.outputs[0]]
        assert isinstance(output, Tensor)
        return output

    def weight(self, name: str) -> Tensor:
        """The parameter, as a leaf that gradients are taken by."""
        return self._program.weights[name].detach().clone().requires_grad_()

    def curvatures(self, weight: str, vectors: Sequence[Tensor]) -> list[float]:
        """vHv for each vector v of the weight's shape, of the mean loss over all data."""
        sums = [0.0] * len(vectors)
        for number, share in enumerate(self.data.shares()):
            leaf = self.weight(weight)
            with _twice_differentiable():
                loss = self.data.value(self.output(weight, number, leaf), number, self.unchanged(number))
                gradient = _gradient(loss, leaf, None)
                for place, vector in enumerate(vectors):
                    product = _gradient(gradient, leaf, vector).detach()
                    sums[place] += share * float((product.double() * vector.double()).sum())
        return sums

    def _values(self, number: int) -> dict[str, Any]:
        """All values of the unchanged network for a batch; those of the last batch that was asked for are held."""
        if self._held is None or self._held[0] != number:
            graph, batch = self._program.graph, self.data.batches[number]
            inputs = {value.name: tensor for value, tensor in zip(graph.inputs, batch, strict=True)}
            self._held = number, evaluate_nodes(graph.nodes, {**self._program.weights, **inputs})
        return self._held[1]


def random_signs(weight: Tensor, key: str) -> Tensor:
    """A vector of the weight's shape with entries of 1 and -1; the same key gives the same vector on every device."""
    drawn = torch.randint(0, 2, weight.shape, generator=generator(key))
    return (2 * drawn - 1).to(weight.dtype).to(weight.device)


def generator(key: str) -> torch.Generator:
    """A source of random numbers of its own for each key."""
    return torch.Generator().manual_seed(int.from_bytes(sha256(key.encode()).digest()[:8], "big") >> 1)


def known_or(measure: Callable[[], float], key: str, journal: Journal) -> float:
    """What the journal has under ``key``, or what is measured now and kept there; QualityError if it is not finite."""
    found = journal.get(key)
    if not isinstance(found, float):
        found = measure()
        if not math.isfinite(found):
            raise QualityError(f"sensitivity of %{key.split('/')[2]} is {found}; the network's answers overflow here")
        journal.put(key, found)
    return found


def _samples(run: Derivatives, weight: str, key: str, journal: Journal, most: int) -> Iterator[float]:
    """vHv for one vector after another, computed in rounds where the journal has none."""
    for start in range(0, most, ROUND):
        names = [f"{key}/{number}" for number in range(start, min(start + ROUND, most))]
        absent = [name for name in names if not isinstance(journal.get(name), float)]
        leaf = run.weight(weight)
        computed = dict(zip(absent, _computed(run, weight, [random_signs(leaf, name) for name in absent]), strict=True))
        for name in names:
            yield known_or(partial(computed.__getitem__, name), name, journal)


def _computed(run: Derivatives, weight: str, vectors: Sequence[Tensor]) -> list[float]:
    return run.curvatures(weight, vectors) if vectors else []


def _behind(graph: Graph, weight: str) -> list[Node]:
    """The calls that depend on a parameter, in order."""
    moved = {weight}
    behind: list[Node] = []
    for node in graph.nodes:
        if not moved.isdisjoint(node.inputs):
            behind.append(node)
            moved.update(value.name for value in node.outputs)
    return behind


def _gradient(value: Tensor, leaf: Tensor, vector: Tensor | None) -> Tensor:
    """The gradient of ``value`` (times ``vector``), itself to be differentiated; 0 where it does not depend."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(
        value, leaf, vector, create_graph=vector is None, retain_graph=True, materialize_grads=True
    )
    return gradient


def _twice_differentiable() -> Any:
    """Attention in the one way whose gradient has a gradient."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
