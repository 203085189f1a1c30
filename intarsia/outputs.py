"""What a verb writes: checked before the work begins, there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from intarsia.backends.manifest import MANIFEST
from intarsia.backends.writing import check_destination, disk_errors
from intarsia.ir.errors import UsageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the name ``path`` at the end, and is gone if anything fails.

    Raises:
        UsageError: The folder cannot be written.
        MissingEnvironment: The disk is full.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    check_destination(path, marker=MANIFEST)


def _check_writable(folder: Path, output: Path) -> None:
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"-o {output}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"-o {output}: {nearest} cannot be written to; choose another -o")
