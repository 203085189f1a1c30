"""Which candidate comes next: by the ranking at first, then by a model of what was measured (Optuna's TPE)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import isfinite

from intarsia.kernels.records import choice_text
from intarsia.kernels.tiling import Space, Tile

ASKED = 16
"""Times that the model is asked before the next of the ranking is taken."""

History = Sequence[tuple[Tile, float | None]]
"""Candidates in the order in which they came, with seconds; None for those that were refused."""


def proposed(space: Space, history: History, ranking: Sequence[Tile], *, first: int, seed: int) -> Tile | None:
    """The next candidate after ``history``, the same for the same arguments; None when all have been.

    Args:
        ranking: All tiles of the space; the ``first`` of them come before the model is asked.
    """
    seen = {choice_text(tile) for tile, _ in history}
    left = [tile for tile in ranking if choice_text(tile) not in seen]
    times = [seconds for _, seconds in history if seconds is not None]
    if not left or len(history) < first or len(times) < 2:
        return left[0] if left else None
    return _modelled(space, history, seen, slowest=max(times), seed=seed) or left[0]


def _modelled(space: Space, history: History, seen: set[str], *, slowest: float, seed: int) -> Tile | None:
    """What TPE thinks best that has not been yet; refused candidates count as twice the slowest."""
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution

    values = {name: sorted({*space.varies[name], space.default[name]}) for name in space.default}
    sides: dict[str, BaseDistribution] = {name: IntDistribution(0, len(those) - 1) for name, those in values.items()}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A sampler of its own for each answer: a search that was cut short and goes on proposes what it would have.
            sampler = optuna.samplers.TPESampler(seed=seed + len(history), n_startup_trials=2, multivariate=True)
        study = optuna.create_study(sampler=sampler)
        for tile, seconds in history:
            params = {name: values[name].index(tile[name]) for name in values}
            found = 2 * slowest if seconds is None or not isfinite(seconds) else seconds
            study.add_trial(optuna.trial.create_trial(params=params, distributions=sides, value=found))
        for _ in range(ASKED):
            trial = study.ask(sides)
            tile = {name: values[name][trial.params[name]] for name in values}
            if choice_text(tile) not in seen:
                return tile
            study.tell(trial, 2 * slowest)
    finally:
        optuna.logging.set_verbosity(before)
    return None
