"""Three measures of what fewer bits cost: what each is, that they agree on what matters, and that they resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, relu

from intarsia.ir.errors import UsageError
from intarsia.ir.program import Program
from intarsia.kernels.fake_quantize.reference import fake_quantize_channels
from intarsia.search.bit_counts import counts, problem
from intarsia.search.bit_data import Data
from intarsia.search.bit_sensitivity import METHODS, means, perturbations
from intarsia.search.bits import solve
from intarsia.search.hessian import traces
from intarsia.search.journal import Journal

LAYERS = ("first", "second", "third")


def batches(count: int) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)),) for seed in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_four_bits_cost_over_a_hundred_times_what_eight_cost(program: Program, method: str):
    found = means(perturbations(program, Data(batches(1)), journal=Journal(), method=method, layers=LAYERS, most=6))
    assert found.keys() == set(LAYERS)
    for row in found.values():
        assert row["w4a4"] > 100 * row["w8a8"] > 0


def test_the_hessian_measure_is_the_average_trace_times_the_squared_change(program: Program):
    data, journal = Data(batches(2)), Journal()
    found = perturbations(program, data, journal=journal, layers=["second"], most=4)["second"]
    trace = traces(program, {"second": "w2"}, data, journal=journal, most=4)["second"]
    change = (fake_quantize_channels(program.weights["w2"], 4) - program.weights["w2"]).double().square().sum()
    assert found["w4a4"].mean == pytest.approx(trace.estimate.mean / 64**2 * float(change), rel=1e-6)
    low, high = found["w4a4"].interval
    assert low < found["w4a4"].mean < high


def test_the_fisher_measure_is_half_the_curvature_of_the_divergence_along_the_diagonal(program: Program):
    inputs = batches(1)[0][0]
    weights = {name: value / 4 for name, value in program.weights.items()}
    found = perturbations(
        Program(program.graph, weights), Data([(inputs,)] * 12), journal=Journal(), method="fisher", layers=["third"]
    )["third"]["w4a4"]
    hidden = relu(linear(relu(linear(inputs, weights["w1"])), weights["w2"]))
    chances = log_softmax(linear(hidden, weights["w3"]), -1).exp()
    diagonal = torch.einsum("nc,ni->ci", chances * (1 - chances), hidden.square()) / 16
    change = fake_quantize_channels(weights["w3"], 4) - weights["w3"]
    exact = float((diagonal * change.square()).sum()) / 2
    low, high = found.interval
    assert low < exact < high
    assert found.mean == pytest.approx(exact, rel=0.1)


def test_the_output_measure_is_the_relative_change_of_the_answer(program: Program):
    found = perturbations(program, Data(batches(2)), journal=Journal(), method="output", layers=["first"])["first"]
    expected = []
    for (inputs,) in batches(2):
        before, after = (
            linear(relu(linear(relu(linear(inputs, first)), program.weights["w2"])), program.weights["w3"])
            for first in (program.weights["w1"], fake_quantize_channels(program.weights["w1"], 4))
        )
        expected.append(float((after - before).square().sum() / before.square().sum()))
    assert found["w4a4"].samples == pytest.approx(expected, rel=1e-5)


def test_all_but_the_ends_are_measured_unless_layers_are_named(program: Program):
    found = perturbations(program, Data(batches(1)), journal=Journal(), method="output")
    assert list(found) == ["second"]
    layers = counts(program.graph)
    asked = problem(layers, means(found))
    assert solve(asked, {"size": 3 * 64**2}).chosen == ("w8a8", "w8a8", "w8a8")
    assert solve(asked, {"size": 2.5 * 64**2}).chosen == ("w8a8", "w4a4", "w8a8")


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_measurement_goes_on_from_the_journal(program: Program, method: str, tmp_path: Path):
    data = Data(batches(2))
    settings = {"method": method, "layers": LAYERS, "most": 4, "tolerance": 0.0}
    whole = perturbations(program, data, journal=Journal(), **settings)
    path = tmp_path / "a.jsonl"
    perturbations(program, data, journal=Journal(path), **settings)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert perturbations(program, data, journal=Journal(path), **settings) == whole
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_outputs_that_are_numbers_have_all_three_measures(program: Program):
    for method in METHODS:
        data = Data(batches(1), squared=True)
        found = perturbations(program, data, journal=Journal(), method=method, layers=["second"], most=3)
        assert found["second"]["w4a4"].mean > 0


def test_unknown_methods_and_layers_and_weights_that_are_not_there_are_refused(program: Program):
    data = Data(batches(1))
    with pytest.raises(UsageError, match=r"method 'trace' is unknown\. Known: hessian, fisher, output"):
        perturbations(program, data, journal=Journal(), method="trace")
    with pytest.raises(UsageError, match="%fourth is no convolution or linear layer of graph three"):
        perturbations(program, data, journal=Journal(), layers=["fourth"])
    away = Program(program.graph, {name: value.to("meta") for name, value in program.weights.items()})
    with pytest.raises(UsageError, match="weights are on the meta device"):
        perturbations(away, data, journal=Journal())
