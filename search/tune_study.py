"""Tune one kernel at one shape: propose, compile, check, time, and keep what came of every candidate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import isfinite
from typing import Any

from intarsia.ir.target import Target
from intarsia.kernels.records import MEASURED, RANKED, Database, Record, choice_text
from intarsia.kernels.tiling import Space, Tile
from intarsia.search.progress import Progress
from intarsia.search.tune_laboratory import Laboratory
from intarsia.search.tune_problem import Site
from intarsia.search.tune_propose import proposed
from intarsia.search.tune_rank import predicted, ranked
from intarsia.search.tune_worker import TaskFailed


@dataclass(frozen=True)
class Effort:
    """How much is tried at each site.

    Attributes:
        candidates: Candidates at most, refused ones and those of earlier runs included.
        ranked: With a clock, how many come from the ranking before the model is asked.
        fitting: Without a clock, after how many that fit the ranking says nothing better can come.
    """

    candidates: int
    ranked: int
    fitting: int


EFFORTS = {"quick": Effort(8, 4, 1), "default": Effort(32, 10, 3), "full": Effort(128, 24, 8)}


@dataclass(frozen=True)
class Tuned:
    """What came of one site.

    Attributes:
        best: The best candidate that was not refused; None where all were.
        default: What is known of the default tile; None if the time ran out before.
        tried: Candidates in this run, or taken from an earlier one.
        measured: How many of them this run looked at.
        refused: How many of them do not fit, or are wrong.
        complete: Whether all candidates were looked at that the effort asks for.
    """

    site: Site
    best: Record | None
    default: Record | None
    tried: int
    measured: int
    refused: int
    complete: bool


def tune(
    site: Site,
    target: Target,
    database: Database,
    laboratory: Laboratory,
    *,
    effort: Effort,
    seed: int = 0,
    deadline: float = float("inf"),
    progress: Progress,
) -> Tuned:
    """The best tile for the site, by a clock if the laboratory has one; each candidate is kept when it is done.

    Candidates that the database knows are not looked at again, and the sequence of candidates follows from the seed
    and what became of them: a run that was cut short goes on, and ends as it would have.

    Args:
        deadline: By ``time.monotonic``; no candidate begins after it.
    """
    how = MEASURED if laboratory.clock else RANKED
    known = {choice_text(record.choice): record for record in database.records(site.key) if record.how == how}
    space, ranking = site.problem.space(target.architecture), ranked(site.problem, target)
    done: list[Record] = []
    looked, complete = 0, True
    while (tile := _next(done, space, ranking, laboratory, effort, seed)) is not None:
        record = known.get(choice_text(tile))
        if record is None and time.monotonic() >= deadline:
            complete = False
            break
        if record is None:
            record = _looked_at(tile, site, target, space, laboratory, base=done[0] if done else None)
            database.add(record)
            looked += 1
        done.append(record)
        progress.advance(note=_note(done))
    good = sorted((record for record in done if not record.refused), key=lambda record: record.order)
    best, default = (good[0] if good else None), (done[0] if done else None)
    return Tuned(site, best, default, len(done), looked, len(done) - len(good), complete)


def _next(  # noqa: PLR0917
    done: list[Record],
    space: Space,
    ranking: list[dict[str, int]],
    laboratory: Laboratory,
    effort: Effort,
    seed: int,
) -> Tile | None:
    """The candidate after those that are done; None when they are enough."""
    if _enough(done, laboratory, effort):
        return None
    history = [(record.choice, None if record.refused else record.seconds) for record in done]
    first = effort.ranked if laboratory.clock else effort.candidates
    return proposed(space, history, ranking, first=first, seed=seed)


def _enough(done: list[Record], laboratory: Laboratory, effort: Effort) -> bool:
    if len(done) >= effort.candidates:
        return True
    fitting = sum(not record.refused for record in done[1:])
    return laboratory.clock is None and fitting >= effort.fitting


def _looked_at(
    tile: Tile, site: Site, target: Target, space: Space, laboratory: Laboratory, *, base: Record | None
) -> Record:
    """Compiled, then compared with the reference, then timed, as far as it gets."""
    facts: dict[str, Any] = {"shape": dict(site.problem.shape), "default": tile == space.default}
    if laboratory.clock:
        facts["device"] = laboratory.clock
    how = MEASURED if laboratory.clock else RANKED
    for judged in (laboratory.compiled, laboratory.error):
        found = judged(site.problem, tile)
        reason = str(found.pop("refused", ""))
        facts |= {name: value for name, value in found.items() if not isinstance(value, float) or isfinite(value)}
        if reason:
            return Record(site.key, dict(tile), how, None, reason, facts)
    if not laboratory.clock:
        return Record(site.key, dict(tile), how, predicted(site.problem, tile, target), "", facts)
    try:
        seconds = _timed(tile, site, space, laboratory, base)
    except TaskFailed as failure:
        return Record(site.key, dict(tile), how, None, f"does not run: {failure}", facts)
    return Record(site.key, dict(tile), how, seconds, "", facts)


def _timed(tile: Tile, site: Site, space: Space, laboratory: Laboratory, base: Record | None) -> float:
    """Seconds; beside the default, timed in turn with it, so that a device that slows down changes no order."""
    if base is None or base.seconds is None:
        return laboratory.seconds(site.problem, (tile,))[0]
    default, mine = laboratory.seconds(site.problem, (space.default, tile))
    return base.seconds * mine / default


def _note(done: list[Record]) -> str:
    good = [record for record in done if record.seconds is not None and not record.refused]
    if not good or done[0].seconds is None:
        return ""
    best = min(record.seconds for record in good if record.seconds is not None)
    return f"best {done[0].seconds / best:.2f}x the default, {good[0].how}"
