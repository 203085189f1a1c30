"""What is registered, by name, read from the source of the registries so that nothing heavy is imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from intarsia.ir.errors import UsageError
from intarsia.ir.registry import unknown

_TABLES = {
    "models": ("intarsia.models.base", "MODELS"),
    "passes": ("intarsia.passes.base", "PASSES"),
    "patterns": ("intarsia.passes.patterns.base", "PATTERNS"),
    "kernels": ("intarsia.kernels", "OPERATORS"),
    "backends": ("intarsia.backends.base", "BACKENDS"),
}
"""Module and variable of each registry, a plain table from name to import path."""

KINDS = ("models", "targets", "passes", "patterns", "kernels", "backends")


@dataclass(frozen=True)
class Entry:
    """One registered thing: its name, one line about it, and the package it comes from."""

    name: str
    summary: str
    origin: str


def entries(kind: str) -> tuple[Entry, ...]:
    """All things of a kind, ours first, then those that other packages bring by entry points; UsageError otherwise."""
    if kind not in KINDS:
        raise UsageError(unknown("list", kind, KINDS))
    if kind == "targets":
        return _targets()
    ours = tuple(Entry(name, _summary(path), "intarsia") for name, path in _table(*_TABLES[kind]).items())
    theirs = sorted(entry_points(group=f"intarsia.{kind}"), key=lambda point: point.name)
    known = {entry.name for entry in ours}
    return ours + tuple(
        Entry(point.name, point.value, point.dist.name if point.dist else "")
        for point in theirs
        if point.name not in known
    )


def _targets() -> tuple[Entry, ...]:
    from intarsia.ir.target import load_target, shipped_targets

    return tuple(Entry(name, load_target(name).summary, "intarsia") for name in shipped_targets())


def _table(module: str, variable: str) -> dict[str, str]:
    for statement in _source(module).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Name) and target.id == variable:
            value = statement.value  # type: ignore[attr-defined]
            return {str(name): str(path) for name, path in ast.literal_eval(value).items()}
    raise LookupError(f"module {module} defines no table {variable}")


def _summary(path: str) -> str:
    """First line of the docstring of the class, function or module at ``"package.module:name"``."""
    module, _, name = path.partition(":")
    source = _source(module)
    found: ast.Module | ast.stmt = next(
        (statement for statement in source.body if getattr(statement, "name", None) == name), source
    )
    assert isinstance(found, ast.Module | ast.ClassDef | ast.FunctionDef)
    return (ast.get_docstring(found) or "").split("\n")[0]


@cache
def _source(module: str) -> ast.Module:
    """The parsed file of one of our modules; importing it would import torch."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())
