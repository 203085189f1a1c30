"""How many bits each layer gets: the least perturbation within limits on size, bit operations and latency, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from intarsia.ir.errors import UsageError
from intarsia.search.bit_layers import MEASURES, Layer, Problem, bits, shown
from intarsia.search.bit_table import Selection, Table, least, table

__all__ = ["MEASURES", "Infeasible", "Layer", "Problem", "Solution", "bits", "shown", "solve"]


@dataclass(frozen=True)
class Solution:
    """Which option each layer gets.

    Attributes:
        chosen: By layer, in the problem's order.
        bits: A digit a layer: the option's place among the problem's options; with 4 and 8 bits, 1 is 8.
        perturbation: The sum over the layers.
        used: What the layers take, for every measure that is known.
    """

    chosen: tuple[str, ...]
    bits: str
    perturbation: float
    used: Mapping[str, float]


class Infeasible(UsageError):
    """No choice of bits keeps the limits; the message says which limit, and by how much it is missed."""


def solve(problem: Problem, limits: Mapping[str, float]) -> Solution:
    """The choice of least perturbation that keeps every limit: bytes, operations on bits, seconds.

    Of equal perturbations the choice that takes least of what is limited; of layers that are alike, earlier ones get
    more bits. So equal input gives an equal answer. Optimal up to 1e-10 of the largest perturbation. A limit holds to
    one part in 1e9; where over twenty better choices exceed it by less than 4e-6, the answer may stay that far below.

    Raises:
        Infeasible: No choice keeps the limits.
        UsageError: A limit on latency without seconds, or tied layers that share no option.
    Source: HAWQ-V3 (arXiv 2011.10680), equations 8 to 11, with HiGHS at gap 0.
    """
    if unknown := [measure for measure in limits if measure not in problem.measures]:
        raise UsageError(f"bits: {unknown[0]} is limited, and is not known of every layer")
    choices = table(problem)
    perturbation = choices.column_costs("perturbation")
    found = least(choices, perturbation, limits)
    if found is None:
        raise Infeasible("\n".join(_why_not(choices, limits)))
    taken = sum((choices.column_costs(name) / limit for name, limit in limits.items() if limit), 0 * perturbation)
    other = least(choices, taken, {**limits, "perturbation": choices.used(found, "perturbation")})
    return _solution(choices, found if other is None else other)


def _why_not(choices: Table, limits: Mapping[str, float]) -> tuple[str, ...]:
    """By how much the smallest sets of limits that cannot hold together are missed."""
    for count in range(1, len(limits) + 1):
        together = ({name: limits[name] for name in names} for names in combinations(limits, count))
        if missed := tuple(line for asked in together for line in _missed(choices, asked)):
            return missed
    return ("no choice keeps the limits by more than 4e-6 of them; raise one by as much",)


def _missed(choices: Table, limits: Mapping[str, float]) -> Iterator[str]:
    """For each limit that cannot be kept beside the others, by how much."""
    for name, limit in limits.items():
        others = {other: value for other, value in limits.items() if other != name}
        smallest = least(choices, choices.column_costs(name), others)
        if smallest is None or choices.keeps(smallest, {name: limit}):
            continue
        reached = choices.used(smallest, name)
        beside = " and ".join(f"{other}={shown(value, other)}" for other, value in others.items())
        yield (
            f"limit {name}={shown(limit, name)} cannot be kept{f' beside {beside}' if beside else ''}: "
            f"the smallest choice takes {shown(reached, name)}, {shown(reached - limit, name)} more"
        )


def _solution(choices: Table, selection: Selection) -> Solution:
    problem, chosen = choices.problem, choices.options(selection)
    return Solution(
        chosen=chosen,
        bits="".join(str(problem.options.index(option)) for option in chosen),
        perturbation=choices.used(selection, "perturbation"),
        used={measure: choices.used(selection, measure) for measure in problem.measures},
    )
