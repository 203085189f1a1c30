"""Choose what a denoising loop computes at which step, for a share of the time that all of it takes."""

from __future__ import annotations

from dataclasses import replace

from intarsia.ir.errors import QualityError, UsageError
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal
from intarsia.search.roofline import predict
from intarsia.search.search import SearchResult
from intarsia.search.step_study import Bench, StepSearch, Study
from intarsia.search.trials import Deadline, Spent
from intarsia.search.workload import Workload

__all__ = ["StepSearch", "search_steps"]


def search_steps(
    program: Program,
    target: Target,
    workload: Workload,
    bench: Bench,
    goal: Goal | None,
    *,
    how: StepSearch,
    settings: dict[str, object] | None = None,
    journal: Journal | None = None,
    budget: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The policy that is nearest to the dense loop's answers within a share of its time.

    Every policy of the space is run on calibration noise, the same for all; the best of each kind and the best of all
    go on to validation noise, where they are timed too, in turns with the dense loop. So the answer may be that whole
    steps do better than tokens. What a caching rule takes depends on the data: its threshold is the least that keeps
    the time on calibration noise, by the seconds of a step that is computed and of one that is not.

    Args:
        bench: Runs the loop's network; ``seconds`` says what calls take on the target.
        goal: Kept on validation noise; None for the best that there is.
        budget: Seconds for the search; what is best by then is the answer.

    Raises:
        UsageError: No policy is as quick as ``how.budget`` asks.
        QualityError: The best policy misses the goal.
    """
    study = Study(
        program,
        workload,
        bench,
        how,
        Journal() if journal is None else journal,
        progress or Silent(),
        Deadline.after(budget),
    )
    complete = True
    try:
        study.run()
    except Spent:
        complete = False
    finally:
        study.progress.finish()
    best = study.best()
    if best is None:
        raise UsageError(f"{program.graph.name}: --budget was spent before a policy was measured; give more")
    if goal is not None and best.quality is not None and not goal.met(best.quality):
        raise QualityError(
            f"{program.graph.name}: within {how.budget:.0%} of the dense loop's time the best policy, "
            f"{best.policy.notation}, reaches {goal.reached(best.quality)}; allow more time or less quality"
        )
    before = predict(program.graph, target)
    share = best.share if best.share is not None else best.predicted
    notes = {**(settings or {}), "strategy": str(how), "complete": complete, "steps": study.notes()}
    plan = Plan(program.graph.fingerprint, target.name, (Phase((Step(best.policy.notation),)),), notes)
    after = replace(before, seconds=before.seconds * share)
    return SearchResult(plan, after, before, best.quality, (), 1 - share, complete)
