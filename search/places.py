"""Where passes leave a decision open, and what the graph is and costs for each answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Chosen
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import Pass
from intarsia.search.roofline import predict

MINIMIZE = ("both", "seconds", "bytes")
"""What a search makes small: time of one call, memory of the weights, or the sum of both as shares of the baseline."""


@dataclass(frozen=True)
class Place:
    """One decision: at ``name``, by pass number ``step``, one of ``options``, the first of which changes nothing."""

    step: int
    name: str
    options: tuple[str, ...]


class Priced(Protocol):
    """Something that takes time and memory: a ``Price``, or the ``Prediction`` of a whole graph."""

    @property
    def seconds(self) -> float:
        """Time of one call."""

    @property
    def bytes(self) -> int:
        """Memory that the weights take."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a whole graph is predicted to cost: time of one call in seconds, memory of the weights in bytes."""

    seconds: float
    bytes: int


Answers = Mapping[int, Chosen]
"""The options chosen for each pass, by the pass's number; what is left out takes its first option."""

NO_ANSWERS: Answers = MappingProxyType({})


def open_places(
    passes: Sequence[Pass], graph: Graph, target: Target, answers: Answers = NO_ANSWERS
) -> tuple[Place, ...]:
    """All open decisions, each pass asked about the graph that ``answers`` to the passes before it make."""
    found: list[Place] = []
    for step, (pass_, asked) in enumerate(zip(passes, asked_about(passes, graph, target, answers), strict=True)):
        found += [Place(step, name, options) for name, options in pass_.choices(asked, target).items()]
    return tuple(found)


def refused_places(
    passes: Sequence[Pass], graph: Graph, target: Target, answers: Answers = NO_ANSWERS
) -> Iterator[tuple[int, str, str]]:
    """Where a pass looked and offers nothing: the pass's number, the place and the reason."""
    for step, (pass_, asked) in enumerate(zip(passes, asked_about(passes, graph, target, answers), strict=True)):
        for name, reason in pass_.refusals(asked, target).items():
            yield step, name, reason


def asked_about(passes: Sequence[Pass], graph: Graph, target: Target, answers: Answers) -> Iterator[Graph]:
    """The graph that each pass is asked about: what those before it make by ``answers``, first options otherwise."""
    for step, pass_ in enumerate(passes):
        yield graph
        graph = pass_.run(graph, target, answers.get(step, {}))


def run_passes(passes: Sequence[Pass], graph: Graph, target: Target, answers: Answers) -> Graph:
    """The graph after all passes; InvalidGraph names the pass that broke it."""
    for step, pass_ in enumerate(passes):
        changed = pass_.run(graph, target, answers.get(step, {}))
        if changed is not graph:
            verify(changed)
        graph = changed
    return graph


def answer(places: Sequence[Place], selection: Sequence[int]) -> Answers:
    """The selection, a number of an option for each place, as passes and plans take it; first options are left out."""
    answers: dict[int, dict[str, str]] = {}
    for place, number in zip(places, selection, strict=True):
        if number:
            answers.setdefault(place.step, {})[place.name] = place.options[number]
    return answers


def cost(predicted: Priced, baseline: Priced, *, minimize: str) -> float:
    """What a search makes small, 1 for the baseline of one measure and 2 for that of both.

    Raises:
        UsageError: ``minimize`` is none of both, seconds, bytes.
    """
    shares = {
        "seconds": predicted.seconds / max(baseline.seconds, 1e-300),
        "bytes": predicted.bytes / max(baseline.bytes, 1),
    }
    if minimize == "both":
        return sum(shares.values())
    if minimize not in shares:
        raise UsageError(f"minimize {minimize!r} is unknown. Known: {', '.join(MINIMIZE)}")
    return shares[minimize]


def price_places(
    passes: Sequence[Pass],
    graph: Graph,
    target: Target,
    places: Sequence[Place],
    sizes: Mapping[str, int],
    *,
    answers: Answers = NO_ANSWERS,
) -> tuple[tuple[Price, ...], ...]:
    """For each place, what the whole graph is predicted to cost by option, all other places as in ``answers``."""

    def price(more: Answers) -> Price:
        found = predict(run_passes(passes, graph, target, {**answers, **more}), target, sizes)
        return Price(found.seconds, found.bytes)

    if not places:
        return ()
    unchanged = price({})
    return tuple(
        (unchanged, *(price({place.step: {place.name: option}}) for option in place.options[1:])) for place in places
    )
