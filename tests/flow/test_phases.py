"""A plan with phases all the way, for the first block of wan-mini in a loop of four steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import intarsia
from intarsia import subject as subjects
from intarsia.backends.bundle import Bundle
from intarsia.backends.by_step import by_step
from intarsia.backends.manifest import canonical, entry_of, files_below, read_manifest, sealed
from intarsia.backends.null import NullBackend, NullEngine
from intarsia.backends.phases import step_ranges
from intarsia.backends.runner import bench_loop, denoiser
from intarsia.ir.errors import PlanError, QualityError, UsageError
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import materialize
from intarsia.ir.target import load_target
from intarsia.looped import timing_of
from intarsia.models import wan
from intarsia.models.base import Model
from intarsia.models.sampler import FlowMatchEuler, noise
from intarsia.passes.apply import apply
from intarsia.pictures import write_videos
from intarsia.report import render
from intarsia.search.progress import Silent
from intarsia.subject import Subject, resolve, sampled
from intarsia.summaries import bundled, explained, inspected, timed

UP, DOWN = "blocks.0.ffn.net.0.proj.linear", "blocks.0.ffn.net.2.linear"
SAMPLER = FlowMatchEuler(steps=4, shift=3.0, guidance=3.0)
PROMPTS = ("red disc moving left",)


def first_block() -> Model:
    """wan-mini cut down to its first block, for videos of two small frames."""
    whole = WHOLE()

    def build() -> nn.Module:
        module = whole.build()
        module.blocks = module.blocks[:1]
        return module

    def inputs() -> dict[str, torch.Tensor]:
        device = torch.get_default_device()
        video = noise((3, 2, 16, 16), seed=0, count=2).to(device)
        return {**whole.inputs(), "hidden_states": video}

    return replace(whole, build=build, inputs=inputs, weights=None, sampler=SAMPLER)


WHOLE = wan.wan_mini


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "wan_mini", first_block)
        patch.setitem(subjects.SAMPLES, "quick", {"calibration": 1, "validation": 1, "held-out": 2})  # type: ignore[arg-type]
        patch.setattr("intarsia.evidence.bench_loop", partial(bench_loop, repeats=2))
        patch.setattr("intarsia.evidence.timing_of", partial(timing_of, repeats=2))
        yield


@pytest.fixture(scope="module")
def subject() -> Subject:
    return resolve("wan-mini")


def steps(up: str, down: str = "i8") -> tuple[Step, ...]:
    return (Step("quantize-linear(min_rows=64)", {UP: up, DOWN: down}),)


EARLY, LATE = steps("i8"), steps("i4(group=32)")


def plan_of(subject: Subject, *phases: Phase) -> Plan:
    return Plan(subject.program.graph.fingerprint, "cpu-avx2", phases)


@pytest.fixture(scope="module")
def plan(subject: Subject) -> Plan:
    """One layer in eight bits early and in four bits late, another in eight bits throughout."""
    return plan_of(subject, Phase(EARLY, 0, 1), Phase(LATE, 2, None))


def export(subject: Subject, plan: Plan, output: Path, *backends: str) -> Bundle:
    return intarsia.export(
        subject, plan, backends=backends or ("null",), target="cpu-avx2", output=output, effort="quick"
    )


@pytest.fixture(scope="module")
def bundle(subject: Subject, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(subject, plan, tmp_path_factory.mktemp("phased") / "out", "onnx", "null")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle that may be spoilt."""
    shutil.copytree(bundle.folder, tmp_path / "out")
    return tmp_path / "out"


def test_each_phase_has_a_graph_a_sample_and_an_engine_of_each_backend(bundle: Bundle) -> None:
    later = [name for name in files_below(bundle.folder) if "phase-1" in name]
    assert later == [
        "engine/null/phase-1/model.graph",
        "engine/null/phase-1/model.safetensors",
        "engine/onnx/phase-1/model.onnx",
        "phase-1/model.graph",
        "phase-1/sample.safetensors",
    ]
    assert bundle.manifest["schema"] == 3
    assert [(one.first, one.last, one.program) for one in bundle.phases] == [(0, 1, 0), (2, 3, 1)]
    timesteps = SAMPLER.timesteps()
    assert [one.timesteps for one in bundle.phases] == [tuple(timesteps[:2]), tuple(timesteps[2:])]
    assert "linear_i4" not in (bundle.folder / "model.graph").read_text()
    assert "linear_i4" in (bundle.folder / "phase-1/model.graph").read_text()


