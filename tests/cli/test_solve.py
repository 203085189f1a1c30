"""``intarsia solve bits``: the bit string alone on stdout, or one JSON document; mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Run = Callable[..., Result]
PUBLISHED = Path(__file__).parents[1] / "search" / "data" / "hawqv3_resnet18_ilp.json"


def test_the_bit_string_alone_is_on_stdout(intarsia: Run):
    result = intarsia("solve", "bits", PUBLISHED, "--limit", "bops=0.5")
    assert (result.exit_code, result.stdout) == (0, "1110111101110000000\n")
    assert "bops: 66.5888 G of 67.8219 G" in result.stderr


def test_json_holds_the_choice_of_each_layer_and_what_is_used(intarsia: Run):
    result = intarsia("solve", "bits", PUBLISHED, "--limit", "size=6.5MiB", "--limit", "latency=0.5", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["chosen"]["0"] == "w8a8"
    assert len(data["bits"]) == len(data["chosen"]) == 19
    assert data["used"]["size"] <= data["limits"]["size"] == 6.5 * 2**20
    assert data["used"]["latency"] <= data["limits"]["latency"]


def test_what_cannot_be_kept_ends_with_code_2_and_says_by_how_much(intarsia: Run):
    result = intarsia("solve", "bits", PUBLISHED, "--limit", "size=5MiB")
    said = "intarsia: limit size=5 MiB cannot be kept: the smallest choice takes 5.32031 MiB, 0.320312 MiB more\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)


def test_no_limit_no_program_and_no_file_are_answered_in_one_line(intarsia: Run):
    without = intarsia("solve", "bits", PUBLISHED)
    assert without.exit_code == 2
    assert "Missing option '--limit'" in without.stderr
    alone = intarsia("solve")
    assert (alone.exit_code, alone.stderr) == (2, "intarsia: Missing command; see intarsia solve --help\n")
    absent = intarsia("solve", "bits", "absent.json", "--limit", "size=0.5")
    assert absent.exit_code == 2
    assert absent.stderr == "intarsia: absent.json: cannot be read: No such file or directory\n"
