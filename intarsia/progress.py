"""How far the work is, on stderr: a bar on a terminal, plain lines at a modest rate anywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from intarsia.terminal import say

LINE_SECONDS = 5.0
"""Least time between two lines of the same phase when progress is not shown on a terminal, in seconds."""


@contextlib.contextmanager
def shown() -> Iterator[Bar | Lines]:
    """Progress on stderr, a bar on a terminal, plain lines elsewhere; meanwhile what libraries print goes there too."""
    shown = Bar() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ else Lines()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield shown
        finally:
            shown.close()


class Bar:
    """A bar with phase, done and left, the latest note (best so far), elapsed and remaining time."""

    def __init__(self) -> None:
        self._rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None

    def start(self, phase: str, total: int | None) -> None:
        """Begin ``phase`` of ``total`` steps, None where nobody knows how many."""
        self.finish()
        self._rich.start()
        self._task = self._rich.add_task(phase, total=total, note="")

    def advance(self, done: int = 1, *, note: str = "") -> None:
        """``done`` more steps are done; ``note`` replaces what is said beside the bar."""
        if self._task is None:
            return
        self._rich.update(self._task, advance=done)
        if note:
            self._rich.update(self._task, note=note)

    def finish(self) -> None:
        """End the phase and leave one line about it."""
        if self._task is None:
            return
        task = next(task for task in self._rich.tasks if task.id == self._task)
        self._rich.remove_task(self._task)
        self._rich.stop()
        self._task = None
        print(
            _line(task.description, int(task.completed), None, task.elapsed or 0, task.fields["note"]), file=sys.stderr
        )

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        self._rich.stop()


class Lines:
    """A plain line when a phase begins and ends, and one every few seconds between."""

    def __init__(self) -> None:
        self._phase = ""
        self._total: int | None = None
        self._done = 0
        self._note = ""
        self._began = self._said = 0.0

    def start(self, phase: str, total: int | None) -> None:
        """Begin ``phase`` of ``total`` steps, None where nobody knows how many."""
        self.finish()
        self._phase, self._total, self._done, self._note = phase, total, 0, ""
        self._began = self._said = time.monotonic()

    def advance(self, done: int = 1, *, note: str = "") -> None:
        """``done`` more steps are done; ``note`` is what is worth knowing, such as the best so far."""
        self._done += done
        self._note = note or self._note
        now = time.monotonic()
        if self._phase and now - self._said >= LINE_SECONDS:
            self._said = now
            say(_line(self._phase, self._done, self._total, now - self._began, self._note))

    def finish(self) -> None:
        """End the phase and say so."""
        if self._phase:
            say(_line(self._phase, self._done, None, time.monotonic() - self._began, self._note))
        self._phase = ""

    def close(self) -> None:
        """Nothing to give back."""


def _line(phase: str, done: int, total: int | None, seconds: float, note: str) -> str:
    """``sensitivity: 12/63, 14 s, 58 s left; best 3.1x``; without a total, what is done in all."""
    counted = f"{done}/{total}" if total else f"{done} done" if done else ""
    parts = [*([counted] if counted else []), f"{seconds:.0f} s"]
    if total and 0 < done < total:
        parts.append(f"{seconds * (total - done) / done:.0f} s left")
    return f"{phase}: {', '.join(parts)}{f'; {note}' if note else ''}"