def test_weights_that_phases_share_are_stored_once_and_others_under_names_of_their_own(bundle: Bundle) -> None:
    early, late = (variant.program for variant in bundle.variants)
    stored = load_file(bundle.folder / "weights.safetensors")
    assert set(stored) == {*early.weights, *late.weights}
    assert set(early.weights) - set(late.weights) == {f"{UP}.i8", f"{UP}.scale"}
    assert set(late.weights) - set(early.weights) == {f"{UP}.i4", f"{UP}.scale.phase1"}
    assert early.weights[f"{UP}.scale"].shape == (512,)
    assert late.weights[f"{UP}.scale.phase1"].shape == (512, 4)


def test_verify_checks_every_phase_and_the_quality(bundle: Bundle) -> None:
    report = intarsia.verify(bundle.folder, full=True)
    names = [check.name for check in report.checks]
    assert report.passed
    for backend in ("onnx", "null"):
        for phase in ("phase 0 (steps 0 to 1)", "phase 1 (steps 2 to 3)"):
            for what in ("structure", "stored sample", "fresh inputs"):
                assert f"{backend}, {phase}: {what}" in names
    assert names[-2:] == ["phases", "quality"]
    assert {"graph of phase 1", "weights of phase 1"} <= bundle.manifest["fingerprints"].keys()


