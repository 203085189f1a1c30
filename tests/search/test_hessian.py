"""Traces against exact Hessians, the stopping rule, and a run that is killed and goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.search.bit_data import Data
from intarsia.search.estimate import Estimate
from intarsia.search.hessian import settled, traces
from intarsia.search.journal import Journal

LINEAR = """graph linear {
  input %x: f32[8, 3]
  param %w: f32[4, 3]
  %y: f32[8, 4] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}"""


class Small(nn.Module):
    """A convolution, a batch norm, a smooth function, a pool and two linear layers: 2 x 5 x 5 pictures to 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(3, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.tanh(self.norm(self.conv(x))).mean((2, 3))
        return self.last(torch.tanh(self.hidden(pooled)))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Program]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Small().eval()
        module.norm.running_var.uniform_(0.5, 2)
    return module, trace(module, {"x": torch.zeros(6, 2, 5, 5)}, name="small")


WEIGHTS = {"conv": "conv.weight", "hidden": "hidden.weight", "last": "last.weight"}
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def exact_trace(module: nn.Module, name: str, batches: list[Tensor], labels: Tensor | None) -> float:
    """The trace of the exact Hessian of the mean loss, by the weight of this name."""
    parameters = {key: value.detach() for key, value in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def loss(weight: Tensor) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            output = torch.func.functional_call(module, {**parameters, **buffers, name: weight}, batch)
            if labels is not None:
                total = total + cross_entropy(output, labels)
            else:
                with torch.no_grad():
                    unchanged = log_softmax(module(batch), -1)
                total = total + kl_div(log_softmax(output, -1), unchanged, reduction="batchmean", log_target=True)
        return total / len(batches)

    hessian = torch.func.hessian(loss)(parameters[name])
    size = parameters[name].numel()
    return float(hessian.reshape(size, size).trace())


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "distillation"])
def test_the_exact_trace_of_every_layer_is_in_its_interval(small, labels):
    module, program = small
    batches = [normal(6, 2, 5, 5, seed=seed) for seed in (0, 1)]
    data = Data([(batch,) for batch in batches], None if labels is None else [labels, labels])
    found = traces(program, WEIGHTS, data, journal=Journal(), tolerance=0.0, most=100)
    for layer, weight in WEIGHTS.items():
        low, high = found[layer].estimate.interval
        exact = exact_trace(module, weight, batches, labels)
        assert low < exact < high
        assert found[layer].estimate.mean == pytest.approx(exact, rel=0.25)
        assert (len(found[layer].estimate.samples), found[layer].settled) == (100, False)


def test_a_squared_loss_of_a_linear_layer_has_the_trace_of_its_closed_form():
    inputs = normal(8, 3, seed=0)
    program = Program(Graph.parse(LINEAR), {"w": normal(4, 3, seed=1)})
    found = traces(program, {"y": "w"}, Data([(inputs,)], squared=True), journal=Journal(), tolerance=0.0)["y"]
    closed = 4 * float(inputs.square().sum()) / 8
    low, high = found.estimate.interval
    assert low < closed < high
    assert found.average.mean == pytest.approx(found.estimate.mean / 12)


def test_a_diagonal_hessian_is_exact_with_two_vectors():
    program = Program(Graph.parse(LINEAR), {"w": normal(4, 3, seed=1)})
    inputs = torch.cat([torch.eye(3), torch.zeros(5, 3)])
    found = traces(program, {"y": "w"}, Data([(inputs,)], squared=True), journal=Journal())["y"]
    assert found.settled
    assert found.estimate.samples == (12 / 8, 12 / 8)
    assert found.estimate.interval == (12 / 8, 12 / 8)


def test_data_in_several_batches_is_weighed_by_their_samples():
    weights = {"w": normal(4, 3, seed=1)}
    inputs = normal(8, 3, seed=0)
    whole = traces(
        Program(Graph.parse(LINEAR), weights), {"y": "w"}, Data([(inputs,)], squared=True), journal=Journal(), most=5
    )
    graph = Graph.parse(LINEAR.replace("[8,", "[batch,").replace("{\n", "{\n  size batch in [1, 64]\n", 1))
    split = Data([(inputs[:6],), (inputs[6:],)], squared=True)
    shares = split.shares()
    assert shares == (0.75, 0.25)
    parts = traces(Program(graph, weights), {"y": "w"}, split, journal=Journal(), tolerance=0.0, most=40)
    assert whole["y"].estimate.mean == pytest.approx(parts["y"].estimate.mean, rel=0.5)
    low, high = parts["y"].estimate.interval
    assert low < 4 * float(inputs.square().sum()) / 8 < high


