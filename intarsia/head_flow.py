"""From a model and its loop to a plan that says what every attention head computes, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from intarsia import subject as subjects
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.search.head_settings import HeadSearch
from intarsia.search.heads import search_heads
from intarsia.search.journal import open_journal
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal
from intarsia.search.search import SearchResult
from intarsia.subject import Subject
from intarsia.timing import measured_seconds


def searched_heads(
    subject: Subject,
    target: Target,
    passes: Sequence[Pass],
    goal: Goal | None,
    *,
    how: HeadSearch,
    effort: str,
    seed: int,
    fresh: bool,
    budget: float | None,
    notations: Sequence[str],
    progress: Progress,
) -> SearchResult:
    """The search over heads, which needs no calibration calls of its own where the model has a loop."""
    work = None
    if not how.table:
        work = subjects.workload(subject, seed=seed, effort=effort, progress=progress, record=False)
        if work.loop is None:
            work = subjects.workload(subject, seed=seed, effort=effort, progress=progress)
    elif subject.model and subject.model.sampler and not how.steps:
        how = replace(how, steps=subject.model.sampler.steps)
    return search_heads(
        subject.program,
        target,
        passes,
        work,
        goal,
        how=how,
        effort=effort,
        seed=seed,
        journal=open_journal(subject.program, work, fresh=fresh) if work else None,
        budget=budget,
        notations=notations,
        progress=progress,
        price=measured_seconds(target) if how.costs == "measured" else None,
    )
