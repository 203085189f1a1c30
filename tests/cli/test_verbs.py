"""What each verb writes and prints, on a network small enough that all of them take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]
GOAL = ("--target", "null", "--quality", "psnr>=30")


def document(result: Result) -> dict:
    """The one JSON document on stdout."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_trace_is_text_with_weights_beside_it(tiny: Path, intarsia: Run):
    facts = document(intarsia("trace", tiny, "-o", "again.graph", "--json"))
    assert Path("again.graph").read_text() == tiny.read_text()
    assert Path("again.safetensors").read_bytes() == tiny.with_suffix(".safetensors").read_bytes()
    assert (facts["nodes"], facts["parameters"], facts["output"]) == (3, 2 * (64 * 64 + 64), "again.graph")


def test_inspect_counts_operations_and_predicts_seconds(tiny: Path, intarsia: Run):
    facts = document(intarsia("inspect", tiny, "--target", "h200", "--json"))
    assert facts["flops"] == 2 * 2 * 4 * 64 * 64
    assert facts["predicted_seconds"] > 0
    assert "linear" in intarsia("inspect", tiny, "--target", "h200").stdout


def test_inspect_takes_a_bundle_and_a_plan(optimized: Path, intarsia: Run):
    assert document(intarsia("inspect", optimized, "--json"))["kind"] == "bundle"
    assert document(intarsia("inspect", optimized / "plan.json", "--json"))["kind"] == "plan"
    assert "quantize-linear" in intarsia("inspect", optimized / "plan.json").stdout


def test_search_writes_a_plan_and_ends_with_the_command_that_repeats_it(tiny: Path, intarsia: Run):
    result = intarsia("search", tiny, *GOAL, "--minimize", "bytes", "--seed", 3, "-o", "plan.json", "--json")
    facts = document(result)
    assert facts["complete"] is True
    assert facts["predicted"]["bytes"] < facts["baseline"]["bytes"]
    assert json.loads(Path("plan.json").read_text())["target"] == "null"
    said = result.stderr.splitlines()[-1]
    assert said == (
        "reproduce: intarsia search tiny.graph --target null --quality 'psnr>=30' --minimize bytes --seed 3 "
        "-o plan.json"
    )


def test_the_command_that_repeats_a_search_gives_the_same_plan(tiny: Path, intarsia: Run):
    import shlex

    first = intarsia("search", tiny, *GOAL, "-o", "plan.json")
    plan = Path("plan.json").read_bytes()
    words = shlex.split(first.stderr.splitlines()[-1].removeprefix("reproduce: "))[1:]
    assert intarsia(*words, "--fresh").exit_code == 0
    assert Path("plan.json").read_bytes() == plan


def test_a_search_without_time_saves_the_best_so_far_and_says_so(tiny: Path, intarsia: Run):
    result = intarsia("search", tiny, *GOAL, "--budget", "0.001s", "-o", "plan.json")
    assert result.exit_code == 124
    assert "the best so far is saved" in result.stderr
    assert Path("plan.json").is_file()


def test_no_gain_fails_only_when_that_is_asked_for(tiny: Path, intarsia: Run):
    words = ("search", tiny, "--target", "null", "--quality", "psnr>=149", "-o", "plan.json")
    assert intarsia(*words).exit_code == 0
    assert "nothing was gained" in intarsia(*words).stdout
    Path("plan.json").unlink()
    result = intarsia(*words, "--fail-on-no-gain")
    assert result.exit_code == 5
    assert not Path("plan.json").exists()


def test_explain_tells_of_every_place_or_of_one(tiny: Path, optimized: Path, intarsia: Run):
    plan = optimized / "plan.json"
    assert [row["place"] for row in document(intarsia("explain", tiny, "--plan", plan, "--json"))["rows"]] == [
        "blocks.0.linear",
        "blocks.1.linear",
    ]
    one = document(intarsia("explain", tiny, "--plan", plan, "--place", "blocks.1.linear", "--json"))
    assert [row["place"] for row in one["rows"]] == ["blocks.1.linear"]
    assert one["rows"][0]["options"][0]["option"] == "keep"
    assert "i8" in intarsia("explain", tiny, "--plan", plan, "--place", "blocks.1.linear").stdout


