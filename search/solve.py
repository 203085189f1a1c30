"""Which option at each place: the cheapest whose errors add up to no more than a budget, exactly."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum

import numpy as np

SLACK = 4e-6
"""By how much HiGHS may overstep a row scaled to 1 (its tolerance is 1e-6); a tighter row makes good for it."""


@dataclass(frozen=True, slots=True)
class Option:
    """What an option costs (negative for a saving) and what error it brings, at least 0."""

    cost: float
    error: float


Selection = tuple[int, ...]
"""The number of the option taken at each place."""


def solve(places: Sequence[Sequence[Option]], budget: float) -> Selection:
    """The selection of least total cost whose total error is at most ``budget``; of those the one of least error.

    Selections that use the budget up to the last few millionths are beyond HiGHS's tolerance: the answer always keeps
    the budget, and is at least as cheap as any that keeps 0.999995 of it.

    The first option of every place must have no error, so that there always is an answer. Equal input gives an equal
    answer; among places that offer the same, the earlier ones take the earlier options.
    Source: multiple-choice knapsack as an integer linear program, solved by HiGHS with gap 0; as HAWQ-V3, section 3.4.
    """
    kept = [_useful(options, budget) for options in places]
    if budget <= 0 or all(len(numbers) == 1 for numbers in kept):
        return tuple(numbers[-1] for numbers in kept)
    cheapest = tuple(numbers[-1] for numbers in kept)
    if _error(places, cheapest) <= budget:
        return cheapest
    costs, errors = _column(places, kept, "cost"), _column(places, kept, "error") / budget
    costs = costs / max(float(np.abs(costs).max()), 1e-300)
    found = _within(places, kept, budget, costs, errors, rows=())
    assert found is not None, "keeping everything is within any budget"
    least = float(costs @ _indicator(kept, found))
    other = _within(places, kept, budget, errors, errors, rows=((costs, least),))
    if other is not None and _cost(places, other) <= _cost(places, found):
        found = other
    return _ordered(places, found)


def _useful(options: Sequence[Option], budget: float) -> list[int]:
    """Options within the budget by falling cost and rising error; those that another beats in both are left out."""
    order = sorted(range(len(options)), key=lambda n: (options[n].error, options[n].cost, n))
    useful: list[int] = []
    for number in order:
        within = options[number].error <= budget
        if within and (not useful or options[number].cost < options[useful[-1]].cost):
            useful.append(number)
    if not useful:
        raise ValueError(f"no option within the error budget of {budget}; the first option must have no error")
    return useful


def _within(
    places: Sequence[Sequence[Option]],
    kept: Sequence[Sequence[int]],
    budget: float,
    objective: np.ndarray,
    errors: np.ndarray,
    *,
    rows: Sequence[tuple[np.ndarray, float]],
) -> Selection | None:
    """The selection of least objective within the budget and ``rows``; None if HiGHS finds none."""
    found = _highs(kept, objective, [(errors, 1.0), *rows])
    if found is None or _error(places, found) <= budget:
        return found
    tighter = _highs(kept, objective, [(errors, 1.0 - SLACK), *rows])
    mended = _mended(places, kept, found, budget)
    return mended if tighter is None else min(mended, tighter, key=lambda selection: _cost(places, selection))


def _mended(
    places: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], selection: Selection, budget: float
) -> Selection:
    """A selection over the budget by a hair, brought within it by the steps that cost least."""
    mended = list(selection)
    while _error(places, mended) > budget:
        steps = [
            (places[place][number].cost - places[place][mended[place]].cost, place, number)
            for place, numbers in enumerate(kept)
            for number in numbers
            if places[place][number].error < places[place][mended[place]].error
        ]
        _, place, number = min(steps)
        mended[place] = number
    return tuple(mended)


def _highs(
    kept: Sequence[Sequence[int]], objective: np.ndarray, rows: Sequence[tuple[np.ndarray, float]]
) -> Selection | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    sizes = [len(numbers) for numbers in kept]
    owner = np.repeat(np.arange(len(kept)), sizes)
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    limits = [LinearConstraint(coefficients[None, :], ub=limit) for coefficients, limit in rows]
    with printing_to_stderr():
        answer = milp(
            objective * 1e4,  # HiGHS stops within 1e-6 of the best objective
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), *limits],
            options={"mip_rel_gap": 0},
        )
    if answer.x is None:
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return tuple(
        numbers[int(np.argmax(answer.x[start : start + len(numbers)]))]
        for numbers, start in zip(kept, starts, strict=True)
    )


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """What native code prints goes to standard error: HiGHS has lines that no option silences."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _ordered(places: Sequence[Sequence[Option]], selection: Selection) -> Selection:
    """The same options, among places that offer the same in rising order."""
    alike: dict[tuple[Option, ...], list[int]] = {}
    for number, options in enumerate(places):
        alike.setdefault(tuple(options), []).append(number)
    ordered = list(selection)
    for numbers in alike.values():
        for number, option in zip(numbers, sorted(selection[n] for n in numbers), strict=True):
            ordered[number] = option
    return tuple(ordered)


def _column(places: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], field: str) -> np.ndarray:
    return np.array([getattr(places[p][n], field) for p, numbers in enumerate(kept) for n in numbers])


def _indicator(kept: Sequence[Sequence[int]], selection: Selection) -> np.ndarray:
    return np.array([float(n == chosen) for numbers, chosen in zip(kept, selection, strict=True) for n in numbers])


def _error(places: Sequence[Sequence[Option]], selection: Sequence[int]) -> float:
    return fsum(options[number].error for options, number in zip(places, selection, strict=True))


def _cost(places: Sequence[Sequence[Option]], selection: Selection) -> float:
    return fsum(options[number].cost for options, number in zip(places, selection, strict=True))
