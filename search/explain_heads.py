"""Why heads of attention have the patterns that they have: what each saves and loses, against what others pay."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intarsia.ir.errors import SpecError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.spec import Spec
from intarsia.ir.target import Target
from intarsia.passes.sparse_attention import DENSE, SparseAttention, places
from intarsia.search.head_errors import Heads
from intarsia.search.weighed import Weighed, share

ALIKE = 0.02
"""Shares of time within which two patterns are told as equally cheap: columns of stripes are rounded to blocks."""


_LIST = re.compile(r"'((?:[^',]+,){4}[^',]+)((?:,[^',]+)+)'")
"""A list of more than five in quotes: the first five, and the others."""


def site_of(place: str) -> str:
    """The attention that a head's place belongs to: ``blocks.3.attn1.y`` of ``blocks.3.attn1.y#2``."""
    return place.partition("#")[0]


def weigh_heads(
    pass_: SparseAttention,
    graph: Graph,
    target: Target,
    sizes: Mapping[str, int],
    options: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[Weighed, ...]]:
    """What options of heads are predicted to save against the first, by place; no error.

    Seconds are those of one head among many alike, as ``Heads.costs`` has them.

    Args:
        options: By place of a head; any that the pass can make, listed by it or not.
    """
    sites = tuple(site for site in pass_.sites(graph) if any(place in options for place in places(site)))
    every = tuple(options.get(place, (DENSE,)) for site in sites for place in places(site))
    heads = Heads(pass_, graph, sites, every, target, sizes)
    costs = heads.costs("seconds")
    return {
        place: tuple(
            Weighed(option, float(seconds - row[0]), 0, None)
            for option, seconds in zip(options[place], row[: len(options[place])], strict=True)
        )
        for place, row in zip(heads.places, np.asarray(costs), strict=True)
        if place in options
    }


@dataclass(frozen=True)
class Bargains:
    """What a phase's choice is held against.

    Attributes:
        total: The plan's error; None if no search measured it.
        paid: The most error that any head of the phase takes on for each second saved.
        epsilon: Above which loss the search kept heads dense, for a greedy one.
    """

    total: float | None = None
    paid: float | None = None
    epsilon: float | None = None

    @classmethod
    def of(cls, plan: Plan, decided: Iterable[tuple[Sequence[Weighed], str]]) -> Bargains:
        """Those of the heads of a phase, each with its options and the chosen one."""
        total = plan.notes.get("error")
        rates = [rate for options, chosen in decided for rate in _rates(options, chosen)]
        return cls(total if isinstance(total, float) else None, max(rates, default=None), _epsilon(plan))


def abridged(option: str) -> str:
    """A pattern's text for people, of long lists the beginning: ``offsets='0.0.0,1.0.0,-1.0.0 and 20 more'``."""
    return _LIST.sub(lambda found: f"'{found[1]} and {found[2].count(',')} more'", option)


def why_head(options: Sequence[Weighed], chosen: str, bargains: Bargains) -> str:
    """One clause: what the pattern saves and takes of the error, and what the next cheaper one would take.

    For a dense head: the pattern that loses least for what it saves, and what other heads pay for as much.
    """
    (taken,) = (option for option in options if option.option == chosen)
    if taken is options[0]:
        return _why_dense(options, bargains)
    first = f"saves {_saved(taken)}{share(taken.error, bargains.total)}"
    following = _next_cheaper(options, taken)
    if following is None:
        return f"{first}; nothing offered is cheaper"
    more = f"{_saved(following)}{share(following.error, bargains.total)}"
    return f"{first}; next, {abridged(following.option)} would save {more}"


def _why_dense(options: Sequence[Weighed], bargains: Bargains) -> str:
    cheaper = [option for option in options if option.seconds < 0]
    if not cheaper:
        return "stays dense: no pattern is predicted to be faster"
    if any(option.error is None for option in cheaper):
        most = min(cheaper, key=lambda option: option.seconds)
        return f"stays dense; {abridged(most.option)} would save most, {_saved(most)}; no search measured what it loses"
    if bargains.epsilon is not None:
        least = min(cheaper, key=lambda option: option.error or 0.0)
        return (
            f"stays dense: every pattern's loss exceeds epsilon, {bargains.epsilon:.3g}; "
            f"{abridged(least.option)} loses least and would save {_saved(least)}{share(least.error, bargains.total)}"
        )
    best = min(cheaper, key=lambda option: (option.error or 0.0) / -option.seconds)
    saved = f"{_saved(best)}{share(best.error, bargains.total)}"
    told = f"stays dense; the best bargain, {abridged(best.option)}, would save {saved}"
    if bargains.paid is None or (best.error or 0.0) <= -bargains.paid * best.seconds:
        return f"{told}; the budget is kept without it"
    return f"{told}; other heads pay at most {_price(-bargains.paid * best.seconds, bargains.total)} for as much"


def _next_cheaper(options: Sequence[Weighed], taken: Weighed) -> Weighed | None:
    """Of the options that save least beyond the taken one, alike ones together, that of least error."""
    cheaper = [option for option in options if option.seconds < taken.seconds * (1 + ALIKE)]
    if not cheaper:
        return None
    nearest = max(option.seconds for option in cheaper)
    return min((o for o in cheaper if o.seconds >= nearest * (1 + ALIKE)), key=lambda option: option.error or 0.0)


def _rates(options: Sequence[Weighed], chosen: str) -> Iterator[float]:
    """What the chosen option takes of error beyond each dearer one, for each second that it saves beyond it."""
    (taken,) = (option for option in options if option.option == chosen)
    if taken.error is None:
        return
    for option in options:
        if option.error is not None and option.seconds > taken.seconds:
            rate = (taken.error - option.error) / (option.seconds - taken.seconds)
            if math.isfinite(rate):
                yield rate


def _epsilon(plan: Plan) -> float | None:
    """Above which loss heads stayed dense: the given one, or that which the search found; None if it is not greedy."""
    try:
        strategy = Spec.parse(str(plan.notes.get("strategy")))
    except SpecError:
        return None
    if strategy.args.get("choose") != "greedy":
        return None
    found = plan.notes.get("epsilon") or strategy.args.get("epsilon")
    return float(found) if isinstance(found, int | float) and found else None


def _saved(option: Weighed) -> str:
    return f"{-1e6 * option.seconds:.3g} us"


def _price(error: float, total: float | None) -> str:
    return f"{error / total:.1%}" if total else f"{error:.2g}"
