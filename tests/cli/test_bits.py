"""``--strategy bits`` on the command line: to a verified engine and a report, killed in the middle, and misused."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import Result

from intarsia.ir.graph import Graph
from intarsia.ir.program import save_weights

PICTURES = """graph pictures {
  input %x: f32[2, 3, 8, 8]
  param %w1: f32[16, 3, 3, 3]
  param %w2: f32[16, 16, 3, 3]
  param %w3: f32[16, 16, 3, 3]
  param %w4: f32[5, 1024]
  %first: f32[2, 16, 8, 8] = aten.conv2d(input=%x, weight=%w1, bias=None, stride=[1, 1], padding=[1, 1])
  %a: f32[2, 16, 8, 8] = aten.relu(self=%first)
  %second: f32[2, 16, 8, 8] = aten.conv2d(input=%a, weight=%w2, bias=None, stride=[1, 1], padding=[1, 1])
  %b: f32[2, 16, 8, 8] = aten.relu(self=%second)
  %third: f32[2, 16, 8, 8] = aten.conv2d(input=%b, weight=%w3, bias=None, stride=[1, 1], padding=[1, 1])
  %c: f32[2, 16, 8, 8] = aten.relu(self=%third)
  %flat: f32[2, 1024] = aten.flatten.using_ints(self=%c, start_dim=1, end_dim=3)
  %classes: f32[2, 5] = aten.linear(input=%flat, weight=%w4)
  return %classes
}
"""

Run = Callable[..., Result]
BITS = ("--strategy", "bits(bops=0.5)", "--target", "null")

BEFORE = """
import time
from pathlib import Path
from intarsia.search.journal import Journal
put, count = Journal.put, [0]
def slow(self, key, value):
    put(self, key, value)
    count[0] += 1
    if count[0] == 4:
        Path("begun").touch()
        time.sleep(60)
Journal.put = slow
"""


@pytest.fixture
def pictures() -> Path:
    """A network of four layers for pictures of 8 x 8 as a graph with weights, and ``data.npy`` with twelve samples."""
    path, generator = Path("pictures.graph"), torch.Generator().manual_seed(0)
    path.write_text(PICTURES)
    params = Graph.parse(PICTURES).params
    weights = {value.name: torch.randn(value.type.shape, generator=generator) / 8 for value in params}  # type: ignore[union-attr]
    save_weights(weights, path.with_suffix(".safetensors"))
    np.save("data.npy", torch.randn(12, 3, 8, 8, generator=generator).numpy())
    np.save("labels.npy", np.arange(12) % 5)
    return path


def test_a_search_leads_to_an_engine_of_integers_that_verifies_and_a_page_about_it(pictures: Path, intarsia: Run):
    result = intarsia("search", pictures, *BITS, "--data", "data.npy", "-o", "plan.json")
    assert result.exit_code == 0, result.stderr
    assert "plan.json: layers 1 at w4a4, 3 at w8a8" in result.stdout
    assert "quality    not measured: no goal asks for it" in result.stdout
    assert "--strategy 'bits(bops=0.5)' --data data.npy" in result.stderr.splitlines()[-1]

    told = intarsia("explain", pictures, "--plan", "plan.json")
    assert "no other choice within them has a smaller sum of errors" in told.stdout
    assert "integers   only" in told.stdout
    row = next(
        r
        for r in json.loads(intarsia("explain", pictures, "--plan", "plan.json", "--json").stdout)["rows"]
        if r["chosen"] == "w4a4"
    )
    one = intarsia("explain", pictures, "--plan", "plan.json", "--place", row["place"]).stdout
    assert "95 % interval" in one
    assert "bit operations" in one
    assert "w4a4 *" in one

    exported = intarsia("export", pictures, "--plan", "plan.json", "--target", "null", "-o", "out")
    assert exported.exit_code == 0, exported.stderr
    verified = intarsia("verify", "out", "--json")
    assert verified.exit_code == 0, verified.stderr
    checks = {check["name"]: check["detail"] for check in json.loads(verified.stdout)["checks"]}
    assert checks["onnx: fresh inputs"].endswith("equal, as integers are")
    page = Path("out/report.html").read_text()
    assert "Bits of each layer" in page
    assert page.count('class="m2" x=') == 3
    assert "Quality on random inputs" in page


def test_labels_of_samples_are_what_the_hessian_is_of(pictures: Path, intarsia: Run):
    words = ("--strategy", "bits(bops=0.5, sensitivity='hessian', samples=4)", "--target", "null", "--data", "data.npy")
    result = intarsia("search", pictures, *words, "--labels", "labels.npy", "--samples", "8", "--json", "-o", "p.json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["complete"] is True
    notes = json.loads(Path("p.json").read_text())["notes"]
    assert (notes["samples"], notes["labels"]) == (8, True)
    assert "Hessian" in notes["error_is"]


def test_a_killed_search_goes_on_to_the_same_plan(
    pictures: Path, intarsia: Run, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
):
    words = ("search", str(pictures), *BITS, "--data", "data.npy")
    process = start(*words, "-o", "plan.json", before=BEFORE)
    deadline = time.monotonic() + 120
    while not Path("begun").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the work never began"
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)
    assert not Path("plan.json").exists()
    assert intarsia(*words, "-o", "plan.json").exit_code == 0
    monkeypatch.setenv("INTARSIA_CACHE_DIR", "elsewhere")
    assert intarsia(*words, "-o", "other.json").exit_code == 0
    assert Path("plan.json").read_text() == Path("other.json").read_text()


def test_optimize_searches_bits_without_a_quality(pictures: Path, intarsia: Run):
    result = intarsia("optimize", pictures, *BITS, "--data", "data.npy", "--backend", "null", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert intarsia("verify", "out").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (BITS, "strategy bits: --data is missing"),
        ((*BITS, "--mean", "0.5"), "--mean is given without --data"),
        ((*BITS, "--data", "data.npy", "--mean", "0.5"), "--std is missing"),
        ((*BITS, "--data", "data.npy", "--pass", "clean"), "strategy bits: it has passes of its own; leave --pass out"),
        ((*BITS, "--data", "data.npy", "--quality", "psnr>=30"), "--quality is measured on whole answers of a loop"),
        ((*BITS, "--data", "none.npy"), "--data none.npy: there is no such file or folder"),
        ((*BITS, "--data", "data.npy", "--labels", "data.npy"), "--labels data.npy: holds float32"),
        (("--target", "null", "--quality", "psnr>=30", "--data", "data.npy"), "--strategy places takes none"),
        (("--target", "null", "--strategy", "bits(phases=2)", "--data", "data.npy"), "has no loop, and so no phases"),
        (("--target", "null", "--strategy", "bits(bops=2)"), "strategy bits: bops=2: a number without a unit is a"),
        (("--target", "null", "--strategy", "bits(bobs=1)", "--data", "data.npy"), "unknown key 'bobs'"),
        (("--target", "null", "--strategy", "bits(costs='measured')", "--data", "data.npy"), "are those of this"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(pictures: Path, intarsia: Run, words: tuple[str, ...], said: str):
    result = intarsia("search", pictures, *words, "-o", "plan.json")
    assert result.exit_code == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("intarsia: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not Path("plan.json").exists()


def test_a_model_with_a_loop_takes_no_data(intarsia: Run):
    Path("data.npy").touch()
    result = intarsia("search", "wan-mini", *BITS, "--data", "data.npy", "-o", "plan.json")
    assert result.exit_code == 2
    assert "wan-mini has a loop of its own" in result.stderr
