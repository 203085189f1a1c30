"""Options of a verb: read from a file, resolved, and written back as the command that repeats the run."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from intarsia.ir.errors import UsageError

_PRESENTATION = {"config", "json", "help", "output", "fresh"}
"""Options that say how a run is shown, where it goes or what it may reuse, and nothing about its result."""

_UNITS = {"s": 1, "m": 60, "h": 3600}


def from_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a TOML or JSON file as defaults of the verb; what the command line says comes first.

    The keys are the options without the dashes in front (``fail-on-no-gain = true``) and the arguments' names.

    Raises:
        UsageError: The file cannot be read, is neither TOML nor JSON, or holds a key that the verb does not take.
    """
    if path is None or ctx.resilient_parsing:
        return path
    names = {_spelling(param): param for param in ctx.command.params if _spelling(param) not in {"config", "help"}}
    defaults: dict[str, Any] = {}
    for key, value in _read(path).items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"{path}: unknown key {key!r}{hint} {ctx.info_name} takes {', '.join(sorted(names))}")
        defaults[str(names[key].name)] = _option_value(value, where=f"{path}: {key}", several=_is_list(names[key]))
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _read(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"{path}: cannot be read as a configuration: {reason}") from error
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UsageError(f"{path}: not {kind}: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected keys and values, found {data!r}")
    return data


def _option_value(value: object, *, where: str, several: bool) -> object:
    """A value as the command line would give it: text, a flag, or a list of text."""
    if several:
        if not isinstance(value, list):
            raise UsageError(f"{where} is a list, found {value!r}")
        return [str(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str | int | float):
        return str(value)
    raise UsageError(f"{where} is one value, found {value!r}")


def _is_list(param: Any) -> bool:
    return bool(getattr(param, "multiple", False))


def _spelling(param: Any) -> str:
    """What a person types: ``fail-on-no-gain`` for ``--fail-on-no-gain``, ``model`` for the argument MODEL."""
    long = [option for option in param.opts if option.startswith("--")]
    return long[0].removeprefix("--") if long else str(param.name)


def resolved(ctx: typer.Context) -> dict[str, object]:
    """Every option and argument that bears on the result, with its value; a file of these repeats the run."""
    return {
        _spelling(param): _plain(ctx.params.get(str(param.name)))
        for param in ctx.command.params
        if _spelling(param) not in _PRESENTATION and ctx.params.get(str(param.name)) not in (None, (), [])
    }


def command(ctx: typer.Context, *, output: Path | None = None) -> str:
    """The command that repeats the run: arguments, then the options that differ from their defaults, in one order."""
    words = ["intarsia", str(ctx.info_name)]
    for param in ctx.command.params:
        value = ctx.params.get(str(param.name))
        if _spelling(param) in _PRESENTATION or value in (None, (), []):
            continue
        if param.param_type_name == "argument":
            words[2:2] = [str(_plain(value))]
        elif value != param.default or param.required:
            words += _words(f"--{_spelling(param)}", value)
    if output is not None:
        words += ["-o", str(output)]
    return shlex.join(words)


def _words(option: str, value: object) -> list[str]:
    if value is True:
        return [option]
    if value is False:
        return [f"--no-{option.removeprefix('--')}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for item in values for word in (option, str(_plain(item)))]


def _plain(value: object) -> object:
    """``value`` as TOML and JSON know it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def seconds(text: str | None) -> float | None:
    """``90``, ``90s``, ``20m``, ``1h30m`` in seconds; None for None; UsageError for anything else."""
    if text is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text)
    total = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if not parts or "".join(number + unit for number, unit in parts) != text or total <= 0:
        raise UsageError(f"--budget: expected a time such as 90s, 20m or 1h30m, found {text!r}")
    return total


def sizes(texts: Sequence[str]) -> dict[str, int]:
    """``["N=8", "frames=21"]`` as numbers by name; UsageError for anything else."""
    found: dict[str, int] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not (name and equals and number.isascii() and number.isdigit() and int(number) > 0):
            raise UsageError(f"--size: expected NAME=NUMBER such as batch=2, found {text!r}")
        found[name] = int(number)
    return found
