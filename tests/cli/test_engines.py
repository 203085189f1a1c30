"""Engines of several backends from the command line, on a machine without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from intarsia.ir.plan import Phase, Plan

Run = Callable[..., Result]

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def both(tiny: Path, intarsia: Run) -> Path:
    """A bundle with an engine for a GPU and one for any machine."""
    pytest.importorskip("triton")
    words = ("export", tiny, "--target", "h100", "--backend", "triton", "--backend", "onnx", "-o", "out")
    result = intarsia(*words)
    assert result.exit_code == 0, result.stderr
    return Path("out")


@needs_no_gpu
def test_a_bundle_of_two_engines_says_which_could_not_run_here(both: Path, intarsia: Run):
    engines = json.loads((both / "manifest.json").read_text())["engines"]
    assert engines["onnx"]["sample"] == "its own"
    assert engines["triton"]["sample"].startswith("its reference's: no GPU that PyTorch can use")
    result = intarsia("verify", both)
    assert result.exit_code == 6
    assert "not run: triton does not run here: no GPU" in result.stderr
    assert intarsia("verify", both, "--reference").exit_code == 0
    assert intarsia("verify", both, "--backend", "onnx").exit_code == 0


@needs_no_gpu
def test_bench_takes_the_engine_that_runs_and_refuses_one_that_does_not(both: Path, intarsia: Run):
    facts = json.loads(intarsia("bench", both, "--repeats", "3", "--json").stdout)
    assert facts["engine"] == "onnx"
    result = intarsia("bench", both, "--backend", "triton")
    assert result.exit_code == 6
    assert "triton does not run here: no GPU" in result.stderr


def test_passes_stand_in_for_a_plan_and_are_kept_as_one(tiny: Path, intarsia: Run):
    words = (
        "export",
        tiny,
        "--target",
        "null",
        "--backend",
        "null",
        "--pass",
        "cast-floats(dtype='bf16')",
        "-o",
        "out",
    )
    assert intarsia(*words).exit_code == 0
    assert [step.run for step in Plan.load(Path("out/plan.json")).phases[0].steps] == ["cast-floats(dtype='bf16')"]
    assert intarsia("export", "--config", "out/config.json", "-o", "again").exit_code == 0
    assert Path("again/model.graph").read_bytes() == Path("out/model.graph").read_bytes()


def test_inspect_says_what_a_backend_would_make_of_a_graph(tiny: Path, intarsia: Run):
    words = ("inspect", tiny, "--target", "h100", "--backend", "triton")
    facts = json.loads(intarsia(*words, "--json").stdout)["backend"]
    assert facts == {
        "name": "triton",
        "target_refused": None,
        "put_in": {},
        "passed_over": {
            "drop-ranges": {},
            "fuse-kernels(everywhere=True)": {},
            "blend-means": {},
            "tables-of-blocks": {},
        },
        "refused": [],
    }
    assert "triton takes every operator" in intarsia(*words).stdout


def test_inspect_lists_each_refusal_with_its_place_and_line(intarsia: Run):
    Path("odd.graph").write_text(
        "graph odd {\n  input %x: f32[4]\n"
        "  %a: f32[4] = nowhere.first(self=%x)  # model.py:7\n"
        "  %b: f32[4] = nowhere.first(self=%a)  # model.py:8\n  return %b\n}\n"
    )
    words = ("inspect", "odd.graph", "--target", "null", "--backend", "null")
    (refused,) = json.loads(intarsia(*words, "--json").stdout)["backend"]["refused"]
    assert (refused["op"], refused["calls"], refused["place"], refused["source"]) == (
        "nowhere.first",
        2,
        "a",
        "model.py:7",
    )
    assert "model.py:7" in intarsia(*words).stdout
    result = intarsia("export", "odd.graph", "--target", "null", "--backend", "null", "-o", "out")
    assert result.exit_code == 3
    assert "nowhere.first: 2 calls, first %a (model.py:7)" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--target", "null", "--backend", "onxx"), 2, "backend 'onxx' is unknown; did you mean onnx?"),
        (("--target", "null", "--backend", "onnx(speed=3)"), 2, "onnx: unknown key 'speed'"),
        (("--target", "null", "--backend", "onnx("), 2, "expected 'name(key=value, ...)'"),
        (("--target", "null", "--backend", "null", "--backend", "null"), 2, "--backend null is given 2 times"),
        (("--target", "cpu-avx2", "--backend", "triton"), 3, "x86-64-v3 is no GPU that kernels are compiled for"),
        (("--target", "t4", "--backend", "triton"), 3, "sm_75 is no GPU that kernels are compiled for"),
        (("--target", "h100", "--backend", "triton(architectures='sm_75')"), 3, "sm_75 is no GPU"),
        (("--target", "null", "--pass", "cleann"), 2, "pass 'cleann' is unknown"),
        (("--target", "null", "--pass", "clean", "--plan", "tiny.json"), 2, "--plan and --pass exclude each other"),
    ],
)
def test_wrong_words_about_engines_are_answered_in_one_line(
    tiny: Path, intarsia: Run, words: tuple[str, ...], code: int, said: str
):
    from intarsia.ir.graph import Graph

    Path("tiny.json").write_text(Plan(Graph.parse(tiny.read_text()).fingerprint, "null", (Phase(()),)).to_json())
    result = intarsia("export", tiny, *words, "-o", "out")
    assert result.exit_code == code, result.stderr
    assert said in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "tiny.graph", "--backend", "onnx"), "what a backend takes depends on the machine; give --target"),
        (("bench", "tiny.graph", "--backend", "onnx"), "tiny.graph is no bundle, whose engine onnx could be timed"),
        (("verify", "out", "--backend", "tvm"), "out holds no engine of tvm, but of null"),
        (("bench", "out", "--backend", "tvm"), "out holds no engine of tvm, but of null"),
    ],
)
def test_an_engine_that_is_not_there_is_named_with_those_that_are(
    optimized: Path, intarsia: Run, words: tuple[str, ...], said: str
):
    result = intarsia(*words)
    assert result.exit_code == 2
    assert said in result.stderr
