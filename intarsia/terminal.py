"""Between a verb and the process that runs it: signals, errors as exit codes, one JSON document on stdout."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from intarsia.ir.errors import IntarsiaError, Unsupported

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_REASONS = 20
"""Reasons of a refusal that are printed; a longer list goes to a file as a whole."""

INTERRUPTED = 130
BUDGET_SPENT = 124
INTERNAL = 1
USAGE = 2
ENVIRONMENT = 6

_OS_EXIT_CODES = {
    errno.ENOSPC: (ENVIRONMENT, "the disk is full; free some space"),
    errno.EFBIG: (ENVIRONMENT, "a file grew beyond what the system allows; raise the limit"),
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
    with _listening_to_signals(), _quiet_libraries():
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
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        first_line = str(error).strip().split("\n")[0]
        return f"not enough memory: {first_line or 'an allocation failed'}", ENVIRONMENT
    if place := _place_in_user_pass(error):
        return f"{place}: the pass raised {type(error).__name__}: {error}; the whole story is in {_log(error)}", USAGE
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


def _place_in_user_pass(error: Exception) -> str | None:
    """File and line where a pass from a user's own file raised ``error``; None if no such pass was running."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__", "")).startswith("intarsia_user_"):
            return f"{frame.f_code.co_filename}:{line}"
    return None


def _crash(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0][:200]
    return f"this is our bug: {type(error).__name__}: {first_line}; the whole story is in {_log(error)}"


def _log(error: Exception) -> str:
    return _write_log("crash", f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")


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


@contextlib.contextmanager
def _listening_to_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind alike, so that what is half written is cleaned away; a second one ends at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in numbers:
            signal.signal(other, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what libraries tell their developers off the terminal, unless it is asked for."""
    if os.environ.get("INTARSIA_DEBUG") == "1" or sys.warnoptions:
        yield
        return
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


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


def print_lines(lines: Sequence[str | Table]) -> None:
    """Text for a person on stdout, as wide as the terminal, or 140 columns where there is none."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    if os.environ.get("NO_COLOR"):
        console = Console(width=console.width, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:  # rich ends the process itself when the reader has left
        for line in lines:
            console.print(line, soft_wrap=isinstance(line, str))
    sys.stdout.write(captured.get())
