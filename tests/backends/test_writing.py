from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.backends.writing import check_destination, new_folder, replace_files
from intarsia.ir.errors import MissingEnvironment, UsageError

MARKER = "manifest.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out", marker=MARKER) as partial:
        (partial / MARKER).write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == [MARKER]


def write_half(folder: Path, error: BaseException) -> None:
    with new_folder(folder, marker=MARKER) as partial:
        (partial / "half").write_text("half")
        raise error


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ValueError(), SystemExit()])
def test_nothing_is_left_when_the_writer_stops(tmp_path: Path, stop: BaseException) -> None:
    with pytest.raises(type(stop)):
        write_half(tmp_path / "out", stop)
    assert names(tmp_path) == []


def test_an_earlier_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(out, marker=MARKER):
        raise KeyboardInterrupt
    assert (out / MARKER).read_text() == "old"
    with new_folder(out, marker=MARKER) as partial:
        assert (out / MARKER).read_text() == "old"
        (partial / MARKER).write_text("fresh")
    assert (out / MARKER).read_text() == "fresh"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", marker=MARKER) as partial:
        (partial / MARKER).write_text("{}")
    assert names(tmp_path / "out") == [MARKER]


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds other files and no manifest\.json"):
        check_destination(tmp_path, marker=MARKER)
    assert names(tmp_path) == ["thesis.txt"]


def test_a_file_is_no_destination_nor_a_parent_of_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_destination(tmp_path / "file", marker=MARKER)
    with pytest.raises(UsageError, match="file is a file"):
        check_destination(tmp_path / "file" / "out", marker=MARKER)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    with pytest.raises(MissingEnvironment, match="no room on the disk") as caught:
        write_half(tmp_path / "out", OSError(code, "full"))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_full_disk_that_safetensors_meets_is_told_alike(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(MissingEnvironment, match="no room on the disk"), new_folder(tmp_path / "out", marker=MARKER):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, code: int) -> None:
    with pytest.raises(UsageError, match="cannot be written") as caught, new_folder(tmp_path / "out", marker=MARKER):
        raise OSError(code, "no")
    assert "\n" not in str(caught.value)


def test_a_read_only_parent_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # who runs as root may write anywhere
    with pytest.raises(UsageError, match="read-only for you"):
        check_destination(tmp_path / "out", marker=MARKER)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out", marker=MARKER):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    replace_files(tmp_path, {"a": "fresh", "b": "more"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "fresh", "b": "more"}


def test_what_a_killed_process_left_goes_with_the_next_attempt(tmp_path: Path) -> None:
    """And what a process that still runs is writing, or another machine's, stays."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    left = tmp_path / f".out.partial-{platform.node()}-{child.pid}"
    others = [
        tmp_path / f".out.partial-{platform.node()}-{os.getppid()}",
        tmp_path / f".out.partial-elsewhere-{child.pid}",
    ]
    for path in (left, *others):
        path.mkdir()
        (path / "half").write_text("half")
    with new_folder(tmp_path / "out", marker="done") as partial:
        (partial / "done").write_text("")
    assert not left.exists()
    assert all((path / "half").exists() for path in others)
