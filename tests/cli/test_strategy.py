"""``--strategy`` on the command line: a search over heads to its end, stopped in the middle, and asked for nonsense."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from intarsia.ir.graph import Graph
from intarsia.ir.program import save_weights

LAYER = """graph layer {
  input %video: f32[1, 4, 4, 4, 4]
  param %patch: f32[8, 4, 1, 1, 1]
  %grid: f32[1, 8, 4, 4, 4] = aten.conv3d(input=%video, weight=%patch, bias=None)
  %flat: f32[1, 8, 64] = aten.flatten.using_ints(self=%grid, start_dim=2, end_dim=4)
  %tokens: f32[1, 64, 8] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
  %split: f32[1, 64, 2, 4] = aten.view(self=%tokens, size=[1, 64, 2, 4])
  %q: f32[1, 2, 64, 4] = aten.transpose.int(self=%split, dim0=1, dim1=2)
  %y: f32[1, 2, 64, 4] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  return %y
}
"""

SLOW = """
import time
from dataclasses import dataclass
from pathlib import Path
from intarsia.passes.base import Pass

@dataclass(frozen=True)
class Slow(Pass):
    name = "slow"

    def run(self, graph, target, chosen):
        Path("begun").touch()
        time.sleep(60)
        return graph
"""

Run = Callable[..., Result]
PASS = ("--pass", "sparse-attention(block=16)")
MACHINE = ("--target", "null")


@pytest.fixture
def layer() -> Path:
    """Attention of two heads over a video's tokens, as a graph with weights."""
    path = Path("layer.graph")
    path.write_text(LAYER)
    generator = torch.Generator().manual_seed(0)
    save_weights({"patch": torch.randn(8, 4, 1, 1, 1, generator=generator)}, path.with_suffix(".safetensors"))
    return path


def failed(result: Result, code: int, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("intarsia: ")]
    assert result.exit_code == code, result.stderr
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0]
    assert not Path("plan.json").exists()


def test_a_budget_of_pairs_gives_a_plan_that_keeps_it(layer: Path, intarsia: Run) -> None:
    words = (
        "search",
        layer,
        *MACHINE,
        *PASS,
        "--strategy",
        "heads(density=0.5)",
        "--effort",
        "quick",
        "-o",
        "plan.json",
    )
    result = intarsia(*words)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(Path("plan.json").read_text())
    assert plan["notes"]["density"] <= 0.5
    assert plan["notes"]["strategy"] == "heads(density=0.5)"
    assert set(plan["phases"][0]["steps"][0]["chosen"]) <= {"y#0", "y#1"}
    assert intarsia("explain", layer, "--plan", "plan.json").exit_code == 0


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("nonsense", ["--strategy 'nonsense' is unknown", "places, heads(key=value)"]),
        ("places(phases=2)", ["is unknown"]),
        ("heads(", ["expected 'name(key=value, ...)'"]),
        ("", ["expected 'name(key=value, ...)'"]),
        ("heads(density=1.5)", ["density is 1.5"]),
        ("heads(density='half')", ["density takes a float"]),
        ("heads(width=2)", ["unknown key 'width'", "density"]),
        ("heads", ["give --quality, or a budget"]),
        ("places", ["--quality is missing", "can do without"]),
    ],
)
def test_a_strategy_that_cannot_be_is_one_line(layer: Path, intarsia: Run, strategy: str, said: list[str]) -> None:
    failed(intarsia("search", layer, *MACHINE, *PASS, "--strategy", strategy, "-o", "plan.json"), 2, *said)


def test_a_budget_that_leaves_all_dense_is_no_gain_and_is_named(layer: Path, intarsia: Run) -> None:
    words = ("--strategy", "heads(density=1.0)", "--effort", "quick", "--fail-on-no-gain", "-o", "plan.json")
    failed(intarsia("search", layer, *MACHINE, *PASS, *words), 5, "unchanged model within heads(density=1.0)")


def test_an_unknown_strategy_is_told_before_the_model_is_traced(intarsia: Run) -> None:
    words = ("search", "wan-mini", *MACHINE, "--quality", "psnr>=30", "--strategy", "nonsense", "-o", "plan.json")
    failed(intarsia(*words), 2, "--strategy 'nonsense' is unknown")


def test_heads_without_their_pass_first_and_models_without_video_attention(
    layer: Path, tiny: Path, intarsia: Run
) -> None:
    strategy = ("--strategy", "heads(density=0.5)", "-o", "plan.json")
    failed(intarsia("search", layer, *MACHINE, *strategy), 2, "the first --pass is sparse-attention")
    failed(intarsia("search", tiny, *MACHINE, *PASS, *strategy), 3, "strategy heads: tiny calls no attention")


def test_a_search_over_heads_that_is_stopped_leaves_nothing_and_says_how_to_go_on(
    layer: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    Path("slow.py").write_text(SLOW)
    words = ["search", str(layer), *MACHINE, *PASS, "--pass", "./slow.py:Slow", "--strategy", "heads(density=0.5)"]
    process = start(*words, "-o", "plan.json")
    deadline = time.monotonic() + 60
    while not Path("begun").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the work never began"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("intarsia: interrupted: ")
    assert "the same command goes on from there" in err
    assert not Path("plan.json").exists()
    assert Graph.parse(layer.read_text()).name == "layer"
