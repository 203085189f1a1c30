"""A report on bits: which bits each layer has, what they cost in accuracy, and what fewer would."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.ir.plan import Phase, Plan
from intarsia.ir.spec import Spec
from intarsia.passes.quantize_integer_layers import BITS, KEEP
from intarsia.search.bit_layers import bits
from intarsia.search.explain import noted
from intarsia.search.explain_bits import bit_entries, limits_kept, short, why_bits
from intarsia.search.weighed import Weighed

TONES = {KEEP: 0, "w8a8": 2, "w4a8": 3, "w4a4": 4}
"""The colour of each option."""

BAR, GAP, HEIGHT, LEFT = 16, 3, 110, 8
DECADES = 4
"""Of perturbations that bars show, below the largest."""


@dataclass(frozen=True)
class BitKey:
    """An option, its colour, and at how many layers it was chosen, over all phases."""

    name: str
    tone: int
    count: int


@dataclass(frozen=True)
class Bar:
    """A layer: where its bar stands (pixels), how high it is, how high it would be with the fewest bits, and why."""

    x: int
    height: float
    fewest: float
    tone: int
    text: str


@dataclass(frozen=True)
class BitStrip:
    """The layers of one phase in execution order; sizes in pixels."""

    title: str
    width: int
    height: int
    bar: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class BitsSection:
    """All that a page says of bits."""

    strategy: str
    sentences: tuple[str, ...]
    key: tuple[BitKey, ...]
    strips: tuple[BitStrip, ...]


def bits_section(plan: Plan | None) -> BitsSection | None:
    """What the page says of bits; None for a plan that no search over bits made."""
    if plan is None:
        return None
    phases = [_Phase(plan, number) for number in range(len(plan.phases))]
    if not any(phase.entries for phase in phases):
        return None
    counts = Counter(option for phase in phases for option in phase.chosen.values())
    return BitsSection(
        strategy=str(Spec.parse(str(plan.notes["strategy"]))),
        sentences=tuple(_sentences(plan, phases)),
        key=tuple(BitKey(name, tone, counts[name]) for name, tone in TONES.items() if counts[name]),
        strips=tuple(phase.strip(_largest(phases)) for phase in phases),
    )


class _Phase:
    """The layers of a phase: what was noted of them, and what they have."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.at = plan, plan.phases[number]
        self.entries = bit_entries(plan, number)
        known = noted(plan, number)
        self.options: Mapping[str, Sequence[Weighed]] = {
            place: known[step, place] for step, place in self.entries if (step, place) in known
        }
        decided = {place: option for step in self.at.steps for place, option in step.chosen.items() if option in BITS}
        self.chosen = {place: decided.get(place, KEEP) for place in self.options}

    def strip(self, largest: float) -> BitStrip:
        bars = tuple(self._bar(index, place, entry, largest) for index, (place, entry) in enumerate(self._places()))
        return BitStrip(
            _title(self.at, len(self.plan.phases)), 2 * LEFT + len(bars) * (BAR + GAP), HEIGHT + 2, BAR, bars
        )

    def errors(self) -> Iterator[float]:
        """All perturbations that were measured."""
        for options in self.options.values():
            yield from (option.error for option in options if option.error)

    def _places(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(place, entry) for (_, place), entry in self.entries.items() if place in self.options]

    def _bar(self, index: int, place: str, entry: Mapping[str, Any], largest: float) -> Bar:
        options, chosen = self.options[place], self.chosen[place]
        taken = next((option for option in options if option.option == chosen), options[0])
        fewest = min(options, key=lambda option: math.inf if option.option == KEEP else math.prod(bits(option.option)))
        why = why_bits(entry, options, taken.option, self.plan.notes)
        return Bar(
            LEFT + index * (BAR + GAP),
            _height(taken.error, largest),
            _height(fewest.error, largest),
            TONES.get(chosen, 0),
            f"{place}, {chosen}: {why}",
        )


def _largest(phases: Sequence[_Phase]) -> float:
    return max((error for phase in phases for error in phase.errors()), default=1.0)


def _height(error: float | None, largest: float) -> float:
    """Pixels on a logarithmic scale of ``DECADES`` below the largest; what costs nothing has a foot."""
    level = 1 + math.log10(max(error or 0.0, 1e-300) / largest) / DECADES
    return round(4 + (HEIGHT - 4) * min(max(level, 0.0), 1.0), 1)


def _title(phase: Phase, count: int) -> str:
    if count == 1:
        return "Layers in the order in which they run"
    return f"Steps {phase.first} to {'the last' if phase.last is None else phase.last}"


def _sentences(plan: Plan, phases: Sequence[_Phase]) -> Iterator[str]:
    used = plan.notes.get("used")
    layers = sum(map(len, (phase.chosen for phase in phases)))
    ranges = "" if len(phases) == 1 else f" in {len(phases)} phases"
    if isinstance(used, dict):
        taken = f"{short(used['size'], 'size')} of weights and {short(used['bops'], 'bops')} bit operations a call"
        yield f"{layers} layers{ranges} take {taken}."
    if kept := limits_kept(plan.notes):
        yield f"Asked for: {kept}; no other choice within that has a smaller sum of errors."
