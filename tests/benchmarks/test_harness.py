"""The harness of the benchmarks: ratios, memory, and the document that results are kept as."""

from __future__ import annotations

import importlib
import json
import math
import operator
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "harness")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("harness")


def test_a_ratio_is_taken_in_turns_and_is_the_median_of_the_rounds(harness: ModuleType) -> None:
    calls: list[str] = []

    def first() -> None:
        calls.append("A")
        time.sleep(0.02)

    def second() -> None:
        calls.append("B")
        time.sleep(0.01)

    pair = harness.paired(first, second, rounds=5, warmup=1)
    assert "".join(calls) == "AB" * 6
    assert 1.2 < pair.ratio < 3.5
    assert pair.first > pair.second


def test_memory_is_that_of_a_process_of_its_own(harness: ModuleType) -> None:
    ballast = bytearray(300_000_000)
    small = harness.alone(math.factorial, 20)
    large = harness.alone(operator.mul, b"x", 200_000_000)
    assert small.result == math.factorial(20)
    assert small.peak_bytes < len(ballast)
    assert large.peak_bytes > small.peak_bytes + 150_000_000
    assert large.seconds > 0


def test_results_are_kept_as_one_json_document(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["example.py", *arguments])
        harness.main("example", {"a_seconds": "how long"}, lambda quick: {"a_seconds": 1.0 if quick else 2.0})

    run("--quick", "--json", "-")
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found.keys() == {"name", "device", "versions", "date", "figures"}
    assert found["figures"] == {"a_seconds": 1.0}
    assert found["versions"]["torch"]
    assert printed.err.split() == ["a_seconds", "1", "how", "long"]
    run("--json", str(tmp_path / "new" / "example.json"))
    assert json.loads((tmp_path / "new" / "example.json").read_text())["figures"] == {"a_seconds": 2.0}
    assert capsys.readouterr().out == ""


def test_a_figure_that_was_not_announced_is_an_error(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["example.py"])
    with pytest.raises(SystemExit, match=r"example: measured \['b'\], announced \['a'\]"):
        harness.main("example", {"a": "announced"}, lambda quick: {"b": 1.0})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_announces_its_figures_and_imports_nothing_heavy_for_it(harness: ModuleType, script: str) -> None:
    module = importlib.import_module(script)
    assert module.__doc__
    assert all(key.islower() and meaning for key, meaning in module.MEANINGS.items())
    assert callable(module.measure)


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_result_has_the_figures_that_its_script_announces(harness: ModuleType, path: Path) -> None:
    kept = json.loads(path.read_text())
    assert kept.keys() == {"name", "device", "versions", "date", "figures"}
    assert kept["figures"].keys() == importlib.import_module(kept["name"]).MEANINGS.keys()
