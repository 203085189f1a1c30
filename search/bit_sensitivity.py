"""What fewer bits in a layer's weights cost: three measures of it behind one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.ir.program import Program, materialize
from intarsia.kernels.fake_quantize.reference import fake_quantize_channels
from intarsia.search.bit_counts import counts
from intarsia.search.bit_data import Data, check
from intarsia.search.bit_layers import bits
from intarsia.search.estimate import Estimate
from intarsia.search.hessian import MOST, TOLERANCE, Derivatives, generator, known_or, traces
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.work import sizes_of

METHODS = ("hessian", "fisher", "output")
OPTIONS = ("w4a4", "w8a8")

DRAWS = 8
"""Answers drawn for each batch by ``fisher``."""

Perturbations = dict[str, dict[str, Estimate]]
"""By layer and option; means are what ``bit_counts.problem`` takes, through ``means``."""


def perturbations(
    program: Program,
    data: Data,
    *,
    journal: Journal,
    method: str = "hessian",
    options: Sequence[str] = OPTIONS,
    layers: Sequence[str] | None = None,
    progress: Progress | None = None,
    tolerance: float = TOLERANCE,
    most: int = MOST,
    seed: int = 0,
) -> Perturbations:
    """How much each option of each layer alone perturbs the network, rounding weights channel by channel.

    * ``hessian``: the average trace of the layer's Hessian times ||Q(W) - W||^2; a negative trace counts as 0.
      Source: HAWQ-V2 (arXiv 1911.03852), equation 2.11; HAWQ-V3, equation 8.
    * ``fisher``: the diagonal of the Fisher information, times the square of each weight's own change, halved, per
      sample. Source: as FIT (arXiv 2210.08502), weight by weight, with answers drawn from the network's distribution.
    * ``output``: the squared change of the first output relative to its squared norm, measured.

    What rounding activations costs is in none of them; so ``w4a8`` equals ``w4a4``. Layers that have the weights of an
    earlier one cost nothing more. The methods' units differ; only numbers of one method can be compared.

    Args:
        program: The network in float, weights in memory. What depends on weights alone, such as a folded batch norm, is
            computed first.
        data: What is measured on; see ``Data`` for the loss.
        journal: What was measured before, and where measurements go.
        method: One of ``METHODS``.
        options: Such as ``w4a4``.
        layers: Names; all convolutions and linear layers but the first and the last unless given.
        progress: Told of samples.
        tolerance: Of ``hessian``'s stopping rule.
        most: Samples of ``hessian`` at most for each layer.
        seed: Another seed draws others.

    Raises:
        UsageError: No data, weights on the meta device, or an unknown method or layer.
        QualityError: A measurement is not finite.
    """
    check(data, program.graph)
    if method not in METHODS:
        raise UsageError(f"sensitivity: method {method!r} is unknown. Known: {', '.join(METHODS)}")
    if program.is_meta:
        raise UsageError(
            f"graph {program.graph.name}: sensitivities are measured, and the weights are on the meta device"
        )
    program = materialize(program)
    found = counts(program.graph, sizes_of(program.graph, data.batches[0]))
    known = {count.name: count for count in found}
    chosen = [count.name for count in found[1:-1]] if layers is None else list(layers)
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"sensitivity: %{unknown[0]} is no convolution or linear layer of graph {program.graph.name}")
    weights = {name: known[name].weight for name in chosen if known[name].parameters}
    study = _Study(program, data, weights, tuple(options), journal, progress or Silent(), seed)
    match method:
        case "hessian":
            measured = _by_trace(study, tolerance, most)
        case "fisher":
            measured = _by_fisher(study)
        case _:
            measured = _by_output(study)
    nothing = dict.fromkeys(options, Estimate((0.0,)))
    return {name: measured.get(name, nothing) for name in chosen}


def means(found: Perturbations) -> dict[str, dict[str, float]]:
    """The perturbations without their samples."""
    return {name: {option: estimate.mean for option, estimate in row.items()} for name, row in found.items()}


@dataclass(frozen=True)
class _Study:
    program: Program
    data: Data
    weights: Mapping[str, str]
    options: tuple[str, ...]
    journal: Journal
    progress: Progress
    seed: int

    def rounded(self, layer: str) -> dict[str, Tensor]:
        """The layer's weight as each option leaves it."""
        weight = self.program.weights[self.weights[layer]]
        return {option: fake_quantize_channels(weight, bits(option)[0]) for option in self.options}

    def change(self, layer: str, value: Tensor) -> Tensor:
        """What rounding to ``value`` adds to the layer's weight, in f64."""
        return value.double() - self.program.weights[self.weights[layer]].double()