def test_optimize_writes_a_bundle_that_verifies(optimized: Path, intarsia: Run):
    checks = document(intarsia("verify", optimized, "--json"))
    assert checks["passed"] is True
    assert "passed" in intarsia("verify", optimized).stdout


def test_a_bundle_says_what_made_it_but_not_where_it_was_put(tiny: Path, intarsia: Run):
    for folder in ("one", "elsewhere/two"):
        assert intarsia("optimize", tiny, *GOAL, "--backend", "null", "-o", folder).exit_code == 0
    first, second = (json.loads(Path(folder, "manifest.json").read_text()) for folder in ("one", "elsewhere/two"))
    assert first["command"] == ("intarsia optimize tiny.graph --target null --quality 'psnr>=30' --backend null -o out")
    assert first["seal"] == second["seal"]
    assert Path("one/config.json").read_bytes() == Path("elsewhere/two/config.json").read_bytes()


def test_the_configuration_in_a_bundle_repeats_the_run(optimized: Path, intarsia: Run):
    result = intarsia("optimize", "--config", optimized / "config.json", "-o", "again")
    assert result.exit_code == 0, result.stderr
    assert Path("again/plan.json").read_bytes() == (optimized / "plan.json").read_bytes()


def test_export_takes_a_plan_or_the_model_as_it_is(tiny: Path, optimized: Path, intarsia: Run):
    words = ("export", tiny, "--target", "null", "--backend", "null", "--json", "-o")
    small = document(intarsia(*words, "planned", "--plan", optimized / "plan.json"))
    large = document(intarsia(*words, "unchanged"))
    assert small["engine_bytes"] < large["engine_bytes"]


def test_an_export_that_misses_its_quality_leaves_nothing(tiny: Path, optimized: Path, intarsia: Run):
    words = ("export", tiny, "--target", "null", "--backend", "null", "--plan", optimized / "plan.json")
    result = intarsia(*words, "--quality", "psnr>=120", "-o", "planned")
    assert result.exit_code == 4
    assert not Path("planned").exists()


def test_bench_takes_a_bundle_or_a_model(tiny: Path, optimized: Path, intarsia: Run):
    for what in (optimized, tiny):
        facts = document(intarsia("bench", what, "--repeats", 3, "--json"))
        assert facts["low"] <= facts["seconds"] <= facts["high"]


def test_report_writes_a_page_anywhere(optimized: Path, intarsia: Run):
    assert document(intarsia("report", optimized, "-o", "pages/tiny.html", "--json"))["output"] == "pages/tiny.html"
    assert "blocks.0" in Path("pages/tiny.html").read_text()


@pytest.mark.parametrize("kind", ["models", "targets", "passes", "patterns", "kernels", "backends"])
def test_list_names_what_is_registered(intarsia: Run, kind):
    names = [entry["name"] for entry in document(intarsia("list", kind, "--json"))]
    expected = {
        "models": "wan-mini",
        "targets": "h200",
        "passes": "quantize-linear",
        "patterns": "vertical-stripe",
        "kernels": "intarsia.linear_i8",
        "backends": "onnx",
    }
    assert expected[kind] in names
    assert expected[kind] in intarsia("list", kind).stdout


def test_list_without_a_kind_lists_everything(intarsia: Run):
    kinds = {"models", "targets", "passes", "patterns", "kernels", "backends"}
    assert set(document(intarsia("list", "--json"))) == kinds


def test_everything_listed_is_what_the_registries_hold(intarsia: Run):
    from intarsia import kernels
    from intarsia.backends.base import BACKENDS
    from intarsia.models import names
    from intarsia.passes.base import PASSES
    from intarsia.passes.patterns.base import PATTERNS

    listed = document(intarsia("list", "--json"))
    for kind, known in (
        ("models", names()),
        ("passes", PASSES),
        ("patterns", PATTERNS),
        ("backends", BACKENDS),
        ("kernels", kernels.OPERATORS),
    ):
        assert [entry["name"] for entry in listed[kind]] == list(known)
        assert all(entry["summary"] for entry in listed[kind])


def test_help_and_version_are_on_stdout(intarsia: Run):
    assert "optimize" in intarsia().stdout
    assert "--effort" in intarsia("optimize", "--help").stdout
    assert intarsia("--version").stdout.startswith("intarsia 0.")
