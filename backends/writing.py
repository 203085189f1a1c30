"""Writing folders and files so that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from intarsia.ir.errors import MissingEnvironment, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR}


@contextlib.contextmanager
def new_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """A sibling of ``folder`` to write into, which takes its place when the block ends well and goes when it does not.

    What a process of this machine left of an earlier attempt, because it was killed, goes first.

    Args:
        folder: Where the result goes. What is there stays until the new folder is complete.
        marker: A file whose presence says that an existing folder is one of ours and may be replaced.

    Raises:
        UsageError: The folder may not be replaced, or its parent cannot be written.
        MissingEnvironment: The disk is full.
    """
    folder = folder.absolute()
    check_destination(folder, marker=marker)
    partial = folder.with_name(f"{_unfinished(folder)}{os.getpid()}")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        try:
            partial.mkdir()
            yield partial
            _take_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _unfinished(folder: Path) -> str:
    """How unfinished folders for ``folder`` are called on this machine, up to the process's number."""
    return f".{folder.name}.partial-{platform.node()}-"


def _remove_abandoned(folder: Path) -> None:
    prefix = _unfinished(folder)
    for path in folder.parent.glob(f"{glob.escape(prefix)}*"):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and (int(number) == os.getpid() or not _is_running(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_destination(folder: Path, *, marker: str) -> None:
    """Raise UsageError unless a folder can be written at ``folder`` without losing anything but one of ours."""
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give the name of a folder to write")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UsageError(
            f"{folder} holds other files and no {marker}; give a new folder, or an earlier bundle to replace"
        )
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir():
        raise UsageError(f"{folder} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written: {parent} is read-only for you; give another folder")


def _take_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A sibling of ``path``, of the same suffix, that takes its place when the block ends well; folders are made.

    Raises:
        UsageError: The file cannot be written.
        MissingEnvironment: The disk is full.
    """
    draft = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def replace_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into an existing folder, each whole; all are on the disk before the first takes its place."""
    with disk_errors(folder):
        drafts = {name: folder / f".{name}.partial-{os.getpid()}" for name in texts}
        try:
            for name, text in texts.items():
                drafts[name].write_text(text)
            for name, draft in drafts.items():
                draft.replace(folder / name)
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk and a folder that cannot be written into one line each; other errors pass."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        if code in _FULL:
            raise MissingEnvironment(
                f"{folder}: no room on the disk ({os.strerror(code)}); nothing unfinished is left; free some space"
            ) from error
        if code in _FORBIDDEN:
            raise UsageError(f"{folder} cannot be written: {os.strerror(code)}; give another folder") from error
        raise


def _code(error: Exception) -> int:
    """The system's error number; safetensors tells it only in its text, ``... (os error 28)``."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else 0
