"""What each pattern loses and costs at each head in each phase of the loop, and which one each head gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.errors import UsageError
from intarsia.search.solve import Option, solve

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]
"""The number of the option that each head takes in each phase (P, N)."""

ABSENT = np.inf
"""Error of an option that a head does not have; heads differ in how many they have."""


@dataclass(frozen=True)
class HeadTable:
    """Errors and costs of all options: P phases, N heads, at most O options each, the first of which is dense.

    Attributes:
        phases: First and last step of each phase.
        places: What plans call the heads.
        options: Of each head, the patterns that it may have.
        errors: What each option loses (P, N, O); nothing for the first.
        costs: What each option costs (N, O) in the unit of the budget: seconds, or the share of pairs computed.
    """

    phases: tuple[tuple[int, int], ...]
    places: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    errors: Floats
    costs: Floats

    @property
    def lengths(self) -> Floats:
        """How many steps each phase has (P)."""
        return np.array([last - first + 1 for first, last in self.phases], dtype=np.float64)

    @property
    def dense(self) -> float:
        """What all heads cost together if all are dense, in the mean over steps."""
        return float(self.costs[:, 0].sum())

    @property
    def cheapest(self) -> float:
        """What all heads cost together if each takes its cheapest option, in the mean over steps."""
        return float(self._present.min(axis=1).sum())

    @property
    def _present(self) -> Floats:
        return np.where(np.isfinite(self.errors).any(axis=0), self.costs, np.inf)

    def cost(self, choice: Choice) -> float:
        """What all heads cost together, in the mean over steps."""
        heads = np.arange(len(self.places))
        per_phase = [self.costs[heads, row].sum() for row in choice]
        return float(np.dot(per_phase, self.lengths) / self.lengths.sum())

    def error(self, choice: Choice) -> float:
        """The sum of the errors of all heads in all phases."""
        return float(np.take_along_axis(self.errors, choice[:, :, None], axis=2).sum())

    def exact(self, budget: float) -> tuple[Choice, float]:
        """The choice of least error that costs at most ``budget`` in the mean over steps; its gap as ``least_error``'s.

        UsageError if even the cheapest options cost more.
        """
        phases, heads, options = self.errors.shape
        weight = self.lengths / self.lengths.sum()
        costs = np.broadcast_to(self.costs, self.errors.shape) * weight[:, None, None]
        costs = np.where(np.isfinite(self.errors), costs, np.inf).reshape(-1, options)
        budget *= 1 + 1e-9  # a budget that is just what a choice costs lets it through, however its costs add up
        if costs.min(axis=1).sum() > budget:
            raise UsageError(
                f"attention at a budget of {budget:.4g}: the cheapest patterns of all heads cost "
                f"{self.cheapest:.4g} of {self.dense:.4g}; offer cheaper patterns or raise the budget"
            )
        choice, gap = least_error(self.errors.reshape(-1, options), costs, budget)
        return choice.reshape(phases, heads), gap

    def greedy(self, epsilon: float, *, weight: float) -> Choice:
        """Each head's option of least ``error + weight * cost / dense cost``; dense where all others exceed epsilon.

        Source: Sparse-vDiT (arXiv 2506.03065), equations 2 and 3.
        """
        loss = self.errors + weight * self.costs / np.maximum(self.costs[:, :1], 1e-300)
        return by_loss(loss, epsilon)

    def weighted(self, weights: Floats) -> HeadTable:
        """The same with the errors of each phase multiplied by its weight (P)."""
        return replace(self, errors=self.errors * weights[:, None, None])


def by_loss(loss: Floats, epsilon: float) -> Choice:
    """Along the last axis the option of least loss but the first; the first where all others exceed epsilon."""
    sparse = loss[..., 1:]
    best = sparse.argmin(axis=-1) + 1
    return np.where(sparse.min(axis=-1) > epsilon, 0, best)


def least_error(errors: Floats, costs: Floats, budget: float) -> tuple[Choice, float]:
    """For each of M rows the option, so that the sum of errors is least and the costs add up to the budget at most.

    Also by how much, as a share, the sum may exceed the least one: 0 for up to ``EXACT`` rows, which HiGHS decides.
    With more, a price of cost, found by bisection, decides; it also gives a bound below the least sum, which is as near
    as one row's error. Source: Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27(3).

    Args:
        errors: (M, O), infinite where a row lacks an option.
        costs: (M, O), infinite there too.
        budget: At least the sum of the least costs.
    """
    errors = np.where(np.isfinite(costs), errors, np.inf)
    if len(errors) <= EXACT:
        return _integer_program(errors, costs, budget), 0.0
    price, choice = _price(errors, costs, budget)
    rows = np.arange(len(errors))
    bound = (errors + price * np.where(np.isfinite(costs), costs, 0.0)).min(axis=1).sum() - price * budget
    _spend(errors, costs, choice, budget - costs[rows, choice].sum())
    reached = errors[rows, choice].sum()
    return choice, float((reached - bound) / max(reached, 1e-300))


EXACT = 600
"""Rows up to which HiGHS decides."""


def _spend(errors: Floats, costs: Floats, choice: Choice, left: float) -> None:
    """Change ``choice`` in place to better options that the rest of the budget pays for, best bargains first."""
    rows = np.arange(len(errors))
    gains = errors[rows, choice][:, None] - errors
    extra = costs - costs[rows, choice][:, None]
    better = np.argwhere((gains > 0) & (extra <= left) & np.isfinite(extra))
    bargains = gains[tuple(better.T)] / np.maximum(extra[tuple(better.T)], 1e-300)
    changed: set[int] = set()
    for row, option in better[np.argsort(-bargains, kind="stable")]:
        if row not in changed and extra[row, option] <= left:
            left -= extra[row, option]
            choice[row] = option
            changed.add(int(row))


def _price(errors: Floats, costs: Floats, budget: float) -> tuple[float, Choice]:
    """The least price of cost at which the rows' cheapest priced options keep the budget, and these options."""
    finite = np.where(np.isfinite(costs), costs, 0.0)

    def at(price: float) -> Choice:
        priced = errors + price * finite
        ties = priced <= priced.min(axis=1, keepdims=True)
        found: Choice = np.where(ties, costs, np.inf).argmin(axis=1).astype(np.int64)
        return found

    def spent(choice: Choice) -> float:
        return float(costs[np.arange(len(costs)), choice].sum())

    free = at(0.0)
    if spent(free) <= budget:
        return 0.0, free
    low, high = 0.0, 1.0
    while spent(at(high)) > budget * (1 + 1e-12):
        low, high = high, high * 8
        if high > 1e200:  # prices beyond all errors: the cheapest options
            return high, costs.argmin(axis=1).astype(np.int64)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(at(middle)) <= budget else (middle, high)
    return high, at(high)


