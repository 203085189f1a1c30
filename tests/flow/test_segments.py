"""Plans that cut a step into segments, all the way, for the first block of wan-mini in a loop of four steps."""

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
from intarsia.backends.bundle import Bundle, fingerprints
from intarsia.backends.manifest import canonical, entry_of, files_below, read_manifest, sealed
from intarsia.backends.segmented import SegmentedEngine
from intarsia.evidence import timing_of
from intarsia.ir.errors import PlanError, QualityError, Unsupported
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.models import wan
from intarsia.models.base import Model
from intarsia.models.sampler import FlowMatchEuler, noise
from intarsia.report import render
from intarsia.subject import Subject, resolve
from intarsia.summaries import bundled, inspected, timed

KEYS = "blocks.0.attn2.to_k.linear"
SAMPLER = FlowMatchEuler(steps=4, shift=3.0, guidance=3.0)
PROMPTS = ("red disc moving left", "blue square moving up")
HOIST = Step("hoist-invariants")
POLICY = "allocation(warm_up=1, tail=1, shares=(1.0,), divisors=(2,), smooth=False)"
EVERY_SECOND = Step(f"active-tokens(allocation={POLICY!r})")
WHOLE = wan.wan_mini


def first_block() -> Model:
    """wan-mini cut down to its first block, for videos of two small frames."""
    whole = WHOLE()

    def build() -> nn.Module:
        module = whole.build()
        module.blocks = module.blocks[:1]
        return module

    def inputs() -> dict[str, torch.Tensor]:
        video = noise((3, 2, 16, 16), seed=0, count=2).to(torch.get_default_device())
        return {**whole.inputs(), "hidden_states": video}

    return replace(whole, build=build, inputs=inputs, weights=None, sampler=SAMPLER)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "wan_mini", first_block)
        patch.setitem(subjects.SAMPLES, "quick", {"calibration": 1, "validation": 1, "held-out": 2})  # type: ignore[arg-type]
        patch.setattr("intarsia.evidence.timing_of", partial(timing_of, repeats=2))
        yield


@pytest.fixture(scope="module")
def subject() -> Subject:
    return resolve("wan-mini")


def export(subject: Subject, output: Path, *steps: Step, backends: tuple[str, ...] = ("null",)) -> Bundle:
    plan = Plan(subject.program.graph.fingerprint, "cpu-avx2", (Phase(steps),))
    return intarsia.export(subject, plan, backends=backends, target="cpu-avx2", output=output, effort="quick")