@pytest.mark.parametrize(
    "name",
    ["phase-1/model.graph", "phase-1/sample.safetensors", "engine/onnx/phase-1/model.onnx", "weights.safetensors"],
)
def test_a_flipped_byte_in_a_file_of_any_phase_is_found(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(QualityError, match=f"{name} has been altered"):
        intarsia.verify(copy)


def reseal(folder: Path, **changes: object) -> None:
    """Make hashes and seal fit what the files now hold, as a forger would."""
    manifest = read_manifest(folder) | changes
    names = [name for name in files_below(folder) if name not in ("manifest.json", "report.html")]
    manifest["files"] = {name: entry_of(folder / name) for name in names}
    (folder / "manifest.json").write_text(canonical(sealed(manifest)))


def test_an_engine_of_another_phase_with_fitting_hashes_breaks_the_stored_answer(copy: Path) -> None:
    shutil.copy(copy / "engine/onnx/model.onnx", copy / "engine/onnx/phase-1/model.onnx")
    reseal(copy)
    with pytest.raises(QualityError, match=r"out, phase 1 \(steps 2 to 3\): the engine on the stored sample against"):
        intarsia.verify(copy)


def test_phases_that_are_not_those_of_the_plan_are_found(copy: Path, bundle: Bundle) -> None:
    first, second = (one.to_json() for one in bundle.phases)
    timesteps = SAMPLER.timesteps()
    moved = [first | {"last": 0, "timesteps": [timesteps[0]] * 2}, second | {"first": 1, "timesteps": timesteps[1::2]}]
    reseal(copy, phases=moved)
    with pytest.raises(QualityError, match=r"the manifest's phases are not those of plan.json and sampler.json"):
        intarsia.verify(copy)


def test_an_engine_that_the_manifest_says_nothing_of_is_named(copy: Path, bundle: Bundle) -> None:
    engines = {name: {**claims, "phases": {}} for name, claims in bundle.manifest["engines"].items()}
    reseal(copy, engines=engines)
    with pytest.raises(QualityError, match=r"lists no engine of null, phase 1 \(steps 2 to 3\)"):
        intarsia.load(copy).engine("null")


def test_a_plan_that_ends_elsewhere_than_the_sampler_is_found(copy: Path) -> None:
    (copy / "sampler.json").write_text(FlowMatchEuler(steps=2, shift=3.0, guidance=3.0).to_json())
    reseal(copy)
    with pytest.raises(QualityError, match="phase 1 is steps 2 to the last; the sampler's are 0 to 1"):
        intarsia.verify(copy)


def eager_videos(subject: Subject, plan: Plan, prompts: tuple[str, ...], *, seed: int) -> torch.Tensor:
    """Videos by two programs that PyTorch runs, switched by step."""
    target, graph = load_target("cpu-avx2"), subject.program.graph
    runs = [
        NullEngine(materialize(replace(subject.program, graph=apply(plan, graph, target, phase=phase))))
        for phase in range(2)
    ]
    run = by_step(runs, step_ranges(plan.phases, SAMPLER.timesteps()), graph)
    assert subject.model is not None
    return sampled(denoiser(run, graph), graph, subject.model, SAMPLER, prompts, seed=seed, progress=Silent())


def test_run_makes_the_videos_of_the_two_programs_switched_by_step(
    bundle: Bundle, subject: Subject, plan: Plan, tmp_path: Path
) -> None:
    expected = eager_videos(subject, plan, PROMPTS, seed=5)
    made, chosen = intarsia.run(bundle.folder, output=tmp_path / "made", prompts=PROMPTS, seed=5, engine="null")
    assert chosen.name == "null"
    for ours, theirs in zip(made, write_videos(expected, list(PROMPTS), tmp_path / "expected"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    onnx = bundle.choose("onnx").engine
    assert subject.model is not None
    videos = sampled(
        denoiser(onnx, bundle.graph), bundle.graph, subject.model, SAMPLER, PROMPTS, seed=5, progress=Silent()
    )
    assert torch.allclose(videos, expected, atol=1e-4)
    alone = sampled(
        denoiser(NullEngine(bundle.program), bundle.graph),
        bundle.graph,
        subject.model,
        SAMPLER,
        PROMPTS,
        seed=5,
        progress=Silent(),
    )
    assert not torch.allclose(videos, alone, atol=1e-4)


def test_bench_times_each_phase_and_adds_up_the_loop(bundle: Bundle) -> None:
    facts = intarsia.bench(bundle.folder, engine="null", repeats=3)
    each = facts["phases"]
    assert isinstance(each, list)
    assert [(one["first"], one["last"]) for one in each] == [(0, 1), (2, 3)]
    assert facts["loop_seconds"] == pytest.approx(2 * each[0]["seconds"] + 2 * each[1]["seconds"])
    assert facts["seconds"] == pytest.approx(facts["loop_seconds"] / 4)  # type: ignore[operator]
    assert [line.split(":")[0] for line in map(str, timed(facts))][2:4] == [
        "phase 0    steps 0 to 1",
        "phase 1    steps 2 to 3",
    ]


def test_inspect_tells_the_phases_of_a_bundle_and_of_a_plan(bundle: Bundle) -> None:
    facts = intarsia.inspect(bundle.folder, target="h200")
    assert json.loads(json.dumps(facts))["later"]["1"]["fingerprint"] != facts["fingerprint"]
    assert facts["weight_bytes"] > facts["later"]["1"]["weight_bytes"]
    lines = [str(line) for line in inspected(facts)]
    assert [line for line in lines if line.startswith("phase")] == ["phase 0 (steps 0 to 1)", "phase 1 (steps 2 to 3)"]
    lines = [str(line) for line in inspected(intarsia.inspect(bundle.folder / "plan.json"))]
    assert [line for line in lines if line.startswith("phase")] == [
        "phase 0: steps 0 to 1",
        "phase 1: steps 2 to the last",
    ]


def test_prediction_and_report_tell_the_phases_and_the_whole_loop(bundle: Bundle) -> None:
    predicted = bundle.manifest["predicted"]
    seconds = [one["seconds"] for one in predicted["phases"]]
    assert predicted["loop_seconds"] == pytest.approx(2 * sum(seconds))
    assert predicted["seconds"] == pytest.approx(sum(seconds) / 2)
    stored = load_file(bundle.folder / "weights.safetensors")
    assert predicted["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    page = render(bundle.folder)
    assert "<h2>Phases of the denoising loop</h2>" in page
    assert "<tr><td>1</td><td>2 to 3</td><td>its own</td>" in page
    data, lines = bundled(bundle)
    assert data["phases"] == bundle.manifest["phases"]
    assert any(str(line).startswith("phase 1    steps 2 to 3: ") for line in lines)


def test_phases_with_the_same_answers_share_an_engine(subject: Subject, tmp_path: Path) -> None:
    phases = (Phase(EARLY, 0, 0), Phase(LATE, 1, 2), Phase(EARLY, 3, 3))
    made = export(subject, plan_of(subject, *phases), tmp_path / "out")
    assert [one.program for one in made.phases] == [0, 1, 0]
    assert [variant.suffix for variant in made.variants] == [
        ", phases 0 and 2 (steps 0, 3)",
        ", phase 1 (steps 1 to 2)",
    ]
    assert not [name for name in files_below(made.folder) if "phase-2" in name]
    assert intarsia.verify(made.folder).passed


def test_phases_that_are_all_alike_are_one_program_at_every_step(subject: Subject, tmp_path: Path) -> None:
    made = export(subject, plan_of(subject, Phase(EARLY, 0, 0), Phase(EARLY, 1)), tmp_path / "out")
    assert [(one.first, one.last, one.program) for one in made.phases] == [(0, 0, 0), (1, 3, 0)]
    assert not [name for name in files_below(made.folder) if "phase" in name]
    assert intarsia.verify(made.folder).passed


def test_a_plan_of_one_phase_makes_the_bundle_of_a_plan_without_steps(subject: Subject, tmp_path: Path) -> None:
    closed = export(subject, plan_of(subject, Phase(EARLY, 0, 3)), tmp_path / "closed")
    opened = export(subject, plan_of(subject, Phase(EARLY)), tmp_path / "opened")
    assert closed.manifest["schema"] == opened.manifest["schema"] == 2
    assert "phases" not in closed.manifest
    assert files_below(closed.folder) == files_below(opened.folder)
    for name in ("model.graph", "weights.safetensors", "sample.safetensors", "engine/null/model.graph"):
        assert (closed.folder / name).read_bytes() == (opened.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ((Phase(EARLY, 0, 1), Phase(LATE, 2, 9)), "phase 1 is steps 2 to 9; the sampler's are 0 to 3"),
        ((Phase(EARLY, 0, 1), Phase(LATE, 2, 2)), "the last phase ends at step 2; the sampler goes on to 3"),
        ((Phase(EARLY, 0, 3), Phase(LATE, 4)), "phase 1 is steps 4 to the last; the sampler's are 0 to 3"),
        ((Phase(EARLY, 0, 1),), "the last phase ends at step 1; the sampler goes on to 3"),
    ],
)
def test_phases_that_do_not_fit_the_sampler_are_one_line(
    subject: Subject, tmp_path: Path, phases: tuple[Phase, ...], says: str
) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        export(subject, plan_of(subject, *phases), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_killed_between_two_phases_leaves_nothing(
    subject: Subject, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = NullBackend.build

    def killed(self, program, target, folder):  # type: ignore[no-untyped-def]
        if folder.name == "phase-1":
            raise KeyboardInterrupt
        return build(self, program, target, folder)

    monkeypatch.setattr(NullBackend, "build", killed)
    with pytest.raises(KeyboardInterrupt):
        export(subject, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_loop_of_several_programs_runs_no_call_that_belongs_to_two(bundle: Bundle) -> None:
    inputs = list(bundle.sample.inputs)
    place = [value.name for value in bundle.graph.inputs].index("timestep")
    inputs[place] = torch.tensor([SAMPLER.timesteps()[0], SAMPLER.timesteps()[3]])
    with pytest.raises(UsageError, match="timesteps of phases 0 and 1"):
        bundle.engine("null")(*inputs)


def test_explain_tells_what_was_chosen_in_each_phase(bundle: Bundle, plan: Plan) -> None:
    explanation = intarsia.explain("wan-mini", plan)
    assert {(row.phase, row.chosen) for row in explanation.rows if row.place == UP} == {(0, "i8"), (1, "i4(group=32)")}
    told = explained(explanation, UP)
    assert told is not None
    titles = [line for line in told[1] if isinstance(line, str) and line.startswith("phase")]
    assert titles == ["phase 0, steps 0 to 1", "phase 1, steps 2 to the last"]
    page = render(bundle.folder)
    assert "</code>, phase 0, steps 0 to 1. Rows" in page
    assert "</code>, phase 1, steps 2 to the last. Rows" in page
