"""Plans as JSON that people read and edit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intarsia.ir.errors import PlanError
from intarsia.ir.plan import Phase, Plan, Step

PLAN = Plan(
    graph="0123456789ab",
    target="h200",
    phases=(
        Phase((Step("clean"), Step("quantize-linear(min_rows=64)", {"blocks.0.to_q": "i4(group=32)"})), 0, 9),
        Phase((Step("clean"),), 10, None),
    ),
    notes={"goal": "psnr>=35"},
)
JSON = """\
{
  "graph": "0123456789ab",
  "notes": {
    "goal": "psnr>=35"
  },
  "phases": [
    {
      "first": 0,
      "last": 9,
      "steps": [
        {
          "chosen": {},
          "run": "clean"
        },
        {
          "chosen": {
            "blocks.0.to_q": "i4(group=32)"
          },
          "run": "quantize-linear(min_rows=64)"
        }
      ]
    },
    {
      "first": 10,
      "last": null,
      "steps": [
        {
          "chosen": {},
          "run": "clean"
        }
      ]
    }
  ],
  "target": "h200",
  "version": 1
}
"""


def test_a_plan_prints_as_json_that_reads_back_the_same() -> None:
    assert PLAN.to_json() == JSON
    assert Plan.from_json(JSON) == PLAN


def test_a_plan_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(JSON)
    assert Plan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "{,", "plan: not JSON, line 1, column 2: "),
        (JSON, "[]", "plan: expected an object with graph, notes, phases, target, version, found []"),
        ('  "version": 1', '  "version": 2', "plan: version 2; this Intarsia reads version 1"),
        ('  "version": 1', '  "version": 1, "machine": "x"', "plan: unknown key 'machine'"),
        ('  "target": "h200",\n', "", "plan: no key 'target'"),
        ('"h200"', "200", "plan: target is 200, not a string"),
        ('{\n    "goal": "psnr>=35"\n  }', "3", "plan: notes is 3, not an object"),
        ('"first": 0', '"first": "a"', "plan: phases[0]: first and last are step numbers (last may be null)"),
        ('"first": 0', '"first": 1', "plan: phases[0] starts at step 1, not at 0"),
        ('"first": 10', '"first": 11', "plan: phases[1] starts at step 11, not at 10"),
        ('"last": 9', '"last": null', "plan: phases[0] ends at step None, not at 0 or later"),
        ('"last": null', '"last": 3', "plan: phases[1] ends at step 3, not at 10 or later"),
        ('"run": "clean"', '"run": 3', "plan: phases[0].steps[0]: run is a pass such as"),
        ('"run": "clean"', '"ran": "clean"', "plan: phases[0].steps[0]: unknown key 'ran'"),
        ('"chosen": {}', '"chosen": []', "plan: phases[0].steps[0]: chosen maps places to options, found []"),
        ('"i4(group=32)"', "4", "plan: phases[0].steps[1]: chosen maps places to options"),
    ],
)
def test_a_broken_plan_is_told_by_the_place_and_the_rule(old: str, new: str, message: str) -> None:
    assert old in JSON
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.from_json(JSON.replace(old, new, 1))


def test_a_plan_has_at_least_one_phase() -> None:
    with pytest.raises(PlanError, match="plan: no phases; a plan has at least one"):
        Plan.from_json('{"graph": "a", "notes": {}, "phases": [], "target": "b", "version": 1}')
    with pytest.raises(PlanError, match="plan: expected a list, found 3"):
        Plan.from_json('{"graph": "a", "notes": {}, "phases": 3, "target": "b", "version": 1}')


def test_a_file_that_cannot_be_read_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json: cannot be read as a plan: No such file"):
        Plan.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\0")
    with pytest.raises(PlanError, match=r"binary\.json: cannot be read as a plan: not text"):
        Plan.load(tmp_path / "binary.json")
