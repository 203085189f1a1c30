"""A plan: a program of passes with their answers, as data that can be read, edited and replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import PlanError

Choices = Mapping[str, tuple[str, ...]]
"""Where a pass must decide, and between what; the first option changes nothing."""

Chosen = Mapping[str, str]
"""One option for each place; a place left out takes its first option."""

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One pass in ``name(key=value)`` notation, with its decisions."""

    run: str
    chosen: Chosen = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Phase:
    """A range of denoising steps, ``first`` to ``last`` inclusive, and the passes for it.

    A network without a denoising loop has one phase with ``last=None``, as has a loop that is treated alike throughout.
    """

    steps: tuple[Step, ...]
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to do to the graph with fingerprint ``graph`` for the machine ``target``.

    Attributes:
        phases: One entry for each phase of the denoising loop, in order, without gaps.
        notes: What the search knew when it decided (predicted cost, quality asked); replay never reads it.
    """

    graph: str
    target: str
    phases: tuple[Phase, ...]
    notes: Mapping[str, object] = field(default_factory=dict[str, object])

    def to_json(self) -> str:
        """The plan as text; the same plan gives the same bytes."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "plan") -> Plan:
        """Read a plan; PlanError says which key is missing, unknown or of the wrong kind."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{where}: not JSON, line {error.lineno}, column {error.colno}: {error.msg}") from error
        _keys(data, {"version", "graph", "target", "phases", "notes"}, where)
        if data["version"] != VERSION:
            raise PlanError(f"{where}: version {data['version']!r}; this Intarsia reads version {VERSION}")
        phases = tuple(_phase(item, f"{where}: phases[{i}]") for i, item in enumerate(_list(data["phases"], where)))
        if not phases:
            raise PlanError(f"{where}: no phases; a plan has at least one")
        _check_ranges(phases, where)
        for key in ("graph", "target"):
            if not isinstance(data[key], str):
                raise PlanError(f"{where}: {key} is {data[key]!r}, not a string")
        if not isinstance(data["notes"], dict):
            raise PlanError(f"{where}: notes is {data['notes']!r}, not an object")
        return cls(data["graph"], data["target"], phases, data["notes"])

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file; PlanError if it is not there or not a plan."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise PlanError(f"{path}: cannot be read as a plan: {reason}") from error
        return cls.from_json(text, where=str(path))


def _phase(data: object, where: str) -> Phase:
    _keys(data, {"steps", "first", "last"}, where)
    assert isinstance(data, dict)
    if not isinstance(data["first"], int) or not isinstance(data["last"], int | None):
        raise PlanError(f"{where}: first and last are step numbers (last may be null)")
    steps = tuple(_step(item, f"{where}.steps[{i}]") for i, item in enumerate(_list(data["steps"], where)))
    return Phase(steps, data["first"], data["last"])


def _check_ranges(phases: Sequence[Phase], where: str) -> None:
    """The denoising steps are covered from 0 on, without gaps; only the last phase may be open."""
    expected = 0
    for i, phase in enumerate(phases):
        if phase.first != expected:
            raise PlanError(f"{where}: phases[{i}] starts at step {phase.first}, not at {expected}")
        last = i == len(phases) - 1
        if phase.last is None and last:
            return
        if phase.last is None or phase.last < phase.first:
            raise PlanError(f"{where}: phases[{i}] ends at step {phase.last}, not at {phase.first} or later")
        expected = phase.last + 1


def _step(data: object, where: str) -> Step:
    _keys(data, {"run", "chosen"}, where)
    assert isinstance(data, dict)
    chosen = data["chosen"]
    if not isinstance(data["run"], str):
        raise PlanError(f"{where}: run is a pass such as 'quantize-linear(min_rows=64)', found {data['run']!r}")
    if not isinstance(chosen, dict) or not all(isinstance(option, str) for option in chosen.values()):
        raise PlanError(f"{where}: chosen maps places to options, found {chosen!r}")
    return Step(data["run"], chosen)


def _keys(data: object, keys: set[str], where: str) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"{where}: expected an object with {', '.join(sorted(keys))}, found {data!r}")
    for key in sorted(keys ^ data.keys()):
        raise PlanError(f"{where}: {'unknown key' if key in data else 'no key'} {key!r}")


def _list(data: object, where: str) -> list[object]:
    if not isinstance(data, list):
        raise PlanError(f"{where}: expected a list, found {data!r}")
    return data
