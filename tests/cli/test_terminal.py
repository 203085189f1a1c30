"""Start-up without anything heavy, quiet pipes, progress on stderr, colour only where it is wanted."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

from intarsia import progress
from intarsia.progress import Bar, Lines

Run = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]

WATCH = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(" ".join(m for m in ("torch", "numpy", "onnx", "scipy") if m in sys.modules)))
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["optimize", "--help"], ["list"], ["list", "targets", "--json"], ["--version"]]
)
def test_help_and_lists_import_nothing_heavy(start: Start, words):
    process = start(*words, before=WATCH)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out
    assert err == ""


@pytest.mark.parametrize("words", [["optimise"], ["optimize", "m", "--nope"], ["search", "m", "--config", "absent"]])
def test_wrong_usage_imports_nothing_heavy(start: Start, words):
    process = start(*words, before=WATCH)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.endswith("\n")


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m intarsia list | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_lines_say_how_far_a_phase_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 2.0, 6.0, 7.0, 10.0])
    monkeypatch.setattr("intarsia.progress.time.monotonic", lambda: next(clock))
    told = Lines()
    told.start("sensitivity", 20)
    told.advance()
    told.advance(4, note="best 3.1x")
    told.advance()
    told.finish()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "sensitivity: 5/20, 6 s, 18 s left; best 3.1x",
        "sensitivity: 6 done, 10 s; best 3.1x",
    ]


def test_a_phase_that_begins_ends_the_one_before(capsys: pytest.CaptureFixture[str]):
    told = Lines()
    told.start("one", None)
    told.start("two", None)
    told.finish()
    told.finish()
    assert capsys.readouterr().err.splitlines() == ["one: 0 s", "two: 0 s"]


def test_what_libraries_print_meanwhile_goes_to_stderr(capsys: pytest.CaptureFixture[str]):
    with progress.shown():
        print("a library talks")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "a library talks\n")


def test_a_terminal_gets_a_bar_and_anything_else_lines(monkeypatch: pytest.MonkeyPatch):
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    with progress.shown() as told:
        assert isinstance(told, Lines)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with progress.shown() as told:
            assert isinstance(told, Bar)
            told.start("plans", 4)
            told.advance(2, note="best 3.1x")
            told.finish()
        monkeypatch.setenv("TERM", "dumb")
        with progress.shown() as told:
            assert isinstance(told, Lines)
    assert "plans: 2 done" in everything(leader)


def everything(leader: int) -> str:
    """What was written to the other end of a pseudo-terminal that is closed by now."""
    parts: list[bytes] = []
    with contextlib.suppress(OSError):
        while part := os.read(leader, 100_000):
            parts.append(part)
    os.close(leader)
    return b"".join(parts).decode()


@pytest.mark.parametrize(("name", "coloured"), [("NO_COLOR", False), ("COLORTERM", True)])
def test_a_terminal_gets_emphasis_unless_it_is_unwanted(name: str, coloured: bool):
    environment = {**os.environ, "TERM": "xterm-256color", name: "1"}
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "intarsia", "list", "targets"]
    subprocess.run(command, stdout=follower, env=environment, timeout=60, check=True)
    os.close(follower)
    shown = everything(leader)
    assert "h200" in shown
    assert ("\x1b[3" in shown) is False
    assert ("\x1b[2m" in shown) is coloured


def test_a_pipe_gets_plain_text(intarsia: Run):
    assert "\x1b" not in intarsia("list", "targets").stdout


def test_numbers_read_as_people_say_them():
    from intarsia.units import amount, duration, ratio, size

    assert [duration(s) for s in (0, 3e-9, 2.5e-6, 0.0125, 1.5, 59, 600)] == [
        "0 s", "3 ns", "2.5 µs", "12.5 ms", "1.5 s", "59 s", "10.0 min",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 7_144_192, 28e9)] == ["0 B", "999 B", "7.14 MB", "28 GB"]
    assert [amount(n) for n in (12, 6.93e12)] == ["12 ", "6.93 T"]
    assert [ratio(10, 4), ratio(1, 0)] == ["2.5x", "-"]
