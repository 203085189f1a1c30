"""Why a plan decides as it does: every place with its options, what each costs and what error it brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from intarsia.ir.graph import Graph
from intarsia.ir.plan import Chosen, Phase, Plan, Step
from intarsia.ir.target import Target
from intarsia.passes.apply import apply, check_graph
from intarsia.passes.base import Pass, check_chosen, find_pass
from intarsia.passes.integer_only import left_in_float
from intarsia.passes.sparse_attention import SparseAttention
from intarsia.search.explain_bits import bit_entries, why_bits
from intarsia.search.explain_heads import Bargains, site_of, weigh_heads, why_head
from intarsia.search.places import Answers, Place, open_places, price_places, refused_places
from intarsia.search.weighed import Weighed, share

LOWERS = "lower-integer"
"""The pass behind which a plan's network computes with integers."""

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
    """A plan's decisions, place by place in execution order, and what the search knew as a whole.

    Attributes:
        in_float: What the phases leave in float, as ``integer_only`` lists it; None where no pass makes integers.
    """

    rows: tuple[Row, ...]
    notes: Mapping[str, object]
    in_float: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        found: dict[str, object] = {"rows": [asdict(row) for row in self.rows], "notes": dict(self.notes)}
        return found if self.in_float is None else {**found, "in_float": list(self.in_float)}


def explain(plan: Plan, graph: Graph, target: Target, sizes: Mapping[str, int] | None = None) -> Explanation:
    """Every decision of the plan, phase by phase, with the numbers of the search that made it, or predicted ones.

    A plan written by hand, or asked about for another target, has predicted costs and no errors.

    Raises:
        PlanError: The plan was made for another graph, or asks for what a pass does not offer.
        UsageError, SpecError: A pass of the plan is unknown.
        InvalidGraph: A named size has no value.
    """
    check_graph(plan, graph)
    order = {node.name: number for number, node in enumerate(graph.nodes)}
    questions: dict[tuple[object, ...], _Question] = {}
    rows: list[Row] = []
    for number, phase in enumerate(plan.phases):
        passes = tuple(find_pass(step.run) for step in phase.steps)
        steered = tuple(
            tuple(step.chosen.items()) if pass_.steers else () for pass_, step in zip(passes, phase.steps, strict=True)
        )
        if (passes, steered) not in questions:
            questions[passes, steered] = _Question.of(passes, phase.steps, graph, target, sizes or {})
        of_phase = _rows(plan, number, questions[passes, steered])
        rows += sorted(of_phase, key=lambda row: order.get(site_of(row.place), len(order)))
    return Explanation(tuple(rows), plan.notes, _in_float(plan, graph, target))


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
        weighed = tuple(map(_weighed, options))
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
        answers: The plan's, to the passes on whose answers it hangs what others ask.
        priced: What options are predicted to bring, as far as it was asked.
    """

    passes: tuple[Pass, ...]
    graphs: tuple[Graph, ...]
    target: Target
    sizes: Mapping[str, int]
    places: tuple[Place, ...]
    refused: tuple[tuple[int, str, str], ...]
    answers: Answers
    priced: dict[tuple[int, str, tuple[str, ...]], tuple[Weighed, ...]]

    @classmethod
    def of(
        cls, passes: tuple[Pass, ...], steps: Sequence[Step], graph: Graph, target: Target, sizes: Mapping[str, int]
    ) -> _Question:
        answers: dict[int, Chosen] = {}
        graphs: list[Graph] = []
        asked = graph
        for number, (pass_, step) in enumerate(zip(passes, steps, strict=True)):
            graphs.append(asked)
            if pass_.steers:
                check_chosen(pass_, asked, target, step.chosen)
                answers[number] = step.chosen
            asked = pass_.run(asked, target, answers.get(number, {}))
        places = open_places(passes, graph, target, answers)
        refused = tuple(refused_places(passes, graph, target, answers))
        return cls(passes, tuple(graphs), target, sizes, places, refused, answers, {})

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
            elif pass_.steers:
                for place in asked:
                    free = tuple(Weighed(option, 0.0, 0, None) for option in place.options)
                    self.priced[step, place.name, place.options] = free
            elif asked:
                priced = price_places(self.passes, self.graphs[0], self.target, asked, self.sizes, answers=self.answers)
                for place, prices in zip(asked, priced, strict=True):
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
    entries = bit_entries(plan, phase)
    rows: list[Row] = []
    for (step, place), option in chosen.items():
        weighed = known[step, place]
        if (step, place) in entries and all(one.bops is not None for one in weighed):
            reason = why_bits(entries[step, place], weighed, option, plan.notes)
        elif question.passes[step].steers:
            reason = "later passes read it; it costs nothing itself"
        elif step in bargains:
            reason = why_head(weighed, option, bargains[step])
        else:
            reason = why(weighed, option, total)
        rows.append(Row(at.steps[step].run, place, option, weighed, reason, phase, (at.first, at.last)))
    return rows + [
        Row(at.steps[step].run, name, "", (), reason, phase, (at.first, at.last))
        for step, name, reason in question.refused
    ]


def _in_float(plan: Plan, graph: Graph, target: Target) -> tuple[str, ...] | None:
    """What the phases that make integers leave in float; None where there are none."""
    lowered = [n for n, phase in enumerate(plan.phases) if any(step.run.startswith(LOWERS) for step in phase.steps)]
    return left_in_float(apply(plan, graph, target, phase=number) for number in lowered)


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


def _weighed(noted: Mapping[str, Any]) -> Weighed:
    """An option as a plan notes it."""
    interval = noted.get("interval")
    return Weighed(
        noted["option"],
        noted["seconds"],
        int(noted["bytes"]),
        noted["error"],
        (float(interval[0]), float(interval[1])) if interval else None,
        noted.get("bops"),
    )


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
