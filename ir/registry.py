"""Registries: plain tables from name to import path, entry points by which other packages join, and a user's files."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from .errors import UsageError
from .spec import Spec, construct

T = TypeVar("T")


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


def from_file(text: str, base: type[T], *, kind: str) -> T:
    """What ``path/to/file.py:ClassName(key=value)`` stands for, a subclass of ``base``; the file is run.

    A file that has not changed is imported once: the same notation makes equal objects each time it is read.

    Raises:
        UsageError: No such file or class, or the file cannot be imported.
        SpecError: The notation, a key or a value is wrong.
    """
    path_text, _, rest = text.partition(".py:")
    path, spec = Path(path_text + ".py"), Spec.parse(rest)
    if not path.is_file():
        raise UsageError(f"{kind} {text!r}: there is no file {path}")
    found = _contents(path.resolve(), path.stat().st_mtime_ns, kind, f"{kind} {text!r}: {path}").get(spec.name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{kind} {text!r}: {path} defines no {base.__name__} called {spec.name}")
    return construct(found, spec)


def function_from_file(text: str, *, kind: str) -> Callable[[], object]:
    """What ``path/to/file.py:function`` stands for; the file is run.

    Raises:
        UsageError: No such file or function, or the file cannot be imported.
    """
    path_text, _, name = text.partition(".py:")
    path = Path(path_text + ".py")
    if not path.is_file():
        raise UsageError(f"{kind} {text!r}: there is no file {path}")
    found = _contents(path.resolve(), path.stat().st_mtime_ns, kind, f"{kind} {text!r}: {path}").get(name)
    if not callable(found):
        raise UsageError(f"{kind} {text!r}: {path} defines no function called {name}")
    return found


@lru_cache(maxsize=32)
def _contents(path: Path, changed: int, kind: str, where: str) -> dict[str, object]:
    """What a file defines, by name; ``changed`` is when it did last."""
    module_spec = importlib.util.spec_from_file_location(f"intarsia_user_{kind}_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's own, and may raise anything
        raise UsageError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    return vars(module)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name nobody has: ``pass 'quantise' is unknown; did you mean quantize-linear? Known: ...``"""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{kind} {name!r} is unknown{hint} Known: {', '.join(names)}"
