from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from intarsia.backends.bundle import Bundle, Chosen, load_bundle
from intarsia.backends.manifest import files_below
from intarsia.backends.null import NullBackend, NullEngine
from intarsia.backends.packing import Build, Evidence, add_measurements, add_report, write_bundle
from intarsia.backends.verify import verify_bundle
from intarsia.ir.errors import QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, meta_weights
from intarsia.ir.target import Target


def test_a_bundle_holds_what_was_put_in(bundle: Bundle, program: Program, plan: Plan) -> None:
    found = load_bundle(bundle.folder)
    assert found.graph == program.graph
    assert found.plan == plan
    assert found.program.fingerprint() == program.fingerprint()
    assert found.sampler == '{"steps": 4}'
    assert found.config == {"seed": 0}
    assert found.measurements == {"seconds": 0.25}
    assert found.manifest["quality"] == {"psnr": "inf"}
    assert found.manifest["predicted"] == {"seconds": 0.5}
    assert found.manifest["command"] == "intarsia optimize two_layers -o out"
    assert found.manifest["target"]["name"] == "null"
    assert found.manifest["versions"]["torch"] == version("torch")
    assert found.engine_bytes == sum(path.stat().st_size for path in (found.folder / "engine/null").iterdir())
    assert torch.equal(found.engine()(*found.sample.inputs)[0], found.sample.reference[0])


def test_the_folder_holds_the_files_that_the_manual_lists(bundle: Bundle) -> None:
    assert files_below(bundle.folder) == [
        "config.json",
        "engine/null/model.graph",
        "engine/null/model.safetensors",
        "frames.png",
        "manifest.json",
        "measurements.json",
        "model.graph",
        "plan.json",
        "report.html",
        "sample.safetensors",
        "sampler.json",
        "weights.safetensors",
    ]


def test_plan_sampler_and_frames_are_left_out_where_there_are_none(
    tmp_path: Path, program: Program, target: Target
) -> None:
    made = write_bundle(
        tmp_path / "out",
        program=program,
        plan=None,
        builds=[Build(NullBackend(), program)],
        target=target,
        command="intarsia export",
    )
    assert made.plan is None
    assert made.sampler is None
    assert not {"plan.json", "sampler.json", "frames.png", "report.html"} & set(files_below(made.folder))
    assert verify_bundle(made.folder).passed


def written(folder: Path, program: Program, target: Target, seconds: float) -> dict[str, bytes]:
    made = write_bundle(
        folder,
        program=program,
        plan=None,
        builds=[Build(NullBackend(), program)],
        target=target,
        command="intarsia export",
        evidence=lambda _: Evidence(measurements={"seconds": seconds}),
    )
    add_report(made, f"<html>{seconds}</html>")
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def test_equal_inputs_give_equal_bytes_but_for_what_a_clock_said(
    tmp_path: Path, program: Program, target: Target
) -> None:
    first, second = (written(tmp_path / str(i), program, target, seconds=float(i)) for i in range(2))
    assert first.keys() == second.keys()
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"manifest.json", "measurements.json", "report.html"}
    lines = zip(first["manifest.json"].splitlines(), second["manifest.json"].splitlines(), strict=True)
    changed = [a for a, b in lines if a != b]
    assert len(changed) == 1
    assert b'"measurements.json"' in changed[0]


def test_measurements_and_report_may_be_added_later(bundle: Bundle) -> None:
    bundle = add_measurements(bundle, {"device": "a machine"})
    assert bundle.measurements == {"seconds": 0.25, "device": "a machine"}
    bundle = add_report(bundle, "<html>another</html>")
    assert (bundle.folder / "report.html").read_text() == "<html>another</html>"
    assert verify_bundle(bundle.folder).passed


def test_an_unsupported_operator_stops_before_anything_is_written(
    tmp_path: Path, target: Target, program: Program
) -> None:
    text = """graph g {
      input %x: f32[2]
      %a: f32[2] = nowhere.first(self=%x)  # model.py:1
      %b: f32[2] = nowhere.second(self=%a)  # model.py:2
      %c: f32[2] = nowhere.first(self=%b)  # model.py:3
      return %c
    }"""
    unknown = Program(Graph.parse(text), {})
    with pytest.raises(Unsupported) as caught:
        write_bundle(
            tmp_path / "out",
            program=unknown,
            plan=None,
            builds=[Build(NullBackend(), unknown)],
            target=target,
            command="",
        )
    first, second = caught.value.reasons
    assert first.startswith("nowhere.first: 2 calls, first %a (model.py:1): ")
    assert second.startswith("nowhere.second: 1 call, first %b (model.py:2): ")
    assert list(tmp_path.iterdir()) == []


def test_a_quality_that_is_not_met_leaves_nothing(tmp_path: Path, program: Program, target: Target) -> None:
    def evidence(chosen: Chosen | None) -> Evidence:
        raise QualityError("psnr 20 dB; 35 dB is asked for")

    with pytest.raises(QualityError):
        write_bundle(
            tmp_path / "out",
            program=program,
            plan=None,
            builds=[Build(NullBackend(), program)],
            target=target,
            command="",
            evidence=evidence,
        )
    assert list(tmp_path.iterdir()) == []


class _Wrong(NullBackend):
    """Answers a little too much."""

    def load(self, folder, files):  # type: ignore[no-untyped-def]
        engine = super().load(folder, files)

        class Wrong(NullEngine):
            def __call__(self, *inputs):  # type: ignore[no-untyped-def]
                return tuple(1.001 * answer for answer in engine(*inputs))

        return Wrong.__new__(Wrong)


def test_an_engine_that_answers_otherwise_than_the_reference_is_not_shipped(
    tmp_path: Path, program: Program, target: Target
) -> None:
    with pytest.raises(QualityError, match=r"null's engine differs from the reference's by 1.0e-03, 1e-04"):
        write_bundle(
            tmp_path / "out", program=program, plan=None, builds=[Build(_Wrong(), program)], target=target, command=""
        )
    assert list(tmp_path.iterdir()) == []


def test_meta_weights_make_no_bundle(tmp_path: Path, program: Program, target: Target) -> None:
    meta = Program(program.graph, meta_weights(program.graph.params))
    with pytest.raises(UsageError, match="on the meta device"):
        write_bundle(
            tmp_path / "out", program=meta, plan=None, builds=[Build(NullBackend(), meta)], target=target, command=""
        )


@pytest.mark.parametrize("name", ["sampler.json", "plan.json", "weights.safetensors", "sample.safetensors"])
def test_a_part_that_was_altered_is_not_used(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    path.write_bytes(path.read_bytes() + b" ")
    fresh = load_bundle(bundle.folder)
    with pytest.raises(QualityError, match=f"{name} has been altered"):
        _ = fresh.sampler, fresh.plan, fresh.program, fresh.sample


def test_an_altered_engine_is_not_run(bundle: Bundle) -> None:
    path = bundle.folder / "engine/null/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(QualityError, match=r"engine/null/model.safetensors has been altered"):
        load_bundle(bundle.folder).engine()
    path.unlink()
    with pytest.raises(QualityError, match=r"engine/null/model.safetensors is missing"):
        load_bundle(bundle.folder).engine()


def test_the_manifest_is_json_that_other_tools_read(bundle: Bundle) -> None:
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    assert manifest["files"]["plan.json"]["bytes"] == (bundle.folder / "plan.json").stat().st_size
