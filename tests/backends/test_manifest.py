from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from intarsia.backends.manifest import canonical, read_manifest, read_sealed, sealed
from intarsia.ir.errors import QualityError, UsageError


def test_canonical_text_has_one_fact_a_line_and_sorted_keys() -> None:
    text = canonical({"b": [1, 2], "a": {"y": {"bytes": 1}, "x": None}, "c": {}})
    assert text == '{\n  "a": {\n    "x": null,\n    "y": {"bytes": 1}\n  },\n  "b": [1, 2],\n  "c": {}\n}\n'
    assert json.loads(text) == {"a": {"x": None, "y": {"bytes": 1}}, "b": [1, 2], "c": {}}


def test_infinities_are_written_as_strings_that_float_reads() -> None:
    written = json.loads(canonical({"psnr": math.inf, "nested": {"floor": (-math.inf,)}}))
    assert float(written["psnr"]) == math.inf
    assert float(written["nested"]["floor"][0]) == -math.inf


def test_the_seal_does_not_depend_on_the_line_of_the_measurements() -> None:
    files = {"model.graph": {"bytes": 1}, "measurements.json": {"bytes": 2}}
    other = {"model.graph": {"bytes": 1}, "measurements.json": {"bytes": 3}}
    assert sealed({"files": files})["seal"] == sealed({"files": other})["seal"]
    assert sealed({"files": files})["seal"] != sealed({"files": {**files, "model.graph": {"bytes": 9}}})["seal"]


@pytest.mark.parametrize(
    "change", [lambda t: t + " ", lambda t: t.replace('"x"', '"y"'), lambda t: t[:-3], lambda t: "[]"]
)
def test_a_sealed_text_that_changed_is_refused(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "facts.json"
    path.write_text(canonical(sealed({"x": 1})))
    assert read_sealed(path)["x"] == 1
    path.write_text(change(path.read_text()))
    with pytest.raises(QualityError, match=r"facts.json has been altered"):
        read_sealed(path)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no bundle: it holds no manifest.json"):
        read_manifest(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        read_manifest(tmp_path / "nothing")


def test_a_manifest_of_another_schema_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(canonical(sealed({"schema": 99, "files": {}})))
    with pytest.raises(UsageError, match="schema 99; this Intarsia reads schemas 2, 3 and 4"):
        read_manifest(tmp_path)
