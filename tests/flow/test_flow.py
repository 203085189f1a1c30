"""The whole job on a small network, through the public API, as a user's script would call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import intarsia
from intarsia.ir.errors import PlanError, QualityError, UsageError
from intarsia.ir.plan import Phase, Plan
from intarsia.ir.program import Program, save_weights
from intarsia.search.progress import Silent
from intarsia.subject import Subject, dynamic_axes, resolve, workload


class Mixer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 128)
        self.down = torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return intarsia.trace(Mixer().eval(), inputs={"x": torch.randn(4, 64)})


@pytest.fixture
def graph_file(program: Program, tmp_path: Path) -> Path:
    path = tmp_path / "mixer.graph"
    path.write_text(str(program.graph))
    save_weights(program.weights, path.with_suffix(".safetensors"))
    return path


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTARSIA_CACHE_DIR", str(tmp_path / "cache"))


def optimize(graph_file: Path, output: Path, quality: str = "psnr>=30"):
    return intarsia.optimize(
        graph_file, target="cpu-avx2", quality=quality, backends=("onnx",), effort="quick", output=output
    )


def test_a_graph_becomes_a_smaller_verified_engine_that_meets_the_goal(graph_file: Path, tmp_path: Path):
    bundle = optimize(graph_file, tmp_path / "out")
    held_out = bundle.manifest["quality"]["metrics"]["psnr"]
    assert held_out["mean"] >= 30 > held_out["floor"]
    assert bundle.manifest["predicted"]["bytes"] * 3 < bundle.manifest["predicted"]["baseline_bytes"]
    assert intarsia.verify(bundle.folder).passed
    assert (bundle.folder / "report.html").read_text().startswith("<!doctype html>")
    (answer,) = intarsia.load(bundle.folder).engine()(*bundle.sample.inputs)
    assert answer.shape == (4, 64)


def test_the_same_seed_gives_the_same_bytes_but_for_the_clock_and_the_report(graph_file: Path, tmp_path: Path):
    first, second = optimize(graph_file, tmp_path / "a"), optimize(graph_file, tmp_path / "b")
    varying = {"measurements.json", "report.html", "manifest.json"}
    names = sorted(str(path.relative_to(first.folder)) for path in first.folder.rglob("*") if path.is_file())
    for name in set(names) - varying:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    lines = [
        [line for line in (bundle.folder / "manifest.json").read_text().splitlines() if "measurements.json" not in line]
        for bundle in (first, second)
    ]
    assert lines[0] == lines[1]


def test_a_goal_out_of_reach_leaves_nothing_behind(graph_file: Path, tmp_path: Path):
    with pytest.raises(QualityError, match="psnr"):
        optimize(graph_file, tmp_path / "out", quality="psnr>=200")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [
        "mixer.graph",
        "mixer.safetensors",
    ]


def test_an_exported_plan_is_for_its_own_graph_only(graph_file: Path, tmp_path: Path):
    plan = intarsia.search(graph_file, target="cpu-avx2", quality="psnr>=30", effort="quick").plan
    text = graph_file.read_text().replace("graph Mixer", "graph Other")
    other = tmp_path / "other.graph"
    other.write_text(text)
    (tmp_path / "other.safetensors").write_bytes(graph_file.with_suffix(".safetensors").read_bytes())
    with pytest.raises(PlanError, match="fingerprint"):
        intarsia.export(other, plan, backends=("onnx",), target="cpu-avx2", output=tmp_path / "out")


def test_a_plan_of_several_phases_is_refused_for_a_network_without_steps(
    program: Program, graph_file: Path, tmp_path: Path
):
    plan = Plan(program.graph.fingerprint, "null", (Phase((), 0, 9), Phase((), 10, None)))
    with pytest.raises(PlanError, match="Mixer has no sampler and so no steps; the plan has 2 phases"):
        intarsia.export(graph_file, plan, backends=("null",), target="null", output=tmp_path / "out")


def test_search_is_a_verb_and_a_package(program: Program):
    from intarsia.search.quality import Goal

    assert Goal.parse("psnr>=3")
    assert callable(intarsia.search)


def test_inspect_counts_what_a_hand_count_gives(graph_file: Path):
    facts = intarsia.inspect(graph_file, target="h200")
    assert facts["flops"] == 2 * 4 * 64 * 128 * 2
    assert facts["parameters"] == 2 * 64 * 128 + 128 + 64
    assert json.loads(json.dumps(facts))["predicted_seconds"] > 0


def test_verify_in_full_makes_the_outputs_again(graph_file: Path, tmp_path: Path):
    bundle = optimize(graph_file, tmp_path / "out")
    with pytest.raises(UsageError, match="unknown"):
        intarsia.verify(bundle.folder, full=True)  # the unchanged model is known by its name only, and has none


def test_verify_in_full_refuses_to_compare_with_other_weights(
    program: Program, graph_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = optimize(graph_file, tmp_path / "out")
    subject = Subject("Mixer", program)
    monkeypatch.setattr("intarsia.subject.resolve", lambda *_, **__: subject)
    assert intarsia.verify(bundle.folder, full=True).checks[-1].name == "quality"
    other = Subject("Mixer", Program(program.graph, {name: 2 * tensor for name, tensor in program.weights.items()}))
    monkeypatch.setattr("intarsia.subject.resolve", lambda *_, **__: other)
    with pytest.raises(UsageError, match=r"measured against graph \w+ with weights \w+; Mixer here is"):
        intarsia.verify(bundle.folder, full=True)


def test_a_size_that_cannot_vary_is_named_with_those_that_can():
    with pytest.raises(UsageError, match=r"size 'depth' cannot vary; those that can are batch, frames, height"):
        dynamic_axes("wan-mini", ["depth"])
    assert dynamic_axes("wan-mini", ["batch"])["timestep"] == {0: "batch"}


def test_splits_share_no_inputs(graph_file: Path):
    seen: dict[str, list[bytes]] = {}
    work = workload(resolve(graph_file), seed=0, effort="quick", progress=Silent())
    for split in ("calibration", "validation", "held-out"):
        inputs: list[bytes] = seen.setdefault(split, [])

        def keep(x: torch.Tensor, inputs: list[bytes] = inputs) -> tuple[torch.Tensor, ...]:
            inputs.append(x.numpy().tobytes())
            return (x,)

        work.outputs(keep, split, Silent())
    everything = [item for inputs in seen.values() for item in inputs]
    assert len(everything) == len(set(everything))
