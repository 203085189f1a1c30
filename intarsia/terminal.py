"""Between the program and the person at the terminal: progress, errors as exit codes, one JSON document."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from intarsia.ir.errors import IntarsiaError, Unsupported, UsageError

LINE_SECONDS = 5.0
"""Least time between two lines of the same phase when progress is not shown on a terminal, in seconds."""

SHOWN_REASONS = 20
"""Reasons of a refusal that are printed; a longer list goes to a file as a whole."""

INTERRUPTED = 130
BUDGET_SPENT = 124
INTERNAL = 1
USAGE = 2
ENVIRONMENT = 6

_OS_EXIT_CODES = {
    errno.ENOSPC: (ENVIRONMENT, "the disk is full; free some space"),
    errno.EDQUOT: (ENVIRONMENT, "the disk quota is used up; free some space"),
    errno.EROFS: (USAGE, "the file system is read-only; choose another -o"),
    errno.EACCES: (USAGE, "no permission; choose another path"),
    errno.EPERM: (USAGE, "no permission; choose another path"),
    errno.ENOENT: (USAGE, "there is no such file or folder"),
    errno.EISDIR: (USAGE, "a folder stands where a file is expected"),
    errno.ENOTDIR: (USAGE, "a file stands where a folder is expected"),
    errno.ENAMETOOLONG: (USAGE, "the name is too long"),
    errno.ENOMEM: (ENVIRONMENT, "there is not enough memory"),
}

_EXTRAS = {
    "diffusers": "models",
    "transformers": "models",
    "triton": "triton",
    "tvm": "tvm",
    "tensorrt_rtx": "tensorrt",
    "tensorrt": "tensorrt",
}
"""The extra of ours that brings an optional package, by the name it is imported by."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; the message says what is saved and how to go on."""


class ReaderLeft(Exception):
    """Who was reading stdout has closed it; nothing is wrong."""


