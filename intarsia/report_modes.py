"""The layer x head map of modes: what each head computes in one phase, as a coloured grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from intarsia.ir.errors import SpecError
from intarsia.ir.plan import Phase, Plan
from intarsia.ir.spec import Spec
from intarsia.passes.sparse_attention import DENSE, SKIP
from intarsia.report_attention import short_names
from intarsia.search.explain import noted
from intarsia.search.explain_heads import Bargains, abridged, why_head
from intarsia.search.weighed import Weighed

MODES = (DENSE, SKIP, "diagonal", "multi-diagonal", "vertical-stripe", "tile-offsets")
"""Modes that have a colour of their own; all others share the last."""

WIDE = 24
"""Heads up to which the density is written into the cells."""


@dataclass(frozen=True)
class Mode:
    """A mode, its colour, and how often it was chosen, over all phases."""

    name: str
    tone: int
    count: int


@dataclass(frozen=True)
class HeadCell:
    """One head: where it stands (pixels), its colour, how strong, and what is told of it."""

    x: int
    y: int
    tone: int
    strength: float
    label: str
    text: str


@dataclass(frozen=True)
class Label:
    """A layer or the number of a head, and where it is written (pixels)."""

    at: float
    text: str


@dataclass(frozen=True)
class ModeGrid:
    """The layer x head map of one phase; sizes in pixels."""

    title: str
    width: int
    height: int
    left: int
    cell: tuple[int, int]
    layers: tuple[Label, ...]
    heads: tuple[Label, ...]
    cells: tuple[HeadCell, ...]


def mode_of(option: str) -> str:
    """The mode of a pattern: ``diagonal`` of ``diagonal(density=0.25)``; a user's is called by its class."""
    return option.rpartition(".py:")[2].partition("(")[0]


def density_of(option: str) -> float | None:
    """The share of pairs that the pattern's text asks for; None if it has none."""
    if mode_of(option) in (DENSE, SKIP):
        return float(option == DENSE)
    try:
        found = Spec.parse(option.rpartition(".py:")[2]).args.get("density")
    except SpecError:
        return None
    return float(found) if isinstance(found, int | float) else None


def modes(phases: Sequence[Mapping[str, Sequence[str]]]) -> tuple[Mode, ...]:
    """The modes that any head has in any phase, those with a colour of their own first."""
    counts = Counter(mode_of(option) for phase in phases for options in phase.values() for option in options)
    known = [mode for mode in MODES if mode in counts]
    return tuple(Mode(mode, _tone(mode), counts[mode]) for mode in (*known, *sorted(counts.keys() - set(MODES))))


def _tone(mode: str) -> int:
    return MODES.index(mode) if mode in MODES else len(MODES)


def key(sites: Mapping[str, Sequence[str]]) -> str:
    """How the map is read: what colours say, and numbers where there are any."""
    strength = "the denser, the stronger a colour."
    if max(map(len, sites.values())) > WIDE:
        return strength
    return f"a number is the share of pairs computed, in percent; {strength}"


def grid(
    plan: Plan, phase: int, sites: Mapping[str, Sequence[str]], weighed: Mapping[str, Sequence[Weighed]]
) -> ModeGrid:
    """The map of one phase.

    Args:
        sites: By attention, what each of its heads does.
        weighed: By place, the options of those heads whose cells tell why they do it.
    """
    heads = max(map(len, sites.values()))
    width, height = (36, 20) if heads <= WIDE else (10, 12)
    names = short_names(sites)
    left, top = 12 + 7 * max(map(len, names)), 20
    bargains = Bargains.of(plan, [(options, _chosen_at(sites, place)) for place, options in weighed.items()])
    cells = [
        HeadCell(
            x=left + head * width,
            y=top + row * height,
            tone=_tone(mode_of(option)),
            strength=_strength(option),
            label=_percent(option) if heads <= WIDE else "",
            text=_told(f"{site}#{head}", option, weighed.get(f"{site}#{head}", ()), bargains),
        )
        for row, (site, options) in enumerate(sites.items())
        for head, option in enumerate(options)
    ]
    every = 1 if heads <= WIDE else 4
    return ModeGrid(
        title=phase_title(plan.phases, phase),
        width=left + heads * width + 2,
        height=top + len(sites) * height + 2,
        left=left,
        cell=(width, height),
        layers=tuple(Label(top + (row + 0.5) * height + 4, name) for row, name in enumerate(names)),
        heads=tuple(Label(left + (head + 0.5) * width, str(head)) for head in range(0, heads, every)),
        cells=tuple(cells),
    )


def phase_title(phases: Sequence[Phase], number: int) -> str:
    """``phase 1, steps 10 to 19``; ``all steps`` where there is one phase."""
    if len(phases) == 1:
        return "all steps"
    at = phases[number]
    return f"phase {number}, steps {at.first} to {'the last' if at.last is None else at.last}"


def weighed_heads(plan: Plan, phase: int, sites: Mapping[str, Sequence[str]]) -> dict[str, tuple[Weighed, ...]]:
    """What the search noted of heads that do what it had offered, by place."""
    of_heads = ((place, options) for (_, place), options in noted(plan, phase).items() if "#" in place)
    return {
        place: options
        for place, options in of_heads
        if any(weighed.option == _chosen_at(sites, place) for weighed in options)
    }


def _chosen_at(sites: Mapping[str, Sequence[str]], place: str) -> str:
    site, _, head = place.rpartition("#")
    return sites[site][int(head)]


def _told(place: str, option: str, options: Sequence[Weighed], bargains: Bargains) -> str:
    return f"{place}: {abridged(option)}" + (f". {why_head(options, option, bargains)}" if options else "")


def _strength(option: str) -> float:
    """How opaque a cell is: the denser, the stronger."""
    density = density_of(option)
    return 0.55 if density is None else round(0.22 + 0.78 * min(density, 1.0) ** 0.5, 2)


def _percent(option: str) -> str:
    density = density_of(option)
    return "" if density is None or mode_of(option) in (DENSE, SKIP) else f"{100 * density:.3g}"