def test_the_rule_stops_when_a_sample_hardly_moves_the_mean():
    assert not settled([1.0], 1e-3)
    assert settled([1.0, 1.001], 1e-3)
    assert not settled([1.0, 1.003], 1e-3)
    assert settled([-1.0, -1.001], 1e-3), "the mean's magnitude is what the change is compared with"
    assert not settled([-1.0, 1.0], 1e-3)
    assert settled([0.0, 0.0], 1e-3)


def test_a_killed_run_goes_on_and_ends_with_the_same_figures(small, tmp_path: Path):
    _, program = small
    data = Data([(normal(6, 2, 5, 5, seed=0),)], [LABELS])
    whole = traces(program, WEIGHTS, data, journal=Journal(), most=20)

    class Killed(Exception):
        pass

    class Dying(Journal):
        def put(self, key: str, value: object) -> None:
            if len(self) == 13:
                raise Killed
            super().put(key, value)

    path = tmp_path / "a.jsonl"
    with pytest.raises(Killed):
        traces(program, WEIGHTS, data, journal=Dying(path), most=20)
    path.write_bytes(path.read_bytes()[:-9])
    kept = Journal(path)
    assert (len(kept), kept.broken) == (12, 1)
    assert traces(program, WEIGHTS, data, journal=kept, most=20) == whole
    before = path.read_bytes()
    assert traces(program, WEIGHTS, data, journal=Journal(path), most=20) == whole
    assert path.read_bytes() == before, "nothing is computed again"


def test_other_data_weights_and_seeds_are_not_taken_for_these(small, tmp_path: Path):
    _, program = small
    journal = Journal(tmp_path / "a.jsonl")
    one = {"hidden": "hidden.weight"}
    data = Data([(normal(6, 2, 5, 5, seed=0),)], [LABELS])
    changed = Program(program.graph, {**program.weights, "hidden.weight": program.weights["hidden.weight"] * 2})
    first = traces(program, one, data, journal=journal, most=2)
    assert traces(program, one, Data(data.batches), journal=journal, most=2) != first
    assert traces(changed, one, data, journal=journal, most=2) != first
    assert traces(program, one, data, journal=journal, most=2, seed=1) != first
    assert len(journal) == 8


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Data([]), "there are no calibration inputs"),
        (Data([(torch.full((8, 3), math.nan),)]), "batch 0: %x holds values that are not finite"),
        (Data([(torch.ones(8, 3), torch.ones(1))]), "batch 0 has 2 inputs, the graph 1"),
        (Data([(torch.ones(8, 3),)], []), "0 batches have labels, of 1"),
        (Data([(torch.ones(8, 3),)], [torch.zeros(4)]), r"batch 0 has 8 samples, its labels are \(4,\)"),
        (Data([(torch.ones(8, 3),)], [torch.zeros(8)], squared=True), "labels are given, and outputs are said"),
    ],
)
def test_data_that_nothing_can_be_measured_on_is_refused_in_one_line(data: Data, said: str):
    program = Program(Graph.parse(LINEAR), {"w": torch.ones(4, 3)})
    with pytest.raises(UsageError, match=said) as caught:
        traces(program, {"y": "w"}, data, journal=Journal())
    assert len(str(caught.value).splitlines()) == 1


def test_answers_that_overflow_are_refused_and_not_kept():
    program = Program(Graph.parse(LINEAR), {"w": torch.ones(4, 3)})
    journal = Journal()
    with pytest.raises(QualityError, match=r"sensitivity of %y is (nan|inf)"):
        traces(program, {"y": "w"}, Data([(torch.full((8, 3), 1e30),)], squared=True), journal=journal)
    assert len(journal) == 0


def test_an_interval_is_as_wide_as_its_samples_spread():
    assert Estimate((2.0,)).interval == (-math.inf, math.inf)
    low, high = Estimate((1.0, 2.0, 3.0)).interval
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert Estimate((1.0, 3.0)).times(2).samples == (2.0, 6.0)
