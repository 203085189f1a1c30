"""Fine-tuning: gradients reach what was there before the passes, it learns, and a killed run ends the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.ir import execute
from intarsia.ir.errors import PlanError, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import load_target
from intarsia.passes.base import find_pass
from intarsia.search.calibration import calibrate, find_method
from intarsia.search.finetune import Recipe, Tuned, finetune, rounded
from intarsia.search.finetune_loss import Call, Loss
from intarsia.search.finetune_network import Network, statistics
from intarsia.search.finetune_state import CHECKPOINT, LOG
from intarsia.search.finetune_training import differentiate

GRAPH = Graph.parse("""graph g {
  size N in [1, inf]
  input %x: f32[N, 4, 6, 6]
  param %first: f32[8, 4, 3, 3]
  param %middle: f32[8, 8, 3, 3]
  param %gain: f32[8]
  param %offset: f32[8]
  param %mean: f32[8]
  param %variance: f32[8]
  param %last: f32[5, 8]
  param %bias: f32[5]
  %a: f32[N, 8, 6, 6] = aten.conv2d(input=%x, weight=%first, bias=None, padding=[1, 1])
  %r: f32[N, 8, 6, 6] = aten.relu(self=%a)
  %c: f32[N, 8, 6, 6] = aten.conv2d(input=%r, weight=%middle, bias=None, padding=[1, 1])
  %n: f32[N, 8, 6, 6] = aten.batch_norm(input=%c, weight=%gain, bias=%offset, running_mean=%mean, running_var=%variance, training=False, momentum=0.1, eps=0.001, cudnn_enabled=True)
  %s: f32[N, 8, 6, 6] = aten.relu(self=%n)
  %p: f32[N, 8, 1, 1] = aten.adaptive_avg_pool2d(self=%s, output_size=[1, 1])
  %f: f32[N, 8] = aten.flatten.using_ints(self=%p, start_dim=1)
  %y: f32[N, 5] = aten.linear(input=%f, weight=%last, bias=%bias)
  return %y
}""")  # noqa: E501

TARGET = load_target("null")


@pytest.fixture(scope="module")
def program() -> Program:
    generator = torch.Generator().manual_seed(0)
    weights = {param.name: 0.3 * torch.randn(param.type.shape, generator=generator) for param in GRAPH.params}  # type: ignore[union-attr]
    weights["variance"] = 0.5 + torch.rand(8, generator=generator)
    weights["gain"] = 1.0 + 0.1 * weights["gain"]
    return Program(GRAPH, weights)


@pytest.fixture(scope="module")
def plan(program: Program) -> Plan:
    """Four bits in the layer between the first and the last."""
    folded = Program(find_pass("fold-batch-norm").run(GRAPH, TARGET, {}), program.weights)
    ranges = calibrate(folded, [(pictures(0, 64),)], find_method("minmax"))
    offered = find_pass("quantize-integer").choices(find_pass("calibrate").run(folded.graph, TARGET, ranges), TARGET)
    chosen = {place: "w4a4" if "w4a4" in options else "w8a8" for place, options in offered.items()}
    steps = (
        Step("fold-batch-norm"),
        Step("calibrate", ranges),
        Step("quantize-integer", chosen),
        Step("lower-integer"),
    )
    return Plan(GRAPH.fingerprint, "null", (Phase(steps),))


def pictures(seed: int, count: int) -> Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def data(epoch: int) -> Iterator[Call]:
    return (Call((pictures(100 * epoch + number + 1, 32),)) for number in range(4))


def held_out(labels: Tensor | None = None) -> list[Call]:
    return [Call((pictures(99_999, 64),), labels)]


def tuned(program: Program, plan: Plan, folder: Path, *, steps: int = 24, **wishes: object) -> Tuned:
    how = Recipe(steps=steps, learning_rate=0.02, loss=Loss(temperature=1.0))
    options: dict[str, object] = {"data": data, "how": how, "held_out": held_out(), **wishes}
    return finetune(program, plan, TARGET, options.pop("data"), folder, **options)  # type: ignore[arg-type]


def test_a_training_brings_the_rounded_network_nearer_to_the_float_one(
    program: Program, plan: Plan, tmp_path: Path
) -> None:
    found = tuned(program, plan, tmp_path / "out")
    assert found.before is not None
    assert found.after is not None
    assert found.after.loss < 0.7 * found.before.loss
    student = materialize(Program(rounded(plan, GRAPH, TARGET), found.weights)).module()
    (call,) = held_out()
    (answer,), (taught,) = student(*call.inputs), program.module()(*call.inputs)
    divergence = Loss(temperature=1.0)(answer, taught, None)
    assert float(divergence) == pytest.approx(found.after.loss, rel=1e-3), "what is built has the score that was logged"


def test_weights_keep_their_names_and_types_and_statistics_their_numbers(
    program: Program, plan: Plan, tmp_path: Path
) -> None:
    found = tuned(program, plan, tmp_path / "out", steps=2)
    assert {name: tensor.dtype for name, tensor in found.weights.items()} == {
        name: tensor.dtype for name, tensor in program.weights.items()
    }
    same = {name for name, tensor in found.weights.items() if torch.equal(tensor, program.weights[name])}
    assert same == {"mean", "variance"} == statistics(GRAPH)


def test_rounding_and_its_gradient_are_those_of_the_operator() -> None:
    graph = Graph.parse("""graph g {
      input %x: f32[9, 64]
      param %w: f32[64]
      %y: f32[9, 64] = aten.mul.Tensor(self=%x, other=%w)
      %z: f32[9, 64] = intarsia.fake_quantize(input=%y, scale=0.1, low=-8, high=7)
      return %z
    }""")
    generator = torch.Generator().manual_seed(1)
    x, w, weight = (torch.randn(shape, generator=generator) for shape in ((9, 64), (64,), (9, 64)))
    network = Network(Program(graph, {"w": w}))
    found = network((x,))
    (found * weight).sum().backward()  # type: ignore[no-untyped-call]
    leaf = w.clone().requires_grad_()
    expected = execute.call(graph.nodes[1], {"y": x * leaf})[0]
    (expected * weight).sum().backward()
    assert torch.equal(found, expected)
    assert network.leaves["w"].grad is not None
    assert torch.allclose(network.leaves["w"].grad, leaf.grad, atol=1e-6)


def test_gradients_reach_what_a_folded_norm_is_made_of(program: Program, plan: Plan) -> None:
    network = Network(Program(rounded(plan, GRAPH, TARGET), program.weights), frozen=statistics(GRAPH))
    network((pictures(3, 8),)).square().sum().backward()
    assert set(network.leaves) == {"first", "middle", "gain", "offset", "last", "bias"}
    assert all(leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in network.leaves.values())


class Killed(Exception):
    """Stands for the end of a process."""


def test_a_run_that_was_killed_ends_with_the_same_weights_and_the_same_log(
    program: Program, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intarsia.search.finetune_training.CHECKPOINT_SECONDS", 0.0)
    whole = tuned(program, plan, tmp_path / "whole", steps=10)

    def breaking(epoch: int) -> Iterator[Call]:
        for number, call in enumerate(data(epoch)):
            if (epoch, number) == (1, 2):
                raise Killed
            yield call

    with pytest.raises(Killed):
        tuned(program, plan, tmp_path / "torn", steps=10, data=breaking)
    with (tmp_path / "torn" / LOG).open("a") as log:
        log.write('{"step": 7, "loss": 1.0}\n{"st')
    again = tuned(program, plan, tmp_path / "torn", steps=10)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())
    assert again.losses == whole.losses
    assert (again.before, again.after) == (whole.before, whole.after)
    logs = [[json.loads(line) for line in (tmp_path / f / LOG).read_text().splitlines()] for f in ("whole", "torn")]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]
    finished = tuned(program, plan, tmp_path / "torn", steps=10, data=lambda epoch: iter(()))
    assert finished.losses == whole.losses, "a finished run takes no more data"


def test_gradients_of_several_calls_make_one_step(program: Program, plan: Plan, tmp_path: Path) -> None:
    def halves(epoch: int) -> Iterator[Call]:
        return (Call((part,)) for call in data(epoch) for part in call.inputs[0].split(16))

    how = Recipe(steps=3, loss=Loss(temperature=1.0))
    one = tuned(program, plan, tmp_path / "one", how=how)
    two = tuned(program, plan, tmp_path / "two", how=replace(how, calls=2), data=halves)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert torch.allclose(one.weights["middle"], two.weights["middle"], atol=1e-6)


def test_labels_and_numbers_are_losses_too(program: Program, plan: Plan, tmp_path: Path) -> None:
    (taught,) = program.module()(*held_out()[0].inputs)
    labelled = held_out(taught.argmax(1))
    found = tuned(program, plan, tmp_path / "labels", data=lambda epoch: labelled, held_out=labelled, steps=1)
    assert found.before is not None
    assert found.before.accuracy == found.before.agreement
    how = Recipe(steps=20, optimizer="adamw", learning_rate=0.002, loss=Loss("numbers"))
    numbers = tuned(program, plan, tmp_path / "numbers", how=how)
    assert numbers.before is not None
    assert numbers.after is not None
    assert numbers.after.loss < 0.8 * numbers.before.loss
    assert numbers.after.accuracy is None


def test_the_rate_rises_along_a_line_and_falls_to_nothing() -> None:
    how = Recipe(steps=100, learning_rate=0.1, warm_up=0.1)
    rates = [how.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.005 + 0.01 * step for step in range(10)])
    assert sum(rates[54:56]) == pytest.approx(0.1)
    assert max(rates) <= 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-4


def test_other_settings_do_not_go_on_from_a_checkpoint(program: Program, plan: Plan, tmp_path: Path) -> None:
    tuned(program, plan, tmp_path / "out", steps=2)
    with pytest.raises(UsageError, match=r"its checkpoint was made with steps 2, now it is 3; give a new folder"):
        tuned(program, plan, tmp_path / "out", steps=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=f"holds other files and no {CHECKPOINT}"):
        tuned(program, plan, tmp_path / "other", steps=3)


def test_a_loss_that_is_not_finite_stops_it_and_the_checkpoint_stays(
    program: Program, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intarsia.search.finetune_training.CHECKPOINT_SECONDS", 0.0)

    def poisoned(epoch: int) -> Iterator[Call]:
        yield from data(epoch)
        yield Call((torch.full((4, 4, 6, 6), torch.nan),))

    with pytest.raises(
        QualityError, match=r"the loss of step 5 is nan; the checkpoint before it stays in .*learning rate"
    ):
        tuned(program, plan, tmp_path / "out", data=poisoned)
    monkeypatch.undo()
    assert len(tuned(program, plan, tmp_path / "out").losses) == 24, "the same run goes on from there with better data"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(31, dtype=torch.int64), r"labels are \(31,\) of int64; 32 samples"),
        (torch.zeros(32), r"labels are \(32,\) of float32; 32 samples"),
        (torch.full((32,), 5), r"labels lie from 5 to 5; the network has classes 0 to 4"),
    ],
)
def test_labels_that_do_not_fit(program: Program, plan: Plan, tmp_path: Path, labels: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tuned(program, plan, tmp_path / "out", data=lambda epoch: [Call((pictures(1, 32),), labels)])


def test_an_operator_without_a_gradient_is_named() -> None:
    graph = Graph.parse("""graph g {
      input %x: f32[1, 4, 8]
      param %gate: f32[1, 1, 8]
      %y: f32[1, 4, 8] = intarsia.gated_residual(residual=%x, input=%x, gate=%gate)
      return %y
    }""")
    output = Network(Program(graph, {"gate": torch.ones(1, 1, 8)}))((torch.ones(1, 4, 8),))
    with pytest.raises(Unsupported, match=r"intarsia\.gated_residual has no gradient; give a plan that leaves out"):
        differentiate(output.sum())


def test_no_data(program: Program, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="epoch 0 of the data has 0 calls; one step takes 1"):
        tuned(program, plan, tmp_path / "out", data=lambda epoch: iter(()))


def test_plans_that_round_nothing(program: Program, plan: Plan, tmp_path: Path) -> None:
    steps = plan.phases[0].steps
    with pytest.raises(PlanError, match="the plan has no quantize-integer"):
        tuned(program, replace(plan, phases=(Phase(steps[:2]),)), tmp_path / "out")
    kept = (*steps[:2], Step("quantize-integer"))
    with pytest.raises(PlanError, match="keeps every layer"):
        tuned(program, replace(plan, phases=(Phase(kept),)), tmp_path / "out")
    with pytest.raises(PlanError, match="has 2 phases"):
        tuned(program, replace(plan, phases=(Phase(steps, 0, 3), Phase(steps, 4))), tmp_path / "out")
    with pytest.raises(PlanError, match="made for"):
        tuned(program, replace(plan, graph="0123456789ab"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
