"""Why a plan decides as it does: every place with its options, what each costs and what error it brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.target import Target
from intarsia.passes.base import Pass, check_chosen, find_pass
from intarsia.search.places import Place, open_places, price_places, refused_places


@dataclass(frozen=True)
class Weighed:
    """An option with what it brings beyond the first.

    Attributes:
        seconds: Predicted change of the time of one call; negative is faster.
        bytes: Predicted change of the memory of the weights; negative is smaller.
        error: Relative squared error of the outputs with this option alone; None if no search measured it.
    """

    option: str
    seconds: float
    bytes: int
    error: float | None


@dataclass(frozen=True)
class Row:
    """One place: what was offered, what was chosen, and why. A place that offers nothing has no options.

    Attributes:
        phase: The phase of the denoising loop that it was chosen for; 0 where the plan has one phase.
    """

    run: str
    place: str
    chosen: str
    options: tuple[Weighed, ...]
    why: str
    phase: int = 0


@dataclass(frozen=True)
class Explanation:
    """A plan's decisions, place by place in execution order, and what the search knew as a whole."""

    rows: tuple[Row, ...]
    notes: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {"rows": [asdict(row) for row in self.rows], "notes": dict(self.notes)}


def explain(plan: Plan, graph: Graph, target: Target, sizes: Mapping[str, int] | None = None) -> Explanation:
    """Every decision of the plan, phase by phase, with the numbers of the search that made it, or predicted ones.

    A plan written by hand, or asked about for another target, has predicted costs and no errors.

    Raises:
        PlanError: The plan asks for what a pass does not offer.
        UsageError, SpecError: A pass of the plan is unknown.
        InvalidGraph: A named size has no value.
    """
    order = {node.name: number for number, node in enumerate(graph.nodes)}
    rows: list[Row] = []
    for phase in range(len(plan.phases)):
        of_phase = _rows(plan, phase, graph, target, sizes or {})
        rows += sorted(of_phase, key=lambda row: order.get(row.place, len(order)))
    return Explanation(tuple(rows), plan.notes)


def _rows(plan: Plan, phase: int, graph: Graph, target: Target, sizes: Mapping[str, int]) -> list[Row]:
    steps = plan.phases[phase].steps
    passes = tuple(find_pass(step.run) for step in steps)
    places = open_places(passes, graph, target)
    changed = graph
    for pass_, step in zip(passes, steps, strict=True):
        check_chosen(pass_, changed, target, step.chosen)
        changed = pass_.run(changed, target, {})
    known = noted(plan, phase) if plan.target == target.name else {}
    unknown = tuple(place for place in places if (place.step, place.name) not in known)
    known |= _predicted(passes, graph, target, unknown, sizes)
    total = plan.notes.get("error")
    rows: list[Row] = []
    for place in places:
        weighed = known[place.step, place.name]
        chosen = steps[place.step].chosen.get(place.name, place.options[0])
        reason = why(weighed, chosen, total if isinstance(total, float) else None)
        rows.append(Row(steps[place.step].run, place.name, chosen, weighed, reason, phase))
    refused = refused_places(passes, graph, target)
    return rows + [Row(steps[number].run, name, "", (), reason, phase) for number, name, reason in refused]


def noted(plan: Plan, phase: int = 0) -> dict[tuple[int, str], tuple[Weighed, ...]]:
    """What the search wrote into the plan, by pass and place; empty for a plan that no search made.

    An entry with a ``phase`` is of that phase alone, one without is of every phase.
    """
    found: dict[tuple[int, str], tuple[Weighed, ...]] = {}
    for entry in cast("list[dict[str, object]]", plan.notes.get("places", [])):
        if entry.get("phase", phase) != phase:
            continue
        options = cast("list[dict[str, Any]]", entry["options"])
        found[cast(int, entry["step"]), str(entry["place"])] = tuple(
            Weighed(each["option"], each["seconds"], int(each["bytes"]), each["error"]) for each in options
        )
    return found


def _predicted(
    passes: tuple[Pass, ...], graph: Graph, target: Target, places: tuple[Place, ...], sizes: Mapping[str, int]
) -> dict[tuple[int, str], tuple[Weighed, ...]]:
    """What the options of places bring that no search has weighed, by pass and place."""
    return {
        (place.step, place.name): tuple(
            Weighed(option, price.seconds - priced[0].seconds, price.bytes - priced[0].bytes, None)
            for option, price in zip(place.options, priced, strict=True)
        )
        for place, priced in zip(places, price_places(passes, graph, target, places, sizes), strict=True)
    }


def why(options: tuple[Weighed, ...], chosen: str, total: float | None) -> str:
    """One clause: what the choice saves and takes of the error, and what the next smaller option would take."""
    (taken,) = (option for option in options if option.option == chosen)
    smaller = min(_smaller(options, taken), key=lambda option: option.error or 0.0, default=None)
    first = "kept" if taken is options[0] else f"saves {_saving(taken, options[0])}{_share(taken.error, total)}"
    if smaller is None:
        others = ", ".join(option.option for option in options if option is not taken)
        return f"{first}; nothing offered ({others}) is smaller or faster"
    return f"{first}; {smaller.option} would save {_saving(smaller, options[0])}{_share(smaller.error, total)}"


def _smaller(options: tuple[Weighed, ...], taken: Weighed) -> Iterator[Weighed]:
    for option in options:
        if option.bytes < taken.bytes or (option.bytes == taken.bytes and option.seconds < taken.seconds):
            yield option


def _saving(option: Weighed, first: Weighed) -> str:
    return f"{first.bytes - option.bytes:,} bytes and {1e6 * (first.seconds - option.seconds):.3g} us"


def _share(error: float | None, total: float | None) -> str:
    if error is None:
        return ""
    return f" at {error / total:.1%} of the plan's error" if total else f" at an error of {error:.2g}"
