"""Which tokens are computed at which step: notation, groups and turns, and the share that comes of them."""

from __future__ import annotations

from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as some

from intarsia.ir.allocation import REGROUPING, TURNS, VELOCITIES, Allocation
from intarsia.ir.errors import SpecError


@some.composite
def allocations(draw: some.DrawFn) -> Allocation:
    """Any allocation that is one."""
    groups = draw(some.integers(1, 4))
    parts = draw(some.lists(some.integers(1, 9), min_size=groups, max_size=groups))
    divisors = sorted(draw(some.lists(some.integers(1, 6), min_size=groups, max_size=groups)))
    return Allocation(
        warm_up=draw(some.integers(2, 5)),
        tail=draw(some.integers(0, 3)),
        shares=tuple(part / sum(parts) for part in parts),
        divisors=tuple(divisors),
        turns=draw(some.sampled_from(TURNS)),
        velocity=draw(some.sampled_from(VELOCITIES)),
        smooth=draw(some.booleans()),
        regroup=draw(some.sampled_from(REGROUPING)),
        dense=tuple(draw(some.sets(some.integers(0, 40), max_size=3))),
    )


@given(allocations())
def test_what_it_prints_reads_back(allocation: Allocation) -> None:
    assert Allocation.parse(str(allocation)) == allocation


@given(allocations(), some.permutations(range(37)))
def test_every_token_is_in_one_part_of_one_group(allocation: Allocation, order: list[int]) -> None:
    groups = allocation.groups(order)
    assert [len(parts) for parts in groups] == list(allocation.divisors)
    assert sorted(token for parts in groups for part in parts for token in part) == list(range(37))


@given(allocations(), some.permutations(range(37)))
def test_a_round_of_all_groups_computes_each_token_as_often_as_its_divisor_says(
    allocation: Allocation, order: list[int]
) -> None:
    groups, steps = allocation.groups(order), lcm(*allocation.divisors)
    computed = [token for step in range(steps) for token in allocation.active(groups, allocation.warm_up + step)]
    for parts, divisor in zip(groups, allocation.divisors, strict=True):
        for part in parts:
            assert all(computed.count(token) == steps // divisor for token in part)


@given(allocations())
def test_the_share_is_that_of_the_tokens_which_are_computed(allocation: Allocation) -> None:
    steps, tokens = 40, 2520
    groups = allocation.groups(range(tokens))
    counts = [
        tokens if allocation.is_dense(step, steps) else len(allocation.active(groups, step)) for step in range(steps)
    ]
    assert allocation.share(steps) == pytest.approx(sum(counts) / (steps * tokens), abs=0.01)


def test_the_tokens_that_change_most_are_the_first_group() -> None:
    allocation = Allocation(shares=(0.25, 0.75), divisors=(1, 2), turns="staggered")
    assert allocation.groups([7, 2, 5, 0, 1, 3, 4, 6]) == (((2, 7),), ((1, 4, 5), (0, 3, 6)))


def test_staggered_turns_keep_the_count_of_active_tokens() -> None:
    allocation = Allocation(warm_up=4, shares=(0.25, 0.75), divisors=(2, 4), turns="staggered")
    groups = allocation.groups(range(64))
    assert {len(allocation.active(groups, step)) for step in range(4, 40)} == {8 + 12}


def test_tokens_together_are_computed_at_the_last_step_of_a_round() -> None:
    allocation = Allocation(warm_up=2, tail=0, shares=(1.0,), divisors=(3,))
    groups = allocation.groups([1, 0])
    assert [allocation.active(groups, step) for step in range(2, 8)] == [(), (), (0, 1), (), (), (0, 1)]


def test_warm_up_tail_and_named_steps_compute_all_tokens() -> None:
    allocation = Allocation(warm_up=2, tail=1, shares=(1.0,), divisors=(4,), dense=(5,))
    assert [step for step in range(8) if allocation.is_dense(step, 8)] == [0, 1, 5, 7]


def test_groups_are_formed_once_behind_the_warm_up() -> None:
    allocation = Allocation(warm_up=3, shares=(0.5, 0.5), divisors=(2, 4))
    assert [step for step in range(40) if allocation.regroups(step, 40)] == [2]


def test_synchronized_groups_are_formed_again_where_all_rounds_end_at_a_step_of_all_tokens() -> None:
    allocation = Allocation(warm_up=3, shares=(0.5, 0.5), divisors=(2, 4), regroup="synchronized")
    again = [step for step in range(16) if allocation.regroups(step, 16)]
    assert again == [2, 6, 10, 14]
    assert all(allocation.is_dense(step, 16) for step in again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens(warm_up=4)", "expected 'allocation"),
        ("allocation(warm_up=1)", "warm_up is at least 2"),
        ("allocation(tail=-1)", "tail at least 0"),
        ("allocation(shares=(0.5, 0.5), divisors=(1,))", "shares are 2, divisors 1; give one for each"),
        ("allocation(shares=(0.5, 0.4), divisors=(1, 2))", "parts of all tokens and sum to 1"),
        ("allocation(shares=(-0.5, 1.5), divisors=(1, 2))", "parts of all tokens"),
        ("allocation(shares=(0.5, 0.5), divisors=(2, 1))", "1 or more and rise"),
        ("allocation(shares=(1.0,), divisors=(0,))", "1 or more and rise"),
        ("allocation(turns='random')", "turns is 'random'; it is together or staggered"),
        ("allocation(velocity='cubic')", "velocity is 'cubic'; it is held or linear"),
        ("allocation(regroup='always')", "regroup is 'always'; it is once or synchronized"),
        ("allocation(dense=(-1,))", "numbers of steps, from 0"),
        ("allocation(share=0.5)", "share"),
    ],
)
def test_says_which_setting_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Allocation.parse(text)
