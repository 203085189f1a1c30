"""Configuration files: the keys are the options; command line before file before default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from intarsia.configuration import seconds, sizes
from intarsia.ir.errors import UsageError

Run = Callable[..., Result]


def test_a_file_gives_options_and_the_command_line_comes_first(tiny: Path, intarsia: Run):
    Path("c.toml").write_text('target = "h100"\nquality = "psnr>=30"\nminimize = "bytes"\nseed = 4\nfresh = true\n')
    result = intarsia("search", tiny, "--config", "c.toml", "--target", "null", "-o", "plan.json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "reproduce: intarsia search tiny.graph --target null --quality 'psnr>=30' --minimize bytes --seed 4 "
        "-o plan.json"
    )


def test_lists_and_arguments_come_from_a_file_too(tiny: Path, intarsia: Run):
    values = {"model": str(tiny), "target": "null", "quality": "psnr>=30", "pass": ["clean", "quantize-linear"]}
    Path("c.json").write_text(json.dumps(values))
    result = intarsia("search", "--config", "c.json", "-o", "plan.json")
    assert result.exit_code == 0, result.stderr
    steps = json.loads(Path("plan.json").read_text())["phases"][0]["steps"]
    assert [step["run"] for step in steps] == ["clean", "quantize-linear"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.toml", "qualty = 'psnr>=30'", ["unknown key 'qualty'", "did you mean quality?", "search takes"]),
        ("c.toml", "seed = ", ["c.toml", "not TOML"]),
        ("c.json", "{'seed': 1}", ["c.json", "not JSON"]),
        ("c.json", "[1]", ["c.json", "keys and values"]),
        ("c.toml", "pass = 'clean'", ["pass is a list"]),
        ("c.toml", "[target]\nname = 'h200'", ["target is one value"]),
        ("c.toml", "effort = 'huge'", ["huge", "quick"]),
        ("absent.toml", None, ["absent.toml", "No such file"]),
    ],
)
def test_a_wrong_file_is_answered_in_one_line(tiny: Path, intarsia: Run, name, text, said):
    if text is not None:
        Path(name).write_text(text)
    words = ("search", tiny, "--target", "null", "--quality", "psnr>=30", "-o", "plan.json")
    words = words[:2] + words[4:] if "target" in (text or "") else words
    result = intarsia(*words, "--config", name)
    assert result.exit_code == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    for word in said:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), ("0.5s", 0.5), (None, None)],
)
def test_times_are_read_as_people_write_them(text, expected):
    assert seconds(text) == expected


@given(st.lists(st.tuples(st.integers(1, 99), st.sampled_from("smh")), min_size=1, max_size=3))
def test_a_time_is_the_sum_of_its_parts(parts: list[tuple[int, str]]):
    expected = sum(number * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)
    assert seconds("".join(f"{number}{unit}" for number, unit in parts)) == expected


@pytest.mark.parametrize("text", ["", "soon", "20 m", "m20", "1d", "-5m", "0s", "1.2.3s", "20mx"])
def test_a_wrong_time_is_answered_with_a_right_one(text: str):
    with pytest.raises(UsageError, match="such as 90s, 20m or 1h30m"):
        seconds(text)


def test_sizes_are_numbers_by_name():
    assert sizes(["batch=2", "frames=21"]) == {"batch": 2, "frames": 21}


@pytest.mark.parametrize("text", ["batch", "=2", "batch=", "batch=two", "batch=0", "batch=-1", "batch=2.5"])
def test_a_wrong_size_is_answered_with_a_right_one(text):
    with pytest.raises(UsageError, match="such as batch=2"):
        sizes([text])
