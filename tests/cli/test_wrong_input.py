"""Every wrong input: one line that says what to do, the right exit code, nothing left under the final name."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
GOAL = ("--target", "null", "--quality", "psnr>=30")


def failed(result: Result, code: int, *words: str) -> str:
    """The one line on stderr; the code is as expected and nothing else was said."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("intarsia: ")]
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0]), "the error is the last that is said"
    assert result.stdout == ""
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimise"], ["No such command 'optimise'", "Did you mean 'optimize'"]),
        (["optimize", "m"], ["Missing option", "see intarsia optimize --help"]),
        (["optimize"], ["Missing argument", "model"]),
        (["list", "things"], ["things", "models"]),
        (["optimize", "m", *GOAL, "-o", "o", "--effort", "huge"], ["huge", "quick"]),
        (["optimize", "m", *GOAL, "-o", "o", "--budget", "soon"], ["--budget", "20m", "soon"]),
        (["optimize", "m", *GOAL, "-o", "o", "--fast"], ["--fast"]),
        (["inspect", "m", "--size", "batch"], ["--size", "batch=2"]),
        (["trace", "m", "-o", "m.txt"], ["m.txt", "NAME.graph"]),
    ],
)
def test_wrong_words_are_answered_in_one_line_with_code_2(intarsia: Run, words, said):
    failed(intarsia(*words), 2, *said)


def test_unknown_model(intarsia: Run):
    failed(intarsia("optimize", "wan-mimi", *GOAL, "-o", "out"), 2, "wan-mimi", "wan-mini")
    assert not Path("out").exists()


def test_unknown_target(tiny: Path, intarsia: Run):
    result = intarsia("optimize", tiny, "--target", "h2000", "--quality", "psnr>=30", "-o", "out")
    failed(result, 2, "h2000", "did you mean h200?")


def test_unknown_backend(tiny: Path, intarsia: Run):
    failed(intarsia("optimize", tiny, *GOAL, "--backend", "onix", "-o", "out"), 2, "onix", "onnx")


def test_unknown_pass_and_unknown_argument_of_a_pass(tiny: Path, intarsia: Run):
    failed(intarsia("optimize", tiny, *GOAL, "--pass", "quantise", "-o", "out"), 2, "quantise")
    wrong = intarsia("optimize", tiny, *GOAL, "--pass", "quantize-linear(rows=3)", "-o", "out")
    failed(wrong, 2, "rows", "min_rows")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nonsense", ["mine.py cannot be imported", "ModuleNotFoundError"]),
        ("class Mine(:", ["mine.py cannot be imported", "SyntaxError"]),
        ("class Mine: ...", ["mine.py defines no Pass called Mine"]),
        (None, ["there is no file mine.py"]),
    ],
)
def test_a_pass_of_the_users_own_that_cannot_be_read(tiny: Path, intarsia: Run, text, said):
    if text is not None:
        Path("mine.py").write_text(text)
    failed(intarsia("search", tiny, *GOAL, "--pass", "./mine.py:Mine", "-o", "plan.json"), 2, *said)


def test_a_pass_of_the_users_own_that_raises_is_named_with_its_line(tiny: Path, intarsia: Run):
    Path("mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from intarsia.passes.base import Pass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Pass):\n"
        "    name = 'mine'\n\n"
        "    def run(self, graph, target, chosen):\n"
        "        return graph.nodes[1_000]\n"
    )
    said = failed(intarsia("search", tiny, *GOAL, "--pass", "./mine.py:Mine", "-o", "plan.json"), 2, "IndexError")
    assert "mine.py:10: the pass raised" in said


def test_a_missing_graph_file(intarsia: Run):
    failed(intarsia("inspect", "absent.graph"), 2, "absent.graph", "No such file")


def test_broken_graph_text_with_its_line(tiny: Path, intarsia: Run):
    Path("broken.graph").write_text(tiny.read_text().replace("aten.relu(self=", "aten.relu(self"))
    failed(intarsia("inspect", "broken.graph"), 2, "line 8")


