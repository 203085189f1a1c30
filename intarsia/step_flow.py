"""From a model and its loop to a plan that says which tokens are computed at which step."""

from __future__ import annotations

from intarsia import subject as subjects
from intarsia.ir.target import Target
from intarsia.search.journal import open_journal
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal
from intarsia.search.search import SearchResult
from intarsia.search.step_search import StepSearch, search_steps
from intarsia.step_bench import StepBench


def searched_steps(
    subject: subjects.Subject,
    target: Target,
    goal: Goal | None,
    *,
    how: StepSearch,
    effort: str,
    seed: int,
    fresh: bool,
    budget: float | None,
    progress: Progress,
) -> SearchResult:
    """The plan of ``search.step_search`` for a model with a loop, its policies run by this machine.

    Raises:
        UsageError: The model has no sampler, or no policy is as quick as asked.
        Unsupported: Something in the model mixes tokens between its blocks.
        QualityError: The best policy misses the goal.
    """
    bench = StepBench(subject, target)
    work = subjects.workload(subject, seed=seed, effort=effort, progress=progress, record=False)
    return search_steps(
        subject.program,
        target,
        work,
        bench,
        goal,
        how=how,
        settings={"goal": str(goal) if goal else None, "effort": effort, "seed": seed},
        journal=open_journal(subject.program, work, fresh=fresh),
        budget=budget,
        progress=progress,
    )
