"""Errors and costs of all options of all heads: the exact choice, the paper's, and tables that come from a file."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from intarsia.ir.errors import UsageError
from intarsia.search.head_table import ABSENT, HeadTable, by_loss, least_error, load_errors

PHASES = ((0, 0), (1, 3))


def table(errors, costs, *, phases=PHASES) -> HeadTable:
    """A table of heads ``h0``, ``h1``, ... with options ``o0``, ``o1``, ..."""
    errors, costs = np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    heads, options = costs.shape
    names = tuple(f"h{head}" for head in range(heads))
    return HeadTable(phases, names, (tuple(f"o{number}" for number in range(options)),) * heads, errors, costs)


def drawn(seed: int, *, heads: int = 3, options: int = 3, phases=PHASES) -> HeadTable:
    """Random errors and costs, dense first; some heads lack their last option, and some phases an option of a head."""
    generator = np.random.default_rng(seed)
    errors = generator.lognormal(size=(len(phases), heads, options))
    errors[:, :, 0] = 0
    costs = np.sort(generator.uniform(0.05, 1, size=(heads, options)), axis=1)[:, ::-1].copy()
    lacking = generator.random(heads) < 0.4
    errors[:, lacking, -1], costs[lacking, -1] = ABSENT, ABSENT
    errors[0, 0, 1] = ABSENT
    return table(errors, costs, phases=phases)


def best_of_all(known: HeadTable, budget: float) -> float:
    """The least sum of errors within the budget, by looking at every choice."""
    phases, heads, options = known.errors.shape
    lengths = [last - first + 1 for first, last in known.phases]
    least = np.inf
    for flat in product(range(options), repeat=phases * heads):
        error = cost = 0.0
        for number, option in enumerate(flat):
            phase, head = divmod(number, heads)
            error += known.errors[phase, head, option]
            cost += known.costs[head, option] * lengths[phase] / sum(lengths)
        if np.isfinite(error) and cost <= budget * (1 + 1e-9):
            least = min(least, error)
    return least


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_the_exact_choice_is_the_best_of_all_choices_that_keep_the_budget(seed: int, share: float) -> None:
    known = drawn(seed)
    present = np.where(np.isfinite(known.errors), known.costs, np.inf)
    cheapest = float(np.dot(present.min(axis=2).sum(axis=1), known.lengths) / known.lengths.sum())
    budget = cheapest + share * (known.dense - cheapest)
    choice, gap = known.exact(budget)
    assert gap == 0
    assert known.cost(choice) <= budget * (1 + 1e-6)
    assert known.error(choice) == pytest.approx(best_of_all(known, budget), rel=1e-6, abs=1e-9)


def test_a_phase_weighs_as_many_steps_as_it_has() -> None:
    known = table([[[0, 1]], [[0, 2]]], [[1, 0]])
    assert known.cost(np.array([[1], [0]])) == 0.75
    assert known.cost(np.array([[0], [1]])) == 0.25
    assert known.exact(0.25)[0].tolist() == [[0], [1]]
    assert known.exact(0.75)[0].tolist() == [[1], [0]]


def test_of_five_thousand_rows_the_priced_choice_keeps_the_budget_and_is_within_a_tiny_share_of_the_best() -> None:
    phases = tuple((step, step) for step in range(10))
    known = drawn(1, heads=500, options=6, phases=phases)
    budget = 0.4 * known.dense
    choice, gap = known.exact(budget)
    assert 0 <= gap < 1e-3
    assert known.cost(choice) <= budget * (1 + 1e-9)
    assert known.cost(choice) > 0.99 * budget
    assert np.isfinite(known.error(choice))


def test_the_bound_of_the_priced_choice_holds_against_the_integer_program(monkeypatch: pytest.MonkeyPatch) -> None:
    known = drawn(2, heads=60, options=5, phases=((0, 4),))
    errors, costs = known.errors[0], known.costs
    budget = 0.3 * known.dense
    exact, _ = least_error(errors, costs, budget)
    monkeypatch.setattr("intarsia.search.head_table.EXACT", 0)
    priced, gap = least_error(errors, costs, budget)
    rows = np.arange(60)
    best, reached = errors[rows, exact].sum(), errors[rows, priced].sum()
    assert costs[rows, priced].sum() <= budget * (1 + 1e-9)
    assert best <= reached * (1 + 1e-9)
    assert reached - best <= gap * reached + 1e-9


def test_a_budget_of_all_dense_heads_leaves_them_dense_and_the_least_budget_takes_the_cheapest() -> None:
    known = drawn(3, heads=800)
    assert known.exact(known.dense)[0].max() == 0
    present = np.where(np.isfinite(known.errors), known.costs, np.inf)
    least = float(np.dot(present.min(axis=2).sum(axis=1), known.lengths) / known.lengths.sum())
    choice, _ = known.exact(least)
    assert known.cost(choice) == pytest.approx(least)


def test_a_budget_below_the_cheapest_patterns_is_told_with_what_they_cost() -> None:
    known = table([[[0, 1], [0, 1]]], [[0.5, 0.2], [0.5, 0.1]], phases=((0, 0),))
    with pytest.raises(UsageError) as caught:
        known.exact(0.29)
    assert str(caught.value) == (
        "attention at a budget of 0.29: the cheapest patterns of all heads cost 0.3 of 1; "
        "offer cheaper patterns or raise the budget"
    )


def test_greedy_is_the_papers_equations_two_and_three() -> None:
    """Lambda 0.5, epsilon 1; options dense, skip, and one that computes a fourth."""
    costs = [[1.0, 0.0, 0.25]] * 5
    errors = [
        [0, 0.9, 0.7],  # losses 0.9 and 0.825: the second
        [0, 0.6, 0.55],  # 0.6 and 0.675: skip, though its error is larger
        [0, 1.1, 0.9],  # 1.1 and 1.025: both above epsilon, dense
        [0, 1.0, 2.0],  # 1.0 is not above epsilon: skip
        [0, 3.0, 0.8],  # 0.925: one of two is enough
    ]
    known = table([errors], costs, phases=((0, 0),))
    assert known.greedy(1.0, weight=0.5).tolist() == [[2, 1, 0, 1, 2]]
    assert known.greedy(1.0, weight=0.0).tolist() == [[2, 2, 2, 1, 2]]
    assert known.greedy(0.5, weight=0.5).tolist() == [[0, 0, 0, 0, 0]]


def test_costs_count_as_shares_of_the_dense_cost_in_the_papers_loss() -> None:
    known = table([[[0, 0.3, 0.2]]], [[4.0, 0.0, 2.0]], phases=((0, 0),))
    assert known.greedy(1.0, weight=0.1).tolist() == [[2]]
    assert known.greedy(1.0, weight=0.5).tolist() == [[1]]


def test_an_absent_option_is_never_of_least_loss() -> None:
    assert by_loss(np.array([[0.0, ABSENT, 5.0], [0.0, 2.0, ABSENT]]), 10).tolist() == [2, 1]
    assert by_loss(np.array([[0.0, ABSENT, ABSENT]]), 10).tolist() == [0]


def test_weights_multiply_the_errors_of_their_phase() -> None:
    known = table([[[0, 1]], [[0, 1]]], [[1, 0]], phases=((0, 1), (2, 3))).weighted(np.array([3.0, 0.5]))
    assert known.errors[:, 0, 1].tolist() == [3.0, 0.5]
    assert known.exact(0.5)[0].tolist() == [[0], [1]]


def written(path: Path, **arrays: np.ndarray) -> Path:
    save_file(arrays, path)
    return path


def test_errors_read_back_in_double_precision(tmp_path: Path) -> None:
    errors = np.array([[[0, 0.5, np.inf]]], dtype=np.float32)
    found = load_errors(written(tmp_path / "t.safetensors", errors=errors), steps=1, heads=1, options=3)
    assert found.dtype == np.float64
    assert found.tolist() == [[[0, 0.5, np.inf]]]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ({"errors": np.zeros((2, 3), np.float32)}, r"holds errors \(2, 3\); this model has 4 steps, 3 heads and 2"),
        ({"errors": np.zeros((4, 2, 3), np.float32)}, r"holds errors \(4, 2, 3\).*must be of that shape"),
        ({"other": np.zeros((4, 3, 2), np.float32)}, "holds no 'errors'"),
        ({"errors": np.full((4, 3, 2), np.nan, np.float32)}, "must be numbers of at least 0"),
        ({"errors": np.full((4, 3, 2), -1.0, np.float32)}, "give infinity for an absent option"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path: Path, array: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        load_errors(written(tmp_path / "t.safetensors", **array), steps=4, heads=3, options=2)
    assert "\n" not in str(caught.value)
    assert "t.safetensors" in str(caught.value)


def test_a_file_that_is_missing_or_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("absent.safetensors", "text.safetensors", ""):
        with pytest.raises(UsageError, match="cannot be read as safetensors") as caught:
            load_errors(tmp_path / name, steps=1, heads=1, options=1)
        assert "\n" not in str(caught.value)
