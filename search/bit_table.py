"""All choices of bits as columns of an integer program, and the best of them by HiGHS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum

import networkx as nx
import numpy as np

from intarsia.ir.errors import UsageError
from intarsia.search.bit_layers import Problem
from intarsia.search.solve import SLACK, printing_to_stderr

ROUNDING = 1e-9
"""Share of a limit that sums of floats may exceed it by."""

CUTS = 20
"""How often HiGHS is told that an answer exceeds a limit by less than HiGHS's tolerance, before the limit is moved."""

Selection = tuple[int, ...]
"""The number of the option that each group takes."""


@dataclass(frozen=True)
class Group:
    """Layers that must agree, by number, and what they can agree on, from the fewest bits to the most."""

    members: tuple[int, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The groups of a problem; its columns are the options of the first group, of the second, and so on."""

    problem: Problem
    groups: tuple[Group, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first column of each group, and the number of columns."""
        return np.cumsum([0, *(len(group.options) for group in self.groups)])

    def column_costs(self, measure: str) -> np.ndarray:
        """The measure, or the perturbation, of each column."""
        return np.array([self._cost(group, option, measure) for group in self.groups for option in group.options])

    def options(self, selection: Selection) -> tuple[str, ...]:
        """What each layer gets, in the problem's order."""
        chosen = {
            member: group.options[number]
            for group, number in zip(self.groups, selection, strict=True)
            for member in group.members
        }
        return tuple(chosen[number] for number in range(len(self.problem.layers)))

    def used(self, selection: Selection, measure: str) -> float:
        """The measure, or the perturbation, of all layers, correctly rounded."""
        pairs = zip(self.problem.layers, self.options(selection), strict=True)
        return fsum(layer.cost(option, measure) for layer, option in pairs)

    def keeps(self, selection: Selection, limits: Mapping[str, float]) -> bool:
        """Whether no limit is exceeded, but for the rounding of sums."""
        return all(self.used(selection, measure) <= limit * (1 + ROUNDING) for measure, limit in limits.items())

    def alike(self) -> Iterator[tuple[int, int]]:
        """Pairs of groups that nothing tells apart, each with the next of its kind."""
        measures = ("perturbation", *self.problem.measures)
        last: dict[object, int] = {}
        for number, group in enumerate(self.groups):
            costs = tuple(self._cost(group, option, m) for option in group.options for m in measures)
            if (group.options, costs) in last:
                yield last[group.options, costs], number
            last[group.options, costs] = number

    def _cost(self, group: Group, option: str, measure: str) -> float:
        return fsum(self.problem.layers[member].cost(option, measure) for member in group.members)


def table(problem: Problem) -> Table:
    """The problem by groups of tied layers; UsageError if tied layers share no option."""
    tied: nx.Graph[int] = nx.Graph()
    tied.add_nodes_from(range(len(problem.layers)))
    for tie in problem.ties:
        nx.add_path(tied, tie)
    groups = []
    for members in sorted(sorted(group) for group in nx.connected_components(tied)):
        layers = [problem.layers[member] for member in members]
        shared = tuple(o for o in layers[0].options if all(o in layer.perturbation for layer in layers))
        if not shared:
            raise UsageError(f"bits: {', '.join(layer.name for layer in layers)} are tied and share no option")
        groups.append(Group(tuple(members), shared))
    return Table(problem, tuple(groups))


def least(table: Table, objective: np.ndarray, limits: Mapping[str, float]) -> Selection | None:
    """The selection of least objective, one number a column, that keeps the limits; None if HiGHS finds none.

    HiGHS lets a limit be exceeded by 1e-6. Such an answer is forbidden by name and HiGHS asked again; after as many as
    ``CUTS`` of them the limits are lowered by ``SLACK``.
    """
    if not limits:
        return tuple(int(np.argmin(part)) for part in np.split(objective, table.starts[1:-1]))
    cuts: list[Selection] = []
    while len(cuts) < CUTS:
        found = _highs(table, objective, limits, cuts)
        if found is None or table.keeps(found, limits):
            return found
        cuts.append(found)
    found = _highs(table, objective, {name: limit * (1 - SLACK) for name, limit in limits.items()}, ())
    return found if found is not None and table.keeps(found, limits) else None


def _highs(
    table: Table, objective: np.ndarray, limits: Mapping[str, float], cuts: Sequence[Selection]
) -> Selection | None:
    from scipy.optimize import Bounds, milp

    with printing_to_stderr():
        answer = milp(
            objective / max(float(np.abs(objective).max()), 1e-300) * 1e4,  # HiGHS stops within 1e-6 of the best
            integrality=np.ones(table.starts[-1]),
            bounds=Bounds(0, 1),
            constraints=[*_rules(table, limits, cuts)],
            options={"mip_rel_gap": 0},
        )
    if answer.x is None:
        return None
    return tuple(int(np.argmax(part)) for part in np.split(answer.x, table.starts[1:-1]))


def _rules(table: Table, limits: Mapping[str, float], cuts: Sequence[Selection]) -> Iterator[object]:
    """One option a group; every limit; not again what is cut off; of groups alike the earlier gets more bits."""
    from scipy.optimize import LinearConstraint

    starts, columns = table.starts, np.arange(table.starts[-1])
    yield LinearConstraint(((columns >= starts[:-1, None]) & (columns < starts[1:, None])).astype(float), 1, 1)
    for measure, limit in limits.items():
        costs = table.column_costs(measure)
        scale = max(float(np.abs(costs).max()), 1e-300)
        yield LinearConstraint(costs[None] / scale, ub=limit / scale)
    for cut in cuts:
        yield LinearConstraint(np.isin(columns, starts[:-1] + np.array(cut))[None].astype(float), ub=len(cut) - 1)
    for earlier, later in table.alike():
        ranks = np.zeros(len(columns))
        ranks[starts[earlier] : starts[earlier + 1]] = -np.arange(len(table.groups[earlier].options))
        ranks[starts[later] : starts[later + 1]] += np.arange(len(table.groups[later].options))
        yield LinearConstraint(ranks[None], ub=0)