def cache_folder() -> Path:
    """Where measurements and crash logs are kept: INTARSIA_CACHE_DIR, else XDG_CACHE_HOME/intarsia, else ~/.cache."""
    if own := os.environ.get("INTARSIA_CACHE_DIR"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "intarsia"


def run(work: Callable[[], object], *, as_json: bool) -> int:
    """Do ``work`` and return the exit code; whatever goes wrong becomes one line on stderr.

    With ``as_json`` the failure is also the one JSON document on stdout.
    """
    _listen_to_signals()
    _hush_libraries()
    try:
        result = work()
        sys.stdout.flush()
    except (BrokenPipeError, ReaderLeft):
        _discard(sys.stdout)
        return 0
    except (Interrupted, KeyboardInterrupt) as stop:
        return _fail(f"interrupted: {stop}" if str(stop) else "interrupted", INTERRUPTED, as_json=as_json)
    except IntarsiaError as error:
        return _fail(_reasons(error), error.exit_code, as_json=as_json)
    except Exception as error:  # the process ends here: what nobody expected is our bug, and is logged as such
        message, code = _understood(error) or (_crash(error), INTERNAL)
        return _fail(message, code, as_json=as_json)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int, *, as_json: bool) -> int:
    if os.environ.get("INTARSIA_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc(file=sys.stderr)
    with contextlib.suppress(BrokenPipeError):
        print(f"intarsia: {message}", file=sys.stderr, flush=True)
        if as_json:
            print_json({"error": message, "exit_code": code})
    return code


def _reasons(error: IntarsiaError) -> str:
    """The message; a long list of reasons is cut, and kept whole in a file of the cache folder."""
    if not isinstance(error, Unsupported) or len(error.reasons) <= SHOWN_REASONS:
        return str(error)
    shown = str(error).splitlines()[: SHOWN_REASONS + 1]
    path = _write_log("unsupported", str(error) + "\n")
    return "\n".join([*shown, f"  and {len(error.reasons) - SHOWN_REASONS} more, all of them in {path}"])


def _understood(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code of a foreign exception whose cause a user can remove; None for any other."""
    if hasattr(error, "format_message"):  # the command-line parser's own; its class moved between its versions
        return _wrong_usage(error), USAGE
    if isinstance(error, ImportError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
        return f"package {error.name} is not installed; pip install 'intarsia[{extra}]'", ENVIRONMENT
    if isinstance(error, ValueError) and type(error).__module__.startswith("intarsia."):
        return str(error), USAGE
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        first_line = str(error).strip().split("\n")[0]
        return f"not enough memory: {first_line or 'an allocation failed'}", ENVIRONMENT
    number = _os_error(error)
    if number not in _OS_EXIT_CODES:
        return None
    code, advice = _OS_EXIT_CODES[number]
    where = getattr(error, "filename", None)
    return f"{f'{where}: ' if where else ''}{os.strerror(number)}: {advice}", code


def _wrong_usage(error: Any) -> str:
    message = " ".join(str(error.format_message()).split()).replace("Value error, ", "").rstrip(".")
    verb = error.ctx.command_path if getattr(error, "ctx", None) else "intarsia"
    return f"{message}; see {verb} --help"


def _os_error(error: Exception) -> int | None:
    """The operating system's error number; safetensors, written in Rust, hides it in the text of its own exception."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _crash(error: Exception) -> str:
    path = _write_log("crash", f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")
    first_line = str(error).strip().split("\n")[0][:200]
    return f"this is our bug: {type(error).__name__}: {first_line}; the whole story is in {path}"


def _write_log(kind: str, text: str) -> str:
    """Path of a file of the cache folder with ``text``, or why there is none: a failing log must hide no error."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = cache_folder() / "logs" / f"{kind}-{stamp}-{os.getpid()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as failure:
        return f"no file ({path}: {failure.strerror}); INTARSIA_DEBUG=1 prints it"
    return str(path)


def _listen_to_signals() -> None:
    """Ctrl-C and SIGTERM unwind alike, so that what is half written is cleaned away; a second one ends at once."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may; tests may run in another
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


def _hush_libraries() -> None:
    """Keep what libraries tell their developers off the terminal, unless it is asked for."""
    if os.environ.get("INTARSIA_DEBUG") == "1" or sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _discard(stream: object) -> None:
    """Send what is still to be written to a closed pipe nowhere, so that the interpreter ends in silence."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def print_json(data: object) -> None:
    """The one JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=_plain, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def say(text: str) -> None:
    """One line for a person on stderr, uncoloured and unwrapped."""
    print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """Where results for people go: stdout, as wide as the terminal, or 140 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def progress() -> Iterator[Bar | Lines]:
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
    parts = [f"{done}/{total}" if total else f"{done} done", f"{seconds:.0f} s"]
    if total and 0 < done < total:
        parts.append(f"{seconds * (total - done) / done:.0f} s left")
    return f"{phase}: {', '.join(parts)}{f'; {note}' if note else ''}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the name ``path`` at the end, and is gone if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_output_file(path: Path) -> None:
    """Raise UsageError now, not after hours of work, if no file called ``path`` can be written."""
    if path.is_dir():
        raise UsageError(f"-o {path}: a folder stands where a file is to be written")
    _check_writable(path.parent, path)


def check_output_folder(path: Path) -> None:
    """Raise UsageError now, not after hours of work, if no folder called ``path`` can be written."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"-o {path}: a file stands where a folder is to be written")
    _check_writable(path.parent, path)


def check_output_bundle(path: Path) -> None:
    """As ``check_output_folder``; moreover a folder that is there and no bundle is never replaced."""
    check_output_folder(path)
    if path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").is_file():
        raise UsageError(f"-o {path}: the folder holds something else than a bundle; choose another")


def _check_writable(folder: Path, output: Path) -> None:
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"-o {output}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"-o {output}: {nearest} cannot be written to; choose another -o")
