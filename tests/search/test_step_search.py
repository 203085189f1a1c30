"""The search over steps, on a network that is a clock: what it takes is told, and how far off each policy is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.cached import Watch
from intarsia.ir.errors import QualityError, Unsupported, UsageError
from intarsia.ir.program import Program
from intarsia.ir.target import load_target
from intarsia.passes.base import find_pass
from intarsia.passes.step_caching import FirstBlockCache, StepCaching, TeaCache
from intarsia.search import step_study
from intarsia.search.journal import Journal
from intarsia.search.quality import Goal
from intarsia.search.search import SearchResult
from intarsia.search.step_search import StepSearch, search_steps
from intarsia.search.step_space import TOKENS, WHOLE, Allocated, Cached, CachedSeconds, Policy
from intarsia.search.workload import Workload

STEPS = 12
COSTS = CachedSeconds(1.0, 0.1)
ALL = {TOKENS, WHOLE, TeaCache.name, FirstBlockCache.name}


@dataclass
class Clockwork:
    """Answers that are off by what a policy's kind is off by; calls take the seconds that are told of them."""

    errors: dict[str, float]
    slower: float = 1.0
    clock: float = 0.0
    asked: list[Policy] = field(default_factory=list[Policy])
    refused: str = ""
    steps: int = STEPS

    def dense_seconds(self) -> float:
        return 1.0

    def seconds(self, caches: str, share: float) -> float:
        return 0.1 + 0.9 * share if share else 0.0

    def cached_seconds(self, kind: type[StepCaching]) -> CachedSeconds:
        if self.refused:
            raise Unsupported(self.refused)
        return COSTS

    def dense(self) -> Callable[..., tuple[Tensor, ...]]:
        return lambda step, sample: self._answer(sample, 0.0, 1.0)

    def allocated(self, policy: Allocated) -> Callable[..., tuple[Tensor, ...]]:
        self.asked.append(policy)
        shares = policy.allocation.shares_by_step(STEPS)

        def run(step: int, sample: Tensor) -> tuple[Tensor, ...]:
            return self._answer(sample, self.errors[policy.kind], self.slower * self.seconds("held", shares[step]))

        return run

    def cached(self, rule: StepCaching) -> Any:
        self.asked.append(Cached(rule))
        return Rule(self, rule)

    def coefficients(self, workload: Workload) -> tuple[float, ...]:
        return (2.0, 0.0)

    def _answer(self, sample: Tensor, error: float, seconds: float) -> tuple[Tensor, ...]:
        self.clock += seconds
        return (sample + error,)


@dataclass
class Rule:
    """A loop whose signal grows by a tenth each step."""

    bench: Clockwork
    rule: StepCaching
    loops: list[list[bool]] = field(default_factory=list[list[bool]])

    def __call__(self, step: Any, sample: Any) -> tuple[Tensor, ...]:
        if step == 0:
            self.watch = Watch(self.rule, STEPS)
            self.loops.append(self.watch.computed)
        computed = self.watch.computes(torch.tensor(1.1**step))
        return self.bench._answer(
            sample, self.bench.errors[self.rule.name], COSTS.computed if computed else COSTS.skipped
        )


def loops(run: Any, split: str, progress: object) -> Tensor:
    """Three samples, the answer of the last step of each."""
    samples = torch.linspace(0, 1, 3 * 16).reshape(3, 16)
    return torch.stack([[run(step, sample)[0] for step in range(STEPS)][-1] for sample in samples])


WORKLOAD = Workload((), loops, {"kind": "clockwork"})


@pytest.fixture
def search(program: Program, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SearchResult]:
    def run(bench: Clockwork, *, goal: str | None = None, journal: Journal | None = None, **how: Any) -> SearchResult:
        monkeypatch.setattr(step_study, "time", SimpleNamespace(perf_counter=lambda: bench.clock))
        asked = Goal.parse(goal) if goal else None
        target = load_target("cpu-avx2")
        return search_steps(program, target, WORKLOAD, bench, asked, how=StepSearch(**how), journal=journal)

    return run


def even(best: str) -> dict[str, float]:
    return dict.fromkeys(ALL, 0.1) | {best: 0.01}


