"""Why a plan decides as it does: every place with its options, what each costs and what error it brings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan
from intarsia.ir.target import Target
from intarsia.passes.base import Pass, check_chosen, find_pass
from intarsia.passes.sparse_attention import SparseAttention
from intarsia.search.explain_heads import Bargains, site_of, weigh_heads, why_head
from intarsia.search.places import Place, open_places, price_places, refused_places
from intarsia.search.weighed import Weighed, share

Key = tuple[int, str]
"""A pass's number, and a place of it."""


@dataclass(frozen=True)
class Row:
    """One place: what was offered, what was chosen, and why. A place that offers nothing has no options.

    Attributes:
        phase: The phase of the denoising loop that it was chosen for; 0 where the plan has one phase.
        steps: First and last step of that phase; None for a last that is the loop's.
    """

    run: str
    place: str
    chosen: str
    options: tuple[Weighed, ...]
    why: str
    phase: int = 0
    steps: tuple[int, int | None] = (0, None)


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
    questions: dict[tuple[str, ...], _Question] = {}
    rows: list[Row] = []
    for number, phase in enumerate(plan.phases):
        runs = tuple(step.run for step in phase.steps)
        if runs not in questions:
            questions[runs] = _Question.of(runs, graph, target, sizes or {})
        of_phase = _rows(plan, number, questions[runs])
        rows += sorted(of_phase, key=lambda row: order.get(site_of(row.place), len(order)))
    return Explanation(tuple(rows), plan.notes)


def noted(plan: Plan, phase: int = 0) -> dict[Key, tuple[Weighed, ...]]:
    """What the search wrote into the plan, by pass and place; empty for a plan that no search made.

    An entry with ``steps`` is of that range alone, one without is of the whole loop. A phase that several ranges were
    merged into has the sum of their errors.
    """
    at = plan.phases[phase]
    found: dict[Key, tuple[Weighed, ...]] = {}
    for entry in cast("list[dict[str, object]]", plan.notes.get("places", [])):
        first = cast("list[int]", entry.get("steps", [at.first]))[0]
        if first < at.first or (at.last is not None and first > at.last):
            continue
        options = cast("list[dict[str, Any]]", entry["options"])
        key = (cast(int, entry["step"]), str(entry["place"]))
        weighed = tuple(Weighed(each["option"], each["seconds"], int(each["bytes"]), each["error"]) for each in options)
        found[key] = tuple(_together(found[key], weighed)) if key in found else weighed
    return found


def why(options: Sequence[Weighed], chosen: str, total: float | None) -> str:
    """One clause: what the choice saves and takes of the error, and what the next smaller option would take."""
    (taken,) = (option for option in options if option.option == chosen)
    smaller = min(_smaller(options, taken), key=lambda option: option.error or 0.0, default=None)
    first = "kept" if taken is options[0] else f"saves {_saving(taken, options[0])}{share(taken.error, total)}"
    if smaller is None:
        others = ", ".join(option.option for option in options if option is not taken)
        return f"{first}; nothing offered ({others}) is smaller or faster"
    return f"{first}; {smaller.option} would save {_saving(smaller, options[0])}{share(smaller.error, total)}"