def test_missing_weights(tiny: Path, intarsia: Run):
    tiny.with_suffix(".safetensors").unlink()
    failed(intarsia("optimize", tiny, *GOAL, "-o", "out"), 2, "weights")


def test_a_quality_that_cannot_be_read(tiny: Path, intarsia: Run):
    failed(intarsia("search", tiny, "--target", "null", "--quality", "good", "-o", "plan.json"), 2, "good", "psnr>=35")


def test_a_quality_that_cannot_be_reached(tiny: Path, intarsia: Run):
    result = intarsia("search", tiny, "--target", "null", "--quality", "psnr>=400", "-o", "plan.json")
    failed(result, 4, "psnr>=400", "cannot be reached")
    assert not Path("plan.json").exists()


def test_a_plan_for_another_graph(tiny: Path, optimized: Path, intarsia: Run):
    tiny.write_text(tiny.read_text().replace("relu", "tanh"))
    result = intarsia("export", tiny, "--plan", optimized / "plan.json", "--target", "null", "-o", "again")
    failed(result, 2, "fingerprint")
    assert not Path("again").exists()


def test_a_plan_with_an_option_that_is_not_offered(tiny: Path, optimized: Path, intarsia: Run):
    plan = json.loads((optimized / "plan.json").read_text())
    plan["phases"][0]["steps"][0]["chosen"] = {"blocks.0.linear": "fp4"}
    Path("plan.json").write_text(json.dumps(plan))
    failed(intarsia("export", tiny, "--plan", "plan.json", "--target", "null", "-o", "again"), 2, "fp4", "keep, i8")
    failed(intarsia("explain", tiny, "--plan", "plan.json"), 2, "fp4", "keep, i8")


def test_a_plan_that_is_no_plan(tiny: Path, intarsia: Run):
    Path("plan.json").write_text("{]")
    failed(intarsia("export", tiny, "--plan", "plan.json", "--target", "null", "-o", "out"), 2, "plan.json", "JSON")
    failed(intarsia("export", tiny, "--plan", "absent.json", "--target", "null", "-o", "out"), 2, "absent.json")


def test_a_place_that_the_plan_does_not_know(tiny: Path, optimized: Path, intarsia: Run):
    result = intarsia("explain", tiny, "--plan", optimized / "plan.json", "--place", "blocks.7.linear")
    failed(result, 2, "blocks.7.linear", "blocks.0.linear")


def test_a_folder_that_is_no_bundle(intarsia: Run):
    Path("some").mkdir()
    for verb in (("verify", "some"), ("run", "some", "-o", "videos"), ("report", "some"), ("verify", "absent")):
        failed(intarsia(*verb), 2, verb[1])


def test_an_altered_and_a_missing_file_are_named_with_code_4(optimized: Path, intarsia: Run):
    data = bytearray((optimized / "model.graph").read_bytes())
    data[10] ^= 1
    (optimized / "model.graph").write_bytes(data)
    failed(intarsia("verify", optimized), 4, "model.graph")
    (optimized / "model.graph").unlink()
    failed(intarsia("verify", optimized), 4, "model.graph", "missing")


def test_a_network_without_a_sampler_makes_no_videos(optimized: Path, intarsia: Run):
    failed(intarsia("run", optimized, "--prompt", "red disc moving left", "-o", "videos"), 2, "tiny")
    assert not Path("videos").exists()


def test_a_folder_of_other_things_is_never_replaced(tiny: Path, intarsia: Run):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("keep me")
    failed(intarsia("optimize", tiny, *GOAL, "-o", "mine"), 2, "mine")
    failed(intarsia("optimize", tiny, *GOAL, "-o", "mine/letter.txt"), 2, "letter.txt")
    failed(intarsia("search", tiny, *GOAL, "-o", "mine"), 2, "mine")
    assert Path("mine/letter.txt").read_text() == "keep me"


