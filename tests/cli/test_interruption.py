"""Ctrl-C and SIGTERM in the middle of a verb: code 130, one line, nothing under the final name."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., subprocess.Popen[str]]

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
        if not Path("fast").exists():
            time.sleep(60)
        return graph
"""

STUCK = """
import time
from pathlib import Path
from intarsia import {home}

def stuck(*_, **__):
    Path("begun").touch()
    time.sleep(60)

{home}.{verb} = stuck
"""


def stopped(process: subprocess.Popen[str], number: int) -> str:
    """Its stderr, once it was signalled in the middle of its work and has ended with 130."""
    deadline = time.monotonic() + 60
    while not Path("begun").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the work never began"
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert err.splitlines()[-1].startswith("intarsia: interrupted: ")
    return err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["search", "optimize"])
def test_a_search_that_is_stopped_leaves_nothing_and_can_go_on(tiny: Path, start: Start, verb, number):
    Path("slow.py").write_text(SLOW)
    words = [verb, str(tiny), "--target", "null", "--quality", "psnr>=30", "--pass", "./slow.py:Slow", "-o", "made"]
    err = stopped(start(*words), number)
    assert "the same command goes on from there" in err
    assert left() == ["begun", "slow.py", "tiny.graph", "tiny.safetensors"]


def test_an_export_that_is_stopped_keeps_the_bundle_that_was_there(tiny: Path, start: Start, optimized: Path):
    from intarsia.ir.plan import Phase, Plan, Step

    Path("slow.py").write_text(SLOW)
    plan = Plan.load(optimized / "plan.json")
    Path("plan.json").write_text(Plan(plan.graph, "null", (Phase((Step("./slow.py:Slow"),)),)).to_json())
    before = {path: path.read_bytes() for path in optimized.rglob("*") if path.is_file()}
    stopped(start("export", str(tiny), "--target", "null", "--plan", "plan.json", "-o", "out"), signal.SIGINT)
    assert {path: path.read_bytes() for path in optimized.rglob("*") if path.is_file()} == before
    assert left() == ["begun", "out", "plan.json", "slow.py", "tiny.graph", "tiny.safetensors"]


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("trace", ["wan-mini", "-o", "made.graph"]),
        ("inspect", ["wan-mini"]),
        ("verify", ["out"]),
        ("run", ["out", "-o", "made"]),
        ("bench", ["out"]),
    ],
)
def test_every_other_long_verb_stops_as_clean(start: Start, verb, words):
    err = stopped(
        start(verb, *words, before=STUCK.format(home="inspection" if verb == "inspect" else "flow", verb=verb)),
        signal.SIGINT,
    )
    assert "the same command starts over" in err
    assert left() == ["begun"]


def test_a_stopped_verb_with_json_still_prints_one_document(start: Start):
    import json

    process = start("verify", "out", "--json", before=STUCK.format(home="flow", verb="verify"))
    while not Path("begun").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert json.loads(out)["exit_code"] == 130


def left() -> list[str]:
    """Everything in the working folder, hidden files too."""
    return sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")
