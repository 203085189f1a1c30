"""A problem of bits as a file: sensitivities, sizes and times by layer, and limits as a person writes them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from intarsia.ir.errors import UsageError
from intarsia.search.bit_layers import MEASURES, Layer, Problem

NUMBERS = ("hutchinson_trace", "delta_weights_8bit_square", "delta_weights_4bit_square", "parameters", "macs")
"""Keys with one number a layer that every file has."""

TIMES = ("latency_int4", "latency_int8")
"""Keys with one number a layer that stand together or not at all."""

NUMBERED = ("tied", "excluded")
"""Keys with numbers of layers, counted from 0."""

TEXTS = ("source", "units", "expected", "names")
"""Keys that are read for no number; of these ``names`` has one text a layer."""

UNITS: Mapping[str, Mapping[str, float]] = {
    "size": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bops": {"M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"s": 1, "ms": 1e-3, "us": 1e-6},
}


def read_problem(path: Path) -> Problem:
    """The layers and ties of a JSON file with these keys, each a list of one number a layer unless said otherwise.

    Perturbation: ``hutchinson_trace`` (trace / number of weights) times ``delta_weights_8bit_square`` and
    ``delta_weights_4bit_square`` (squared norm of what rounding changes). ``parameters`` in MiB of 8-bit weights,
    ``macs`` in millions. Optional: ``latency_int4`` and ``latency_int8`` in milliseconds, ``tied`` (lists of numbers of
    layers that must agree), ``excluded`` (layers that stay at 8 bits and count), ``names``, and what is not read:
    ``source``, ``units``, ``expected``.

    Raises:
        UsageError: The file cannot be read, or breaks a rule; one line for each rule that it breaks.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"{path}: cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected an object with the keys {', '.join(NUMBERS)}, found a {_kind(data)}")
    if faults := [f"{path}: {fault}" for fault in _faults(data)]:
        raise UsageError("\n".join(faults))
    return _problem(data)


def read_limits(texts: Sequence[str], problem: Problem) -> dict[str, float]:
    """``size=0.5`` or ``size=6.5MiB``, ``bops=70G``, ``latency=4ms`` in bytes, operations and seconds.

    A number without a unit is a fraction of the way from all layers at their fewest bits to all at their most.

    Raises:
        UsageError: Another measure, another unit, a fraction outside 0 to 1, a measure twice or without data.
    """
    limits: dict[str, float] = {}
    for text in texts:
        measure, _, value = text.partition("=")
        if measure not in MEASURES:
            raise UsageError(f"--limit {text}: expected {', '.join(MEASURES)} with a value, such as size=0.5")
        if measure in limits:
            raise UsageError(f"--limit {text}: {measure} is limited twice")
        if measure not in problem.measures:
            raise UsageError(f"--limit {text}: the file has no {' and no '.join(TIMES)}")
        limits[measure] = read_limit(value, measure, problem, where=f"--limit {text}")
    return limits


def read_limit(value: str, measure: str, problem: Problem, *, where: str) -> float:
    """``0.5``, a share of the problem's extent, or ``6.5MiB``; UsageError beginning with ``where`` if it is neither."""
    number, unit = limit_of(value, measure, where=where)
    if unit:
        return number * unit
    fewest, most = problem.extent(measure)
    return fewest * (1 - number) + most * number


def limit_of(value: str, measure: str, *, where: str) -> tuple[float, float | None]:
    """The number and what its unit stands for, None for a share, which needs none; UsageError if it is neither."""
    units = UNITS[measure]
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?\s*([A-Za-z]*)", value.strip())
    if found is None or (found[3] and found[3] not in units):
        raise UsageError(f"{where}: expected a fraction such as 0.5, or a number with {', '.join(units)}")
    number = float(f"{found[1]}e{found[2] or 0}")
    if number > 1 and not found[3]:
        raise UsageError(f"{where}: a number without a unit is a fraction from 0 to 1; units: {', '.join(units)}")
    return number, units[found[3]] if found[3] else None


def _faults(data: Mapping[str, object]) -> Iterator[str]:
    names = (*NUMBERS, *TIMES, *NUMBERED, *TEXTS)
    known = ", ".join(names)
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            yield f"unknown key {key!r}; {f'did you mean {near[0]}?' if near else f'known: {known}'}"
    times = [key for key in TIMES if key in data]
    if len(times) == 1:
        yield f"{times[0]} stands alone; give {' and '.join(TIMES)}, or none"
    first = data.get(NUMBERS[0])
    count = len(first) if isinstance(first, list) else None
    for key in (*NUMBERS, *times):
        yield from [f"{key} is missing"] if key not in data else _column_faults(key, data[key], count)
    if count is not None:
        yield from _number_faults(data, count)
        yield from _name_faults(data.get("names"), count)


def _column_faults(key: str, column: object, count: int | None) -> Iterator[str]:
    if not isinstance(column, list):
        yield f"{key} is a list with one number a layer, found a {_kind(column)}"
        return
    if not column:
        yield f"{key} has no layer"
    if count is not None and len(column) != count:
        yield f"{key} has {len(column)} entries, {NUMBERS[0]} has {count}"
    for number, value in enumerate(column):
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{key}[{number}] is a number, found {json.dumps(value)}"
        elif not isfinite(value):
            yield f"{key}[{number}] is {value}; measure it again"
        elif value < 0:
            yield f"{key}[{number}] is {value}; it cannot be below 0{_advice(key)}"


def _advice(key: str) -> str:
    return ": average over more vectors or data, or give 0" if key == NUMBERS[0] else ""


def _number_faults(data: Mapping[str, object], count: int) -> Iterator[str]:
    for key in NUMBERED:
        listed = data.get(key, [])
        groups = listed if key == "tied" else [listed]
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            yield f"{key} is a list{' of lists' if key == 'tied' else ''} of numbers of layers"
            continue
        for number in (number for group in groups for number in group):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
                yield f"{key}: expected numbers of layers, 0 to {count - 1}, found {json.dumps(number)}"


def _name_faults(names: object, count: int) -> Iterator[str]:
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield "names is a list with one text a layer"
    elif len(names) != count:
        yield f"names has {len(names)} entries, {NUMBERS[0]} has {count}"
    elif twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"names has {twice[0]!r} more than once"


def _problem(data: Mapping[str, Any]) -> Problem:
    count = len(data[NUMBERS[0]])
    names = data.get("names") or [str(number) for number in range(count)]
    excluded = set(data.get("excluded", ()))
    layers = []
    for number in range(count):
        options = ("w8a8",) if number in excluded else ("w4a4", "w8a8")
        trace = data["hutchinson_trace"][number]
        layers.append(
            Layer(
                name=str(names[number]),
                parameters=data["parameters"][number] * 2**20,
                macs=data["macs"][number] * 1e6,
                perturbation={o: trace * data[f"delta_weights_{o[1]}bit_square"][number] for o in options},
                seconds={o: data[f"latency_int{o[1]}"][number] * 1e-3 for o in options if TIMES[0] in data},
            )
        )
    ties = data.get("tied", ())
    return Problem(tuple(layers), tuple(tuple(tie) for tie in ties))


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")