def _by_trace(study: _Study, tolerance: float, most: int) -> Perturbations:
    found = traces(
        study.program,
        study.weights,
        study.data,
        journal=study.journal,
        progress=study.progress,
        tolerance=tolerance,
        most=most,
        seed=study.seed,
    )
    result: Perturbations = {}
    for layer, trace in found.items():
        average = trace.average if trace.average.mean > 0 else Estimate((0.0,))
        norms = {option: study.change(layer, value).square().sum() for option, value in study.rounded(layer).items()}
        result[layer] = {option: average.times(float(norm)) for option, norm in norms.items()}
    return result


def _by_fisher(study: _Study) -> Perturbations:
    """Rows of samples, each of one draw of answers for one batch."""
    run, batches = Derivatives(study.program, study.data), study.data.batches
    samples = _Samples(study)
    study.progress.start("Fisher information", len(study.weights) * len(batches) * DRAWS)
    for number, layer in product(range(len(batches)), study.weights):
        rounded = study.rounded(layer)
        for draw in range(DRAWS):
            key = f"fisher/{run.fingerprint}/{layer}/{study.seed}/{number}/{draw}"
            squares = _once(partial(_squared_score, run, study.weights[layer], number, key))
            for option, value in rounded.items():
                weigh = partial(_fisher, squares, study.change(layer, value))
                samples.add(layer, option, known_or(weigh, f"{key}/{option}", study.journal))
            study.progress.advance(note=layer)
    study.progress.finish()
    return samples.estimates()


def _squared_score(run: Derivatives, weight: str, number: int, key: str) -> Tensor:
    """The squared gradient of the answers' log likelihood, per sample of the batch."""
    leaf = run.weight(weight)
    score = run.data.score(run.output(weight, number, leaf), generator(key))
    (gradient,) = torch.autograd.grad(score, leaf, materialize_grads=True)
    return gradient.double().square() / len(run.data.batches[number][0])


def _fisher(squares: Callable[[], Tensor], change: Tensor) -> float:
    return float((squares() * change.square()).sum()) / 2


def _by_output(study: _Study) -> Perturbations:
    """Rows of samples, one a batch."""
    run, batches = Derivatives(study.program, study.data), study.data.batches
    samples = _Samples(study)
    study.progress.start("change of the output", len(study.weights) * len(batches))
    for number, layer in product(range(len(batches)), study.weights):
        for option, value in study.rounded(layer).items():
            key = f"output/{run.fingerprint}/{layer}/{number}/{option}"
            change = partial(_change, run, study.weights[layer], number, value)
            samples.add(layer, option, known_or(change, key, study.journal))
        study.progress.advance(note=layer)
    study.progress.finish()
    return samples.estimates()


def _change(run: Derivatives, weight: str, number: int, value: Tensor) -> float:
    before = run.unchanged(number).double()
    with torch.no_grad():
        after = run.output(weight, number, value).double()
    return float((after - before).square().sum() / before.square().sum().clamp(min=1e-300))


class _Samples:
    """Samples by layer and option, as they come."""

    def __init__(self, study: _Study) -> None:
        self._rows: dict[str, dict[str, list[float]]] = {
            layer: {option: [] for option in study.options} for layer in study.weights
        }

    def add(self, layer: str, option: str, sample: float) -> None:
        self._rows[layer][option].append(sample)

    def estimates(self) -> Perturbations:
        return {
            layer: {option: Estimate(tuple(samples)) for option, samples in row.items()}
            for layer, row in self._rows.items()
        }


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``make``, called when it is first needed, and once."""
    return lru_cache(maxsize=1)(make)
