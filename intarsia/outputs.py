"""Where a verb writes: checked before the work begins, and not after hours of it."""

from __future__ import annotations

import os
from pathlib import Path

from intarsia.backends.manifest import MANIFEST
from intarsia.backends.writing import check_destination
from intarsia.ir.errors import UsageError


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
