"""Registries: plain tables from name to import path, and entry points by which other packages join."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from .errors import UsageError


def known_names(table: Mapping[str, str], *, group: str) -> tuple[str, ...]:
    """All names that ``find`` takes, ours first."""
    return tuple(dict.fromkeys([*table, *sorted(point.name for point in entry_points(group=group))]))


def find(name: str, table: Mapping[str, str], *, group: str, kind: str) -> Any:
    """What ``name`` stands for, imported now: ``"intarsia.passes.clean:Clean"`` or an entry point of ``group``.

    Raises:
        UsageError: The name is unknown; the message lists the known ones and the nearest.
    """
    if name in table:
        return import_path(table[name])
    for point in entry_points(group=group):
        if point.name == name:
            return point.load()
    raise UsageError(unknown(kind, name, known_names(table, group=group)))


def import_path(path: str) -> Any:
    """The object at ``"package.module:name"``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name nobody has: ``pass 'quantise' is unknown; did you mean quantize-linear? Known: ...``"""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{kind} {name!r} is unknown{hint} Known: {', '.join(names)}"
