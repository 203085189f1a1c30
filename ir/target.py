"""What the compiler knows about a machine."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import Any

from .errors import TargetError
from .types import BITS


@dataclass(frozen=True)
class Target:
    """One machine, from a TOML file in which every number has its source.

    Attributes:
        name: The file's stem.
        summary: What a person calls it.
        kind: ``cuda``, ``rocm``, ``cpu`` or ``null``.
        architecture: What a compiler is told: ``sm_90``, ``gfx942``, ``x86-64-v3``.
        flops: Peak dense matrix throughput by element type of the product's inputs, in FLOP/s.
        bandwidth: Peak memory bandwidth, in bytes/s.
        memory: Device memory, in bytes.
        launch: Time to start one kernel, in seconds.
        features: What the machine can do beyond arithmetic: ``tma``, ``wgmma``, ``vnni``.
        sources: Where each number comes from.
    """

    name: str
    summary: str
    kind: str
    architecture: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int
    launch: float
    features: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict[str, str])


_KINDS = ("cuda", "rocm", "cpu", "null")
_REQUIRED = {"summary", "kind", "architecture", "flops", "bandwidth", "memory", "launch", "sources"}
_OPTIONAL = {"features"}


def shipped_targets() -> tuple[str, ...]:
    """Names of the machines that come with Intarsia."""
    folder = files("intarsia.search").joinpath("targets")
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_target(name: str) -> Target:
    """The machine by its shipped name or by the path of a TOML file; TargetError says what is wrong with it."""
    path = Path(name)
    if path.suffix == ".toml":
        try:
            return parse_target(path.read_text(), name=path.stem, where=name)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise TargetError(f"{name}: cannot be read as a target: {reason}") from error
    known = shipped_targets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TargetError(f"target {name!r} is unknown{hint} Known: {', '.join(known)}, or the path of a .toml file")
    resource = files("intarsia.search").joinpath("targets", f"{name}.toml")
    return parse_target(resource.read_text(), name=name, where=f"target {name}")


def parse_target(text: str, *, name: str, where: str) -> Target:
    """Read a machine's TOML text; TargetError names the key and the rule."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{where}: not TOML: {error}") from error
    for fault in _faults(data):
        raise TargetError(f"{where}: {fault}")
    return Target(name=name, **{**data, "features": tuple(data.get("features", ()))})


def _faults(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, the most basic first; a rule may rely on those before it."""
    for key in sorted(_REQUIRED - data.keys()):
        yield f"no key {key!r}; a target has {', '.join(sorted(_REQUIRED))}"
    for key in sorted(data.keys() - _REQUIRED - _OPTIONAL):
        yield f"unknown key {key!r}; a target has {', '.join(sorted(_REQUIRED | _OPTIONAL))}"
    if data["kind"] not in _KINDS:
        yield f"kind is {data['kind']!r}, not one of {', '.join(_KINDS)}"
    for key in ("summary", "architecture"):
        if not isinstance(data[key], str):
            yield f"{key} is {data[key]!r}, not a string"
    features = data.get("features", [])
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        yield f"features is {features!r}, not a list of strings"
    if not isinstance(data["flops"], dict) or "f32" not in data["flops"]:
        yield "[flops] gives FLOP/s by element type, f32 at least"
    for dtype in sorted(data["flops"].keys() - BITS.keys()):
        yield f"[flops] {dtype} is no element type; those are {', '.join(BITS)}"
    yield from _number_faults(data)
    if not isinstance(data["sources"], dict):
        yield "[sources] says for each key where its number comes from"
    for key in ("flops", "bandwidth", "memory", "launch"):
        if not isinstance(data["sources"].get(key), str):
            yield f"[sources] does not say where {key} comes from"


def _number_faults(data: Mapping[str, Any]) -> Iterator[str]:
    for key, value in {"bandwidth": data["bandwidth"], "memory": data["memory"], **data["flops"]}.items():
        if not _is_positive(value):
            yield f"{key} is {value!r}, not a positive number"
    if data["launch"] != 0 and not _is_positive(data["launch"]):
        yield f"launch is {data['launch']!r}, not a time in seconds"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf
