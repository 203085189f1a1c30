"""The solver is compared with trying every selection."""

from __future__ import annotations

from itertools import product
from math import fsum, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.search.solve import Option, solve

KEEP = Option(0.0, 0.0)


def total(places, selection, field):
    return fsum(getattr(options[n], field) for options, n in zip(places, selection, strict=True))


def brute_force(places, budget):
    allowed = (s for s in product(*(range(len(p)) for p in places)) if total(places, s, "error") <= budget)
    return min(allowed, key=lambda s: (total(places, s, "cost"), total(places, s, "error")))


options = st.builds(Option, st.integers(-50, 20).map(float), st.integers(0, 60).map(float))
tables = st.lists(st.lists(options, max_size=3).map(lambda rest: (KEEP, *rest)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(tables, st.integers(0, 200).map(float))
def test_is_as_cheap_as_the_best_of_all_selections_and_has_the_least_error_of_those(places, budget):
    found, best = solve(places, budget), brute_force(places, budget)
    assert total(places, found, "error") <= budget
    assert total(places, found, "cost") == total(places, best, "cost")
    assert total(places, found, "error") == total(places, best, "error")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-8, 1e-1), st.floats(1e-6, 1e-2)), min_size=2, max_size=8),
    st.floats(1e-7, 0.5),
)
def test_holds_for_errors_over_seven_decades(pairs, budget):
    places = [(KEEP, Option(-cost, error), Option(-1.5 * cost, 7 * error)) for error, cost in pairs]
    found, best = solve(places, budget), brute_force(places, budget * (1 - 5e-6))
    assert total(places, found, "error") <= budget
    assert total(places, found, "cost") <= total(places, best, "cost") * (1 - 1e-4) + 1e-12


def test_a_selection_over_the_budget_by_less_than_the_solvers_tolerance_hides_no_better_one():
    places = [(KEEP, Option(-4, 0.0625), Option(-6, 0.4375)), (KEEP, Option(-2, 1e-8), Option(-3, 7e-8))]
    assert solve(places, 0.0625) == (1, 0)


def test_takes_everything_when_the_budget_is_endless_and_nothing_when_there_is_none():
    places = [(KEEP, Option(-1, 5), Option(-2, 9)), (KEEP, Option(-3, 1))]
    assert solve(places, inf) == (2, 1)
    assert solve(places, 0.0) == (0, 0)


def test_prefers_to_keep_when_an_option_saves_nothing():
    assert solve([(KEEP, Option(0.0, 0.1)), (KEEP, Option(0.5, 0.0))], 10.0) == (0, 0)


def test_places_that_offer_the_same_take_the_earlier_options_first():
    same = (KEEP, Option(-1, 1))
    assert solve([same] * 5, 2.0) == (0, 0, 0, 1, 1)


def test_hundreds_of_places_give_the_same_selection_every_time():
    places = [
        (KEEP, Option(-1 - n % 7, 1e-5 * (1 + n % 11)), Option(-2 - n % 7, 6e-5 * (1 + n % 5))) for n in range(300)
    ]
    assert solve(places, 5e-3) == solve(places, 5e-3)


def test_refuses_a_place_without_an_option_within_the_budget():
    with pytest.raises(ValueError, match="first option must have no error"):
        solve([(Option(1, 1),)], 0.5)
