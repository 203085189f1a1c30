"""The policies that a search of steps weighs: what they take, and which thresholds caching rules get."""

from __future__ import annotations

import pytest

from intarsia.ir.allocation import Allocation
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.base import find_pass
from intarsia.passes.step_caching import FirstBlockCache, TeaCache
from intarsia.search.step_space import (
    TOKENS,
    WHOLE,
    Allocated,
    Cached,
    CachedSeconds,
    loop_seconds,
    quickest,
    rules,
    space,
    thresholds,
)

STEPS = 24


def seconds(caches: str, share: float) -> float:
    """A tenth of a call goes to what every call costs; caches that move on cost a tenth more."""
    return (0.1 + 0.9 * share) * (1.1 if caches == "linear" else 1.0) if share else 0.0


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
def test_every_policy_keeps_the_limit_and_takes_most_of_what_its_kind_can(budget: float) -> None:
    limit = budget * STEPS
    found = space(STEPS, limit, seconds)
    taken = {policy: loop_seconds(policy, STEPS, seconds) for policy in found}
    assert {policy.kind for policy in found} == {WHOLE, TOKENS}
    assert max(taken.values()) <= limit
    for kind in (WHOLE, TOKENS):
        times = [taken[policy] for policy in found if policy.kind == kind]
        assert min(times) >= 0.8 * max(times)
    assert len({(policy.allocation, policy.caches) for policy in found}) == len(found)


def test_groups_are_as_large_as_the_time_allows() -> None:
    limit = 0.5 * STEPS
    groups = [policy for policy in space(STEPS, limit, seconds) if policy.kind == TOKENS]
    assert max(loop_seconds(policy, STEPS, seconds) for policy in groups) > 0.98 * limit


def test_what_the_paper_has_holds_velocities_and_caches() -> None:
    found = space(STEPS, 0.5 * STEPS, seconds, held=True)
    assert {(policy.allocation.velocity, policy.caches) for policy in found} == {("held", "held"), ("held", "none")}


def test_no_policy_is_quicker_than_one_whole_step() -> None:
    assert quickest(STEPS, seconds) == seconds("held", 1.0)
    assert space(STEPS, 0.9, seconds) == []


def test_policies_are_written_as_the_passes_that_compute_so() -> None:
    tokens = Allocated(Allocation(3, 1, (0.4, 0.6), (2, 4)), "linear")
    assert tokens.kind == TOKENS
    assert find_pass(tokens.notation) == ActiveTokens("linear", allocation=str(tokens.allocation))
    cached = Cached(TeaCache(0.2, tail=2))
    assert cached.kind == "teacache"
    assert find_pass(cached.notation) == cached.rule


def test_rules_leave_time_for_their_first_and_last_steps() -> None:
    costs = CachedSeconds(1.0, 0.1)
    assert costs.loop(STEPS, 0.25) == pytest.approx(6 * 1.0 + 18 * 0.1)
    assert [(rule.warm_up, rule.tail) for rule in rules(STEPS, 12.0, costs, TeaCache)] == [(1, 1), (3, 1), (1, 3)]
    assert [(rule.warm_up, rule.tail) for rule in rules(STEPS, 4.9, costs, FirstBlockCache)] == [(1, 1)]
    assert list(rules(STEPS, 4.1, costs, FirstBlockCache)) == []


@pytest.mark.parametrize("first", [1e-3, 0.1, 7.0])
def test_bisection_finds_nearly_the_least_threshold_that_keeps_the_limit(first: float) -> None:
    tried: list[float] = []

    def taken(value: float) -> float:
        tried.append(value)
        return 10.0 / (1 + value)  # 5 at a threshold of 1

    least, *others = thresholds(taken, 5.0, first=first, tries=12)
    assert 1.0 <= least <= 1.07
    assert all(taken(value) >= 0.8 * taken(least) for value in others)
    assert {least, *others} <= {*tried}
    assert len({*tried}) <= 12


def test_a_limit_that_no_threshold_keeps_gives_none() -> None:
    assert thresholds(lambda _: 10.0, 5.0, first=0.1) == ()


def test_a_limit_that_every_threshold_keeps_gives_those_that_were_tried() -> None:
    assert thresholds(lambda _: 1.0, 5.0, first=0.1, tries=3) == (0.00625, 0.025, 0.1)


def test_a_policy_is_read_back_from_its_pass() -> None:
    for policy in space(STEPS, 0.5 * STEPS, seconds):
        made = find_pass(policy.notation)
        assert isinstance(made, ActiveTokens)
        assert Allocated.of(made) == policy
