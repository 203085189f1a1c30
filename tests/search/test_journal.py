"""A journal gives back what it was given, whatever happened to the process that wrote it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intarsia.ir.errors import MissingEnvironment
from intarsia.ir.program import Program
from intarsia.search.journal import Journal, journal_folder, open_journal


def test_what_was_put_is_found_again_to_the_last_digit(tmp_path: Path):
    path = tmp_path / "folder" / "a.jsonl"
    Journal(path).put("third", 1 / 3)
    again = Journal(path)
    assert (again.get("third"), again.get("other"), len(again), again.broken) == (1 / 3, None, 1, 0)


def test_a_line_cut_short_is_skipped_and_counted_and_the_next_one_is_whole(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    journal.put("one", 1.0)
    journal.put("two", 2.0)
    path.write_bytes(path.read_bytes()[:-7])
    cut = Journal(path)
    assert (cut.get("one"), cut.get("two"), cut.broken) == (1.0, None, 1)
    cut.put("two", 2.5)
    again = Journal(path)
    assert (again.get("one"), again.get("two"), again.broken) == (1.0, 2.5, 1)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"3", b'{"key": 3, "value": 1}', b'{"key": "a"}', b"NaN,"])
def test_lines_of_another_kind_are_counted_as_broken(tmp_path: Path, line: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    journal = Journal(path)
    assert (len(journal), journal.broken) == (0, 1)


def test_without_a_path_nothing_is_written():
    journal = Journal()
    journal.put("a", 1.0)
    assert journal.get("a") == 1.0


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(MissingEnvironment, match="INTARSIA_CACHE_DIR"):
        Journal(blocker / "a.jsonl").put("a", 1.0)


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("INTARSIA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert journal_folder() == tmp_path / "xdg" / "intarsia" / "journals"
    monkeypatch.setenv("INTARSIA_CACHE_DIR", str(tmp_path / "mine"))
    assert journal_folder() == tmp_path / "mine" / "journals"


def test_graph_weights_and_workload_each_have_a_journal_of_their_own(program, workload, monkeypatch, tmp_path):
    monkeypatch.setenv("INTARSIA_CACHE_DIR", str(tmp_path))
    base = open_journal(program, workload).path
    other_weights = {**program.weights, "w1": program.weights["w1"] + 1}
    other_graph = replace(program.graph, name="four")
    assert base == open_journal(program, workload).path
    paths = {
        base,
        open_journal(Program(program.graph, other_weights), workload).path,
        open_journal(Program(other_graph, program.weights), workload).path,
        open_journal(program, replace(workload, describe={"kind": "other"})).path,
    }
    assert len(paths) == 4


def test_fresh_forgets(program, workload, monkeypatch, tmp_path):
    monkeypatch.setenv("INTARSIA_CACHE_DIR", str(tmp_path))
    open_journal(program, workload).put("a", 1.0)
    assert open_journal(program, workload).get("a") == 1.0
    assert open_journal(program, workload, fresh=True).get("a") is None


def test_every_measurement_is_on_disk_when_put_returns(monkeypatch, tmp_path):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    Journal(tmp_path / "a.jsonl").put("a", float(torch.tensor(0.5)))
    assert len(synced) == 1