def _integer_program(errors: Floats, costs: Floats, budget: float) -> Choice:
    cheapest = np.where(np.isfinite(costs), costs, np.inf).argmin(axis=1)
    places: list[Sequence[Option]] = []
    orders: list[list[int]] = []
    for row in range(len(errors)):
        order = [int(cheapest[row])]
        order += [n for n in range(errors.shape[1]) if n != order[0] and np.isfinite(errors[row, n] + costs[row, n])]
        least = costs[row, order[0]]
        places.append([Option(float(errors[row, n]), float(costs[row, n] - least)) for n in order])
        orders.append(order)
    left = budget - float(costs[np.arange(len(costs)), cheapest].sum())
    found = solve(places, max(left, 0.0))
    return np.array([order[number] for order, number in zip(orders, found, strict=True)])


def load_errors(path: Path, *, steps: int, heads: int, options: int) -> Floats:
    """Errors (steps, heads, options) of a safetensors file under the key ``errors``; UsageError if it is not that."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"table {path}: cannot be read as safetensors: {error}") from error
    errors = found.get("errors")
    if errors is None or errors.shape != (steps, heads, options):
        shape = "no 'errors'" if errors is None else f"errors {errors.shape}"
        raise UsageError(
            f"table {path}: holds {shape}; this model has {steps} steps, {heads} heads and {options} options, "
            "so errors must be of that shape"
        )
    if np.isnan(errors).any() or (errors < 0).any():
        raise UsageError(f"table {path}: errors must be numbers of at least 0; give infinity for an absent option")
    return errors.astype(np.float64)
