"""The doctor: what is there, what is missing and what that costs; code 6 only when the core does not work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from intarsia import doctor
from intarsia.doctor import Part

Run = Callable[..., Result]


def test_a_working_core_is_said_so_with_code_0(intarsia: Run):
    result = intarsia("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert found["working"] is True
    assert {finding["name"] for finding in found["findings"]} >= {"torch", "onnx", "onnxruntime", "triton", "diffusers"}
    assert found["machine"]["cores"] >= 1


def test_a_person_reads_what_is_missing_what_it_costs_and_how_to_get_it(intarsia: Run, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", (Part(("no-such-thing",), "no_such_thing", "tvm", "no engines for TVM"),))
    lines = intarsia("doctor").stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if "no-such-thing" in line)
    assert lines[at].startswith("missing")
    assert "no engines for TVM" in lines[at + 1]
    assert "pip install 'intarsia[tvm]'" in lines[at + 2]


def test_another_version_than_was_tried_is_named_with_what_was(intarsia: Run, monkeypatch):
    """What is installed is there, in a version that our metadata does not take."""
    pytest.importorskip("tvm_ffi")
    monkeypatch.setattr(doctor, "_version", lambda part: (part.distributions[0], "0.1.15"))
    found = {finding["name"]: finding for finding in json.loads(intarsia("doctor", "--json").stdout)["findings"]}
    assert found["apache-tvm-ffi"]["status"] == "other"
    assert "it was tried with ==0.1.14.post0" in found["apache-tvm-ffi"]["costs"]
    assert found["apache-tvm-ffi"]["remedy"] == "pip install 'intarsia[tvm]'"


def test_a_missing_core_package_gives_code_6(intarsia: Run, monkeypatch):
    monkeypatch.setattr(doctor, "CORE", (Part(("no-such-thing",), "no_such_thing", "", "nothing works"),))
    result = intarsia("doctor")
    assert result.exit_code == 6
    assert "pip install 'no-such-thing'" in result.stdout


def test_a_core_package_that_raises_on_import_is_broken_and_the_rest_is_still_told(
    intarsia: Run, monkeypatch, tmp_path
):
    (tmp_path / "half_installed.py").write_text("raise AttributeError('no attribute nms')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        doctor, "CORE", (Part(("half-installed",), "half_installed", "", "nothing works"), *doctor.CORE)
    )
    result = intarsia("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert result.exit_code == 6
    assert found["half-installed"]["status"] == "broken"
    assert "no attribute nms" in found["half-installed"]["costs"]
    assert found["torch"]["status"] == "ok"


def test_a_cache_folder_that_cannot_be_written_gives_code_6(intarsia: Run, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("INTARSIA_CACHE_DIR", "file/cache")
    result = intarsia("doctor")
    assert result.exit_code == 6
    assert "set INTARSIA_CACHE_DIR" in result.stdout


@pytest.mark.parametrize(
    ("gpus", "features", "target"),
    [
        ([{"name": "NVIDIA H100 80GB HBM3"}], [], "h100"),
        ([{"name": "NVIDIA GeForce RTX 4090"}], [], "rtx4090"),
        ([], ["avx2"], "cpu-avx2"),
        ([], [], None),
    ],
)
def test_the_target_that_describes_this_machine_is_suggested(gpus, features, target):
    assert doctor.suggested_target(gpus, features) == target