@dataclass(frozen=True)
class _Question:
    """What some passes leave open and refuse on a graph.

    Attributes:
        graphs: The graph that each pass is asked about.
        priced: What options are predicted to bring, as far as it was asked.
    """

    passes: tuple[Pass, ...]
    graphs: tuple[Graph, ...]
    target: Target
    sizes: Mapping[str, int]
    places: tuple[Place, ...]
    refused: tuple[tuple[int, str, str], ...]
    priced: dict[tuple[int, str, tuple[str, ...]], tuple[Weighed, ...]]

    @classmethod
    def of(cls, runs: Iterable[str], graph: Graph, target: Target, sizes: Mapping[str, int]) -> _Question:
        passes = tuple(find_pass(run) for run in runs)
        places = open_places(passes, graph, target)
        refused = tuple(refused_places(passes, graph, target))
        graphs: list[Graph] = []
        for pass_ in passes:
            graphs.append(graph)
            graph = pass_.run(graph, target, {})
        return cls(passes, tuple(graphs), target, sizes, places, refused, {})

    def check(self, phase: Phase) -> None:
        """PlanError if the phase asks for what a pass does not offer."""
        for pass_, graph, step in zip(self.passes, self.graphs, phase.steps, strict=True):
            if step.chosen:
                check_chosen(pass_, graph, self.target, step.chosen)

    def weigh(self, places: Sequence[Place]) -> dict[Key, tuple[Weighed, ...]]:
        """What the options of places are predicted to bring."""
        unknown = [place for place in places if (place.step, place.name, place.options) not in self.priced]
        for step, pass_ in enumerate(self.passes):
            asked = [place for place in unknown if place.step == step]
            if asked and isinstance(pass_, SparseAttention):
                options = {place.name: place.options for place in asked}
                found = weigh_heads(pass_, self.graphs[step], self.target, self.sizes, options)
                self.priced.update(((step, place.name, place.options), found[place.name]) for place in asked)
            elif asked:
                for place, prices in zip(
                    asked, price_places(self.passes, self.graphs[0], self.target, asked, self.sizes), strict=True
                ):
                    self.priced[step, place.name, place.options] = tuple(
                        Weighed(option, price.seconds - prices[0].seconds, price.bytes - prices[0].bytes, None)
                        for option, price in zip(place.options, prices, strict=True)
                    )
        return {(place.step, place.name): self.priced[place.step, place.name, place.options] for place in places}


def _rows(plan: Plan, phase: int, question: _Question) -> list[Row]:
    at = plan.phases[phase]
    question.check(at)
    chosen = {(p.step, p.name): at.steps[p.step].chosen.get(p.name, p.options[0]) for p in question.places}
    known = _known(plan, phase, question, chosen)
    total = plan.notes.get("error")
    total = total if isinstance(total, float) else None
    bargains = {
        step: Bargains.of(plan, [(known[key], option) for key, option in chosen.items() if key[0] == step])
        for step, pass_ in enumerate(question.passes)
        if isinstance(pass_, SparseAttention)
    }
    rows: list[Row] = []
    for (step, place), option in chosen.items():
        weighed = known[step, place]
        reason = why_head(weighed, option, bargains[step]) if step in bargains else why(weighed, option, total)
        rows.append(Row(at.steps[step].run, place, option, weighed, reason, phase, (at.first, at.last)))
    return rows + [
        Row(at.steps[step].run, name, "", (), reason, phase, (at.first, at.last))
        for step, name, reason in question.refused
    ]


def _known(plan: Plan, phase: int, question: _Question, chosen: Mapping[Key, str]) -> dict[Key, tuple[Weighed, ...]]:
    """What each place's options bring, noted or predicted; what was chosen is among them, offered or not."""
    known = noted(plan, phase) if plan.target == question.target.name else {}
    unknown: list[Place] = []
    for place in question.places:
        key = (place.step, place.name)
        options = tuple(weighed.option for weighed in known[key]) if key in known else ()
        if chosen[key] not in options:
            offered = () if options else place.options
            asked = dict.fromkeys((place.options[0], *offered, chosen[key]))
            unknown.append(Place(place.step, place.name, tuple(asked)))
    for key, found in question.weigh(unknown).items():
        known[key] = (*known[key], found[-1]) if key in known else found
    return known


def _together(some: Sequence[Weighed], others: Sequence[Weighed]) -> Iterator[Weighed]:
    """Options as they are weighed in two ranges of steps that decide alike."""
    by_option = {weighed.option: weighed for weighed in others}
    for one in some:
        other = by_option.get(one.option)
        if other is None or one.error is None or other.error is None:
            yield one
        else:
            yield Weighed(one.option, one.seconds, one.bytes, one.error + other.error)


def _smaller(options: Sequence[Weighed], taken: Weighed) -> Iterator[Weighed]:
    for option in options:
        if option.bytes < taken.bytes or (option.bytes == taken.bytes and option.seconds < taken.seconds):
            yield option


def _saving(option: Weighed, first: Weighed) -> str:
    return f"{first.bytes - option.bytes:,} bytes and {1e6 * (first.seconds - option.seconds):.3g} us"
