"""``intarsia finetune``: what it writes, how it goes on, and data that is none."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from intarsia import subject
from intarsia.finetune_data import function_calls, read_samples
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, load_weights, save_weights
from intarsia.ir.target import load_target
from intarsia.models import base as models
from intarsia.passes.base import find_pass
from intarsia.search.calibration import calibrate, find_method

from .conftest import Run

GRAPH = Graph.parse("""graph small {
  size N in [1, inf]
  input %x: f32[N, 12]
  param %a: f32[16, 12]
  param %b: f32[16, 16]
  param %c: f32[4, 16]
  %first: f32[N, 16] = aten.linear(input=%x, weight=%a, bias=None)
  %r: f32[N, 16] = aten.relu(self=%first)
  %middle: f32[N, 16] = aten.linear(input=%r, weight=%b, bias=None)
  %s: f32[N, 16] = aten.relu(self=%middle)
  %last: f32[N, 4] = aten.linear(input=%s, weight=%c, bias=None)
  return %last
}""")

QUANTIZE = "quantize-integer"

FIXED = Graph.parse(str(GRAPH).replace("N, ", "8, ").replace("  size N in [1, inf]\n", ""))


@pytest.fixture
def program() -> Program:
    """The network on disk as ``small.graph``, 96 samples as ``x.npy`` and their classes as ``y.npy``."""
    generator = torch.Generator().manual_seed(0)
    weights = {param.name: 0.4 * torch.randn(param.type.shape, generator=generator) for param in GRAPH.params}  # type: ignore[union-attr]
    program = Program(GRAPH, weights)
    Path("small.graph").write_text(str(GRAPH))
    save_weights(weights, Path("small.safetensors"))
    x = torch.randn(96, 12, generator=generator)
    np.save("x.npy", x.numpy())
    np.save("y.npy", program.module()(x)[0].argmax(1).numpy())
    Path("plan.json").write_text(_plan(program, x).to_json())
    return program


def _plan(program: Program, x: torch.Tensor) -> Plan:
    target = load_target("null")
    ranges = calibrate(program, [(x,)], find_method("minmax"))
    chosen = {"first": "w8a8", "middle": "w4a4", "last": "w8a8"}
    steps = (Step("calibrate", ranges), Step(QUANTIZE, chosen), Step("lower-integer"), Step("drop-ranges"))
    return Plan(program.graph.fingerprint, target.name, (Phase(steps),))


WORDS = ("finetune", "small.graph", "--plan", "plan.json", "--data", "x.npy", "--batch", "16", "-o", "out")


def test_what_was_trained_is_exported_with_the_plan(program: Program, intarsia: Run) -> None:
    told = intarsia(*WORDS, "--labels", "y.npy", "--epochs", "4", "--learning-rate", "0.02", "--json")
    assert told.exit_code == 0, told.stderr
    facts = json.loads(told.stdout)
    assert facts["steps"] == 4 * (86 // 16), "a tenth of the samples is held out"
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert set(facts["after"]) == {"loss", "agreement", "accuracy"}
    weights = load_weights(Path("out/weights.safetensors"), GRAPH.params)
    assert not torch.equal(weights["b"], program.weights["b"])
    assert Path("out/plan.json").read_text() == Path("plan.json").read_text()
    words = ("export", "small.graph", "--plan", "out/plan.json", "--weights", "out/weights.safetensors")
    built = intarsia(*words, "--target", "null", "--backend", "null", "-o", "bundle")
    assert built.exit_code == 0, built.stderr
    again = intarsia(*WORDS, "--labels", "y.npy", "--epochs", "4", "--learning-rate", "0.02")
    assert again.exit_code == 0, again.stderr
    assert "20 steps, loss" in again.stdout
    assert "held out after: loss" in again.stdout


def test_a_function_yields_the_calls_of_an_epoch_with_labels_behind_the_inputs(program: Program, intarsia: Run) -> None:
    lines = (
        "import torch",
        "def data(epoch):",
        "    for number in range(3):",
        "        x = torch.full((8, 12), float(epoch + number))",
        "        yield x, torch.zeros(8, dtype=torch.int64)",
        "def plain():",
        "    yield torch.ones(5, 12)",
    )
    Path("loader.py").write_text("\n".join(lines))
    found = list(function_calls("loader.py:data", GRAPH)(2))
    assert [float(call.inputs[0][0, 0]) for call in found] == [2.0, 3.0, 4.0]
    assert all(call.labels is not None for call in found)
    assert [call.labels for call in function_calls("loader.py:plain", GRAPH)(0)] == [None]
    words = [*WORDS, "--steps", "4", "--held-out", "x.npy", "--held-out-labels", "y.npy", "--json"]
    words[words.index("x.npy")] = "loader.py:data"
    told = intarsia(*words)
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["after"]["accuracy"] is not None


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own(program: Program) -> None:
    found = read_samples("x.npy", Path("y.npy"), GRAPH, None, option="--labels")
    rows = [torch.cat([call.inputs[0] for call in found.epoch(number, each=16, seed=0)]) for number in (0, 1, 0)]
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0].sort(0).values, rows[1].sort(0).values)
    kept, held = found.split(0.25, seed=0)
    assert (len(kept), len(held)) == (72, 24)
    assert torch.equal(torch.cat([kept.inputs[0], held.inputs[0]]).sort(0).values, rows[0].sort(0).values)


def test_a_graph_of_fixed_calls_adds_their_gradients_up(program: Program, intarsia: Run) -> None:
    Path("fixed.graph").write_text(str(FIXED))
    save_weights(program.weights, Path("fixed.safetensors"))
    plan = replace(Plan.load(Path("plan.json")), graph=FIXED.fingerprint)
    Path("fixed.json").write_text(plan.to_json())
    words = ("--data", "x.npy", "--epochs", "1", "--held-out", "x.npy", "--json")
    open_ = intarsia("finetune", "small.graph", "--plan", "plan.json", "--batch", "16", "-o", "open", *words)
    fixed = intarsia("finetune", "fixed.graph", "--plan", "fixed.json", "--batch", "16", "-o", "fixed", *words)
    assert fixed.exit_code == open_.exit_code == 0, fixed.stderr
    after = [json.loads(told.stdout)["after"]["loss"] for told in (fixed, open_)]
    assert after[0] == pytest.approx(after[1], rel=1e-3)
    odd = intarsia("finetune", "fixed.graph", "--plan", "fixed.json", "--batch", "12", "-o", "odd", *words)
    assert odd.exit_code == 2
    assert "--batch 12: graph small takes 8 samples a call; give a multiple of it" in odd.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "--data nowhere: there is no such file or folder"),
        (("--labels", "few.npy"), "--labels few.npy: has 95 labels; there are 96 samples"),
        (("--labels", "x.npy"), "--labels x.npy: holds float32 (96, 12); expected one whole number a sample"),
        (("--labels", "high.npy"), "fine-tuning: labels lie from 4 to 4; the network has classes 0 to 3"),
        (("--batch", "500"), "--data x.npy: 86 samples to train on; one step takes 500: --batch"),
        (("--plan", "bare.json"), "the plan has no quantize-integer: nothing is rounded"),
        (("--plan", "other.json"), "the plan was made for 0123456789ab"),
        (("--epochs", "1", "--steps", "1"), "--epochs and --steps exclude each other; give one of them"),
        (("--data", "loader.py:data"), "nobody knows how many calls a function yields; give --steps"),
        (("--optimizer", "magic"), "optimizer 'magic' is unknown. Known: sgd, adamw"),
        (("--learning-rate", "-1"), "fine-tuning: the learning rate is -1.0; it is above 0"),
        (("-o", "x.npy"), "-o x.npy: a file stands where a folder is to be written"),
        (("-o", "taken"), "taken holds other files and no checkpoint.safetensors; give a new folder"),
    ],
)
def test_what_does_not_fit_is_one_line(program: Program, intarsia: Run, options: tuple[str, ...], message: str) -> None:
    np.save("few.npy", np.zeros(95, np.int64))
    np.save("high.npy", np.full(96, 4))
    Path("loader.py").write_text("def data():\n    yield None")
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    plan = Plan.load(Path("plan.json"))
    bare = replace(plan, phases=(Phase(plan.phases[0].steps[:1]),))
    Path("bare.json").write_text(bare.to_json())
    Path("other.json").write_text(replace(plan, graph="0123456789ab").to_json())
    words = [*WORDS]
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key in words:
            words[words.index(key) + 1] = value
        else:
            words += [key, value]
    told = intarsia(*words)
    assert told.exit_code == 2, told.stdout
    assert message in told.stderr
    assert len([line for line in told.stderr.splitlines() if "error" in line]) <= 1
    assert not Path("out/weights.safetensors").exists()


def test_a_process_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    program: Program, intarsia: Run, start: Callable[..., subprocess.Popen[str]]
) -> None:
    lines = (
        "import os, signal, torch",
        "def data(epoch):",
        "    for number in range(4):",
        "        if (epoch, number) == (1, 2) and os.path.exists('armed'):",
        "            os.remove('armed')",
        "            os.kill(os.getpid(), signal.SIGKILL)",
        "        yield torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * epoch + number))",
    )
    Path("loader.py").write_text("\n".join(lines))
    words = ["finetune", "small.graph", "--plan", "plan.json", "--data", "loader.py:data", "--steps", "12"]
    assert intarsia(*words, "-o", "whole").exit_code == 0
    Path("armed").touch()
    often = "import intarsia.search.finetune_training as training; training.CHECKPOINT_SECONDS = 0.0"
    killed = start(*words, "-o", "torn", before=often)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("torn/weights.safetensors").exists()
    told = intarsia(*words, "-o", "torn")
    assert told.exit_code == 0, told.stderr
    assert Path("torn/weights.safetensors").read_bytes() == Path("whole/weights.safetensors").read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in Path(f, "log.jsonl").read_text().splitlines()] for f in ("whole", "torn")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_numbers_that_overflow_stop_it_with_exit_code_4(program: Program, intarsia: Run) -> None:
    told = intarsia(*WORDS, "--epochs", "2", "--learning-rate", "1e30")
    assert told.exit_code == 4
    assert "no checkpoint was made yet" in told.stderr or "the checkpoint before it stays in out" in told.stderr


def test_other_settings_than_the_checkpoints(program: Program, intarsia: Run) -> None:
    assert intarsia(*WORDS, "--epochs", "1").exit_code == 0
    told = intarsia(*WORDS, "--epochs", "1", "--learning-rate", "0.5")
    assert told.exit_code == 2
    assert "out: its checkpoint was made with learning_rate 0.01, now it is 0.5; give a new folder" in told.stderr


def test_a_registered_model_is_trained_with_whole_batches(intarsia: Run) -> None:
    found = subject.resolve("resnet20-cifar10").program
    target = load_target("null")
    folded = Program(find_pass("fold-batch-norm").run(found.graph, target, {}), found.weights)
    pictures = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.save("pictures.npy", pictures.numpy())
    ranges = calibrate(folded, [(pictures[:1],)], find_method("minmax"))
    offered = find_pass(QUANTIZE).choices(find_pass("calibrate").run(folded.graph, target, ranges), target)
    chosen = {place: options[-1] for place, options in offered.items()}
    steps = (Step("fold-batch-norm"), Step("calibrate", ranges), Step(QUANTIZE, chosen))
    Path("cifar.json").write_text(Plan(found.graph.fingerprint, "null", (Phase(steps),)).to_json())
    words = ("--plan", "cifar.json", "--data", "pictures.npy", "--batch", "10", "--steps", "1", "-o", "out")
    told = intarsia("finetune", "resnet20-cifar10", *words)
    assert told.exit_code == 0, told.stderr
    tuned = models.load(models.find("resnet20-cifar10"), weights=Path("out/weights.safetensors")).state_dict()
    assert not torch.equal(tuned["conv.weight"], found.weights["conv.weight"])
    assert torch.equal(tuned["norm.running_var"], found.weights["norm.running_var"])
