"""Choose what every attention head computes, phase by phase, under a budget or a quality goal."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.passes.attention_sites import why_none
from intarsia.passes.base import Pass
from intarsia.passes.sparse_attention import SparseAttention
from intarsia.search.head_errors import Price
from intarsia.search.head_exact import ExactStudy
from intarsia.search.head_greedy import GreedyStudy
from intarsia.search.head_settings import HeadSearch
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.quality import Goal
from intarsia.search.search import EFFORTS, SearchResult
from intarsia.search.trials import Deadline
from intarsia.search.workload import Workload


def search_heads(
    program: Program,
    target: Target,
    passes: Sequence[Pass],
    workload: Workload | None,
    goal: Goal | None,
    *,
    how: HeadSearch,
    effort: str = "default",
    seed: int = 0,
    journal: Journal | None = None,
    budget: float | None = None,
    notations: Sequence[str] | None = None,
    progress: Progress | None = None,
    price: Price | None = None,
) -> SearchResult:
    """The patterns of all heads that lose least within a budget, or that are cheapest within a goal.

    Args:
        program: The graph with its weights; on the meta device only with ``how.table``.
        passes: ``sparse-attention`` first; those behind it, such as ``fuse-heads``, run without a choice.
        workload: What errors and quality are measured on; None only with ``how.table``.
        goal: Kept on validation noise, by a budget's choice too where both are given; None where ``how`` says it all.
        price: Measured seconds of a call of attention; predicted ones otherwise.
        budget: Seconds after which the best plan so far is returned, marked as not complete.

    Raises:
        UsageError: Passes or goals that do not go together, or a budget below the cheapest patterns.
        Unsupported: No self-attention over video tokens.
        QualityError: The goal is missed with every head dense, or by what the budget leads to.
    """
    if not passes or not isinstance(passes[0], SparseAttention):
        raise UsageError("strategy heads: the first --pass is sparse-attention; others may follow it")
    if goal is None and not (how.bounded or how.epsilon):
        raise UsageError("strategy heads: give --quality, or a budget as heads(density=0.25) or heads(seconds=0.5)")
    if how.table and not how.bounded:
        raise UsageError(
            f"strategy heads: {how} says nothing of quality; add density or seconds, which errors can meet"
        )
    if effort not in EFFORTS:
        raise UsageError(f"effort {effort!r} is unknown. Known: {', '.join(EFFORTS)}")
    if program.is_meta and not how.table:
        raise UsageError(f"graph {program.graph.name}: a search measures, and the weights are on the meta device")
    reason = why_none(program.graph) if not passes[0].tokens else None
    if reason:
        raise Unsupported(f"strategy heads: {reason}")
    if not passes[0].choices(program.graph, target):
        place, why = next(iter(passes[0].refusals(program.graph, target).items()))
        raise Unsupported(f"strategy heads: {passes[0]} offers no head a pattern; the first, %{place}: {why}")
    told = Silent() if progress is None else progress
    kind = GreedyStudy if how.choose == "greedy" else ExactStudy
    study = kind(
        program,
        target,
        tuple(passes),
        workload,
        goal,
        how,
        effort,
        seed,
        Journal() if journal is None else journal,
        told,
        Deadline.after(budget),
        price,
    )
    return study.result(tuple(notations or map(str, passes)))