def test_weights_of_an_earlier_trace_are_not_taken_for_those_of_a_trace_without(tiny: Path, intarsia: Run):
    failed(intarsia("trace", "wan-mini", "--meta", "-o", tiny), 2, "tiny.safetensors")


@pytest.fixture(params=["read-only", "full"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path):
    """A file system that takes nothing, and how it is called; where mounting is not allowed the test is left out."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = {"read-only": "size=1m,ro", "full": "size=8k"}[request.param]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system needs more rights")
    if request.param == "full":
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    yield folder, request.param
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("verb", ["trace", "search", "export", "optimize"])
def test_a_real_disk_that_is_full_or_read_only(tiny: Path, optimized: Path, intarsia: Run, small_disk, verb):
    folder, kind = small_disk
    words = {
        "trace": ["trace", tiny, "-o", folder / "made.graph"],
        "search": ["search", tiny, *GOAL, "-o", folder / "made.json"],
        "export": ["export", tiny, "--plan", optimized / "plan.json", "--target", "null", "-o", folder / "made"],
        "optimize": ["optimize", tiny, *GOAL, "--backend", "null", "-o", folder / "made"],
    }[verb]
    result = intarsia(*words)
    failed(result, {"read-only": 2, "full": 6}[kind], str(folder))
    assert [path.name for path in folder.iterdir() if path.name != "filler"] == []


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 6), (errno.EROFS, 2), (errno.EACCES, 2), (errno.EDQUOT, 6)]
)
def test_what_the_system_refuses_in_the_middle_of_writing(tiny, intarsia: Run, monkeypatch, number, code):
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    failed(intarsia("search", tiny, *GOAL, "-o", "plan.json"), code, os.strerror(number))
    assert sorted(path.name for path in Path().iterdir()) == ["tiny.graph", "tiny.safetensors"]


def test_a_bug_of_ours_is_called_one_and_leaves_a_log(tiny: Path, intarsia: Run, monkeypatch, tmp_path: Path):
    def break_(*_: object, **__: object) -> None:
        raise RuntimeError("the cat sat on it")

    monkeypatch.setattr("intarsia.inspection.inspect", break_)
    line = failed(intarsia("inspect", tiny), 1, "this is our bug", "the cat sat on it")
    log = Path(line.rsplit(" ", 1)[1])
    assert log.is_relative_to(tmp_path / "cache")
    assert "Traceback" in log.read_text()


def test_a_bug_of_ours_shows_its_traceback_when_asked_to(tiny: Path, intarsia: Run, monkeypatch):
    monkeypatch.setenv("INTARSIA_DEBUG", "1")
    monkeypatch.setattr("intarsia.inspection.inspect", lambda *_, **__: 1 / 0)
    result = intarsia("inspect", tiny)
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert "Traceback" in result.stderr


def test_a_missing_optional_package_is_named_with_what_brings_it(tiny: Path, intarsia: Run, monkeypatch):
    def import_it(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr("intarsia.inspection.inspect", import_it)
    failed(intarsia("inspect", tiny), 6, "diffusers", "pip install 'intarsia[models]'")


def test_many_reasons_are_cut_on_the_terminal_and_kept_whole_in_a_file(tiny: Path, intarsia: Run, monkeypatch):
    from intarsia.ir.errors import Unsupported

    def refuse(*_: object, **__: object) -> None:
        raise Unsupported("onnx cannot take 50 operators", [f"%node.{index}: unknown" for index in range(50)])

    monkeypatch.setattr("intarsia.inspection.inspect", refuse)
    result = intarsia("inspect", tiny)
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 22
    path = Path(result.stderr.split()[-1])
    assert "%node.49: unknown" in path.read_text()


def test_a_failure_with_json_is_one_document_that_says_so(intarsia: Run):
    result = intarsia("verify", "absent", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": json.loads(result.stdout)["error"], "exit_code": 2}
    assert "absent" in json.loads(result.stdout)["error"]
