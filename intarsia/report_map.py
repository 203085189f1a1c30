"""A report's maps: what was chosen at each place, blocks by kinds of layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.spec import Spec
from intarsia.report_heads import is_of_heads
from intarsia.search.explain import noted, why
from intarsia.search.explain_bits import bit_entries, why_bits
from intarsia.search.weighed import Weighed
from intarsia.units import duration, size

TONES = 6
"""Shades that the page has for options, from what leaves a place as it is to what changes it most."""

ERROR = "the relative squared error of the network's output with this one place changed"

MEASURED = ("calibrate", "smooth-linear")
"""Passes whose answers are numbers of their own at each place."""

_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Tried:
    """An option of a place with its figures as text."""

    text: str
    chosen: bool


@dataclass(frozen=True)
class PlaceRow:
    """A place, what was chosen there, and what else was tried."""

    name: str
    chosen: str
    tone: int
    why: str
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Cell:
    """A place on the map."""

    place: str
    label: str
    tone: int
    facts: str


@dataclass(frozen=True)
class MapRow:
    """A block: one cell for each kind of layer, None where the block has none."""

    name: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class LegendEntry:
    """An option, its shade, and how often it was chosen."""

    name: str
    tone: int
    count: int


@dataclass(frozen=True)
class Map:
    """The decisions of one pass: blocks by kinds of layers, and places outside of blocks."""

    run: str
    phase: str
    error_is: str
    legend: tuple[LegendEntry, ...]
    kinds: tuple[tuple[str, ...], ...]
    rows: tuple[MapRow, ...]
    others: tuple[Cell, ...]
    places: tuple[PlaceRow, ...]


def maps(plan: Plan) -> tuple[Map, ...]:
    """One map for each pass that had something to decide, but for heads, which have maps of their own, and what was
    measured for later passes, such as ranges.
    """
    many = len(plan.phases) > 1
    return tuple(
        _map(
            plan,
            step,
            options,
            _refused(plan, number, phase),
            phase=_phase_text(at, phase) if many else "",
            of_bits={place: entry for (asked, place), entry in bit_entries(plan, phase).items() if asked == number},
        )
        for phase, at in enumerate(plan.phases)
        for number, step in enumerate(at.steps)
        if not is_of_heads(step)
        and step.run.partition("(")[0] not in MEASURED
        and ((options := _options(plan, number, phase)) or step.chosen)
    )


def _options(plan: Plan, number: int, phase: int) -> dict[str, tuple[Weighed, ...]]:
    return {place: options for (at, place), options in noted(plan, phase).items() if at == number}


def _phase_text(phase: Phase, number: int) -> str:
    return f", phase {number}, steps {phase.first} to {'the last' if phase.last is None else phase.last}"


def _refused(plan: Plan, number: int, phase: int) -> Mapping[str, str]:
    entries = plan.notes.get("refused", [])
    assert isinstance(entries, list)
    return {
        entry["place"]: entry["why"]
        for entry in entries
        if entry["step"] == number and entry.get("phase", phase) == phase
    }


def _map(
    plan: Plan,
    step: Step,
    known: Mapping[str, Sequence[Weighed]],
    refused: Mapping[str, str],
    *,
    phase: str,
    of_bits: Mapping[str, Mapping[str, Any]],
) -> Map:
    tones = _tones(step, known)
    total = plan.notes.get("error")
    chosen = {place: options[0].option for place, options in known.items()} | dict(step.chosen)

    def reason(place: str, option: str) -> str:
        options = tuple(known.get(place, ()))
        if place in of_bits and any(one.option == option for one in options):
            return why_bits(of_bits[place], options, option, plan.notes)
        return why(options, option, total if isinstance(total, float) else None) if options else ""

    places = {
        place: _place(place, option, tones[option], known.get(place, ()), reason(place, option))
        for place, option in chosen.items()
    }
    cells = {name: _cell(place, known.get(name, ())) for name, place in places.items()}
    counts = Counter(chosen.values())
    kinds, rows, others = _arranged(cells)
    return Map(
        run=step.run,
        phase=phase,
        error_is=str(plan.notes.get("error_is", ERROR)),
        legend=tuple(LegendEntry(option, tone, counts[option]) for option, tone in tones.items()),
        kinds=tuple(tuple(kind.split(".")) for kind in kinds),
        rows=rows,
        others=others,
        places=(*places.values(), *(PlaceRow(name, "not offered", 0, why_, ()) for name, why_ in refused.items())),
    )


def _tones(step: Step, known: Mapping[str, Sequence[Weighed]]) -> dict[str, int]:
    """A shade for each option in the order in which places offer them; what leaves things alone is palest."""
    by_length = sorted(known.values(), key=len, reverse=True)
    offered = [weighed.option for options in by_length for weighed in options] or ["keep"]
    options = dict.fromkeys([*offered, *step.chosen.values()])
    return {option: min(index, TONES - 1) for index, option in enumerate(options)}


def _place(name: str, chosen: str, tone: int, options: Sequence[Weighed], reason: str) -> PlaceRow:
    tried = tuple(Tried(f"{weighed.option}: {_figures(weighed)}", weighed.option == chosen) for weighed in options)
    return PlaceRow(name, chosen, tone, reason, tried)


def _figures(weighed: Weighed) -> str:
    """Error, and what is saved against leaving the place as it is."""
    parts = [] if weighed.error is None else [f"error {weighed.error:.2g}"]
    if weighed.bytes:
        parts.append(f"{size(abs(weighed.bytes))} {'less' if weighed.bytes < 0 else 'more'}")
    if weighed.seconds:
        parts.append(f"{duration(abs(weighed.seconds))} {'less' if weighed.seconds < 0 else 'more'}")
    return ", ".join(parts) or "as it is"


def _cell(place: PlaceRow, options: Sequence[Weighed]) -> Cell:
    figures = next((_figures(weighed) for weighed in options if weighed.option == place.chosen), "")
    facts = ". ".join(part for part in (f"{place.chosen}: {figures}" if figures else place.chosen, place.why) if part)
    return Cell(place.name, _short(place.chosen), place.tone, facts)


def _short(option: str) -> str:
    """``i4(group=32)`` as ``i4·32``: what fits into a cell."""
    spec = Spec.parse(option)
    return "·".join([spec.name, *(str(value) for value in spec.args.values())])


def _arranged(cells: Mapping[str, Cell]) -> tuple[tuple[str, ...], tuple[MapRow, ...], tuple[Cell, ...]]:
    """Kinds of layers, a row for each block, and what lies outside of blocks; ``blocks.3.attn1.to_q`` is of block 3."""
    table: dict[tuple[str, int], dict[str, Cell]] = {}
    others: list[Cell] = []
    for place, cell in cells.items():
        if match := _BLOCK.fullmatch(place.removesuffix(".linear")):
            table.setdefault((match[1], int(match[2])), {})[match[3]] = cell
        else:
            others.append(cell)
    lone = {key for key in table if sum(1 for prefix, _ in table if prefix == key[0]) == 1}
    others += [cell for key in lone for cell in table[key].values()]
    blocks = {key: row for key, row in sorted(table.items()) if key not in lone}
    kinds = tuple(dict.fromkeys(kind for row in blocks.values() for kind in row))
    rows = tuple(
        MapRow(f"{prefix}.{index}", tuple(row.get(kind) for kind in kinds)) for (prefix, index), row in blocks.items()
    )
    return kinds, rows, tuple(others)