def facts(result: SearchResult) -> dict[str, Any]:
    steps = result.plan.notes["steps"]
    assert isinstance(steps, dict)
    return steps


def chosen(result: SearchResult) -> str:
    ((step,),) = (phase.steps for phase in result.plan.phases)
    return step.run


@pytest.mark.parametrize("best", sorted(ALL))
@pytest.mark.parametrize("budget", [0.35, 0.6])
def test_the_best_kind_is_chosen_and_keeps_the_budget(best: str, budget: float, search: Any) -> None:
    result = search(Clockwork(even(best)), budget=budget)
    (found,) = (one for one in facts(result)["finalists"] if one["policy"] == chosen(result))
    assert found["kind"] == best
    assert 0.7 * budget <= found["share"] <= budget * 1.02
    assert str(find_pass(chosen(result))) == chosen(result)


def test_finalists_hold_the_best_of_each_kind(search: Any) -> None:
    result = search(Clockwork(even(WHOLE)), budget=0.5, finalists=1)
    kinds = [one["kind"] for one in facts(result)["finalists"]]
    assert sorted(kinds) == sorted(ALL)
    assert all("share" in one and "validation_psnr" in one for one in facts(result)["finalists"])


def test_thresholds_leave_no_time_unused(search: Any) -> None:
    tried = facts(search(Clockwork(even(TOKENS)), budget=0.5))["tried"]
    rules = [one for one in tried if one["kind"] in (TeaCache.name, FirstBlockCache.name)]
    assert {(find_pass(one["policy"]).warm_up, find_pass(one["policy"]).tail) for one in rules} == {
        (1, 1),
        (3, 1),
        (1, 3),
    }
    assert all(0.4 <= one["predicted"] <= 0.5 for one in rules)
    assert {find_pass(one["policy"]).coefficients for one in rules if one["kind"] == "teacache"} == {(), (2.0, 0.0)}


def test_what_the_paper_has_is_looked_at_without_caching_rules(search: Any) -> None:
    tried = facts(search(Clockwork(even(TOKENS)), budget=0.5, held=True))["tried"]
    assert {one["kind"] for one in tried} == {TOKENS, WHOLE}


def test_a_network_that_cannot_be_cut_is_searched_for_the_rest(search: Any) -> None:
    result = search(Clockwork(even(WHOLE), refused="no residual stream"), budget=0.5)
    assert facts(result)["refused"] == {"teacache": "no residual stream", "first-block-cache": "no residual stream"}
    assert {one["kind"] for one in facts(result)["tried"]} == {TOKENS, WHOLE}


def test_a_search_that_goes_on_measures_nothing_again_on_calibration_noise(search: Any, tmp_path: Path) -> None:
    first, again = (Clockwork(even(TOKENS)) for _ in range(2))
    one = search(first, budget=0.5, journal=Journal(tmp_path / "journal"))
    other = search(again, budget=0.5, journal=Journal(tmp_path / "journal"))
    assert one.plan == other.plan
    assert len(again.asked) == len(facts(other)["finalists"]) < len(first.asked)


def test_no_policy_within_the_budget_is_told_in_one_line(search: Any) -> None:
    reason = (
        "three: no policy takes 5.0% of the dense loop's time; the quickest, one step of 12, takes 8.3%: give a larger "
        "budget"
    )
    with pytest.raises(UsageError, match=f"^{reason}$"):
        search(Clockwork(even(TOKENS)), budget=0.05)


def test_a_goal_that_is_missed_is_told_with_what_was_reached(search: Any) -> None:
    with pytest.raises(QualityError, match="within 50% of the dense loop's time the best policy, active-tokens"):
        search(Clockwork(even(TOKENS)), goal="psnr>=60", budget=0.5)
    assert search(Clockwork(even(TOKENS)), goal="psnr>=30", budget=0.5).quality is not None


def test_where_no_finalist_keeps_the_budget_the_quickest_is_the_answer(search: Any) -> None:
    result = search(Clockwork(even(TOKENS), slower=1.5), budget=0.5)
    shares = {one["policy"]: one["share"] for one in facts(result)["finalists"]}
    kept = {policy for policy, share in shares.items() if share <= 0.51}
    assert chosen(result) in kept
    assert facts(result)["finalists"][0]["policy"] not in kept  # nearer to the dense loop, and too slow