@pytest.fixture(scope="module")
def bundle(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("cut") / "out"
    quantized = Step("quantize-linear(min_rows=1)", {KEYS: "i8"})
    return export(subject, folder, quantized, HOIST, backends=("onnx", "null"))


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle that may be spoilt."""
    shutil.copytree(bundle.folder, tmp_path / "out")
    return tmp_path / "out"


def test_the_whole_has_a_graph_and_a_sample_and_each_segment_has_them_and_engines(bundle: Bundle) -> None:
    assert [name for name in files_below(bundle.folder) if "segment-0" in name] == [
        "engine/null/segment-0/model.graph",
        "engine/null/segment-0/model.safetensors",
        "engine/onnx/segment-0/model.onnx",
        "segment-0/model.graph",
        "segment-0/sample.safetensors",
    ]
    assert not (bundle.folder / "engine/onnx/model.onnx").exists()
    assert bundle.manifest["schema"] == 4
    once, step = (variant.graph for variant in bundle.segments)
    assert once.producers[KEYS].op == "intarsia.linear_i8"
    assert bundle.graph.producers[KEYS] == once.producers[KEYS]
    assert {*once.values, *step.values} == {*bundle.graph.values}


def test_weights_are_stored_once_and_each_engine_holds_those_of_its_segment(bundle: Bundle) -> None:
    stored = load_file(bundle.folder / "weights.safetensors")
    assert set(stored) == {param.name for param in bundle.graph.params}
    once, step = (variant.program.weights.keys() for variant in bundle.segments)
    assert once | step == set(stored)
    assert set(load_file(bundle.folder / "engine/null/segment-0/model.safetensors")) >= once - step


def test_verify_checks_every_segment_the_whole_and_the_quality(bundle: Bundle) -> None:
    report = intarsia.verify(bundle.folder, full=True)
    names = [check.name for check in report.checks]
    assert report.passed
    assert names[-1] == "quality"
    assert "segments" in names
    for backend in ("onnx", "null"):
        assert {f"{backend}: stored sample", f"{backend}: fresh inputs"} <= {*names}
        for segment in ("segment 0 of 2", "segment 1 of 2"):
            assert {f"{backend}, {segment}: structure", f"{backend}, {segment}: stored sample"} <= {*names}
    programs = {variant.phase: variant.program for variant in bundle.variants}
    found = fingerprints(programs, bundle.plan, [variant.graph for variant in bundle.segments])
    assert bundle.manifest["fingerprints"] == found
    assert {"graph", "weights", "graph of segment 0", "graph of segment 1", "plan"} == {*found}


@pytest.mark.parametrize("name", ["segment-1/model.graph", "segment-0/sample.safetensors", "sample.safetensors"])
def test_a_flipped_byte_in_a_file_of_any_segment_is_found(copy: Path, name: str) -> None:
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


def test_a_segment_that_leaves_out_a_call_with_fitting_hashes_is_found(copy: Path, bundle: Bundle) -> None:
    graph = bundle.segments[1].graph
    last, claimed = graph.nodes[-1], bundle.manifest["fingerprints"]
    shorter = replace(graph, nodes=graph.nodes[:-1], outputs=(last.inputs[0],))
    (copy / "segment-1/model.graph").write_text(str(shorter))
    reseal(copy, fingerprints={**claimed, "graph of segment 1": shorter.fingerprint})
    with pytest.raises(QualityError, match=f"%{last.name} of wan-mini is in no segment"):
        intarsia.verify(copy)


def test_an_engine_with_other_weights_and_fitting_hashes_breaks_the_segment_s_stored_answer(copy: Path) -> None:
    from safetensors.torch import save_file

    path = copy / "engine/null/segment-0/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    reseal(copy)
    with pytest.raises(QualityError, match="segment 0 of 2: the engine on the stored sample against its stored answer"):
        intarsia.verify(copy, engine="null")


def test_an_engine_that_the_manifest_says_nothing_of_is_named(copy: Path, bundle: Bundle) -> None:
    engines = {
        name: {**claims, "segments": {"0": claims["segments"]["0"]}}
        for name, claims in bundle.manifest["engines"].items()
    }
    reseal(copy, engines=engines)
    with pytest.raises(QualityError, match="the manifest lists no engine of null, segment 1 of 2"):
        intarsia.load(copy).engine("null")


def test_run_makes_the_videos_of_a_bundle_that_is_not_cut(subject: Subject, bundle: Bundle, tmp_path: Path) -> None:
    uncut = export(subject, tmp_path / "uncut", Step("quantize-linear(min_rows=1)", {KEYS: "i8"}))
    ours, _ = intarsia.run(bundle.folder, output=tmp_path / "ours", prompts=PROMPTS, seed=5, engine="null")
    theirs, _ = intarsia.run(uncut.folder, output=tmp_path / "theirs", prompts=PROMPTS, seed=5)
    assert len(ours) > len(PROMPTS)
    for one, other in zip(ours, theirs, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_engine_takes_the_model_s_inputs_and_hands_out_its_segments(bundle: Bundle) -> None:
    engine = bundle.engine("onnx")
    assert isinstance(engine, SegmentedEngine)
    assert engine.once == (0,)
    assert [segment.graph for segment in engine.segments] == [variant.graph for variant in bundle.segments]
    (found,) = engine(*bundle.sample.inputs)
    assert torch.equal(found, bundle.sample.engines["onnx"][0])


def test_bench_tells_a_step_from_what_runs_once(bundle: Bundle) -> None:
    facts = intarsia.bench(bundle.folder, engine="null", repeats=2)
    segments, phases = facts["segments"], facts["phases"]
    assert isinstance(segments, list)
    assert isinstance(phases, list)
    assert [one["once"] for one in segments] == [True, False]
    assert [(one["first"], one["last"]) for one in phases] == [(0, 0), (1, 3)]
    assert phases[0]["seconds"] == pytest.approx(phases[1]["seconds"] + segments[0]["seconds"])
    assert facts["loop_seconds"] == pytest.approx(4 * phases[1]["seconds"] + segments[0]["seconds"])
    said = [str(line) for line in timed(facts)]
    assert any(line.startswith("segment 0  ") and "once for each prompt" in line for line in said)


def test_prediction_inspection_and_report_tell_the_segments(bundle: Bundle) -> None:
    predicted = bundle.manifest["predicted"]
    once, step = (one["seconds"] for one in predicted["segments"])
    assert predicted["seconds"] == pytest.approx(step + once / SAMPLER.steps)
    facts = intarsia.inspect(bundle.folder)
    assert [one["once"] for one in json.loads(json.dumps(facts))["segments"]] == [True, False]
    assert sum(one["flops"] for one in facts["segments"]) == facts["flops"]
    titles = [str(line) for line in inspected(facts) if str(line).startswith("segment")]
    assert titles == ["segment 0 of 2, once for each prompt", "segment 1 of 2"]
    page = render(bundle.folder)
    assert "<h2>Segments of a step</h2>" in page
    assert "<tr><td>0</td><td>once for each prompt</td>" in page
    assert any(str(line).startswith("segment 1  ") for line in bundled(bundle)[1])


def test_active_tokens_compute_the_text_once_and_give_the_same_videos(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "resolve", lambda *_, **__: subject)  # traced once for the whole module
    cut = export(subject, tmp_path / "cut", EVERY_SECOND, HOIST)
    uncut = export(subject, tmp_path / "uncut", EVERY_SECOND)
    assert intarsia.verify(cut.folder).passed
    assert [value.name for value in cut.segments[0].graph.inputs] == ["encoder_hidden_states"]
    ours, _ = intarsia.run(cut.folder, output=tmp_path / "ours", prompts=PROMPTS, seed=5)
    theirs, _ = intarsia.run(uncut.folder, output=tmp_path / "theirs", prompts=PROMPTS, seed=5)
    for one, other in zip(ours, theirs, strict=True):
        assert one.read_bytes() == other.read_bytes()
    facts = intarsia.bench(cut.folder, repeats=2)
    phases, segments = facts["phases"], facts["segments"]
    assert isinstance(phases, list)
    assert isinstance(segments, list)
    assert [(one["first"], one["last"]) for one in phases] == [(0, 0), (1, 1), (2, 3)]
    assert phases[0]["seconds"] == pytest.approx(phases[2]["seconds"] + segments[0]["seconds"])
    assert phases[1]["seconds"] == 0
    each = cut.manifest["predicted"]["segments"]
    assert uncut.manifest["predicted"]["seconds"] - cut.manifest["predicted"]["seconds"] == pytest.approx(
        each[0]["seconds"] * 2 / SAMPLER.steps
    )


def test_plans_that_cannot_be_cut_are_one_line(subject: Subject, tmp_path: Path) -> None:
    graph = subject.program.graph
    phases = Plan(graph.fingerprint, "cpu-avx2", (Phase((HOIST,), 0, 1), Phase((HOIST,), 2)))
    asked = {"backends": ["null"], "target": "cpu-avx2", "output": tmp_path / "out", "effort": "quick"}
    with pytest.raises(PlanError, match="hoist-invariants cuts a step into segments; give it one phase, not 2"):
        intarsia.export(subject, phases, **asked)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="hoist-invariants: tiny multiplies no weight by what anything else tells"):
        intarsia.export(str(_tiny(tmp_path)), None, passes=["hoist-invariants"], **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def _tiny(folder: Path) -> Path:
    (folder / "tiny.graph").write_text(
        "graph tiny {\n  input %x: f32[2]\n  %y: f32[2] = aten.relu(self=%x)\n  return %y\n}\n"
    )
    return folder / "tiny.graph"
