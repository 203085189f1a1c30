"""Dimensions as expressions over named sizes."""

from __future__ import annotations

import pytest

from intarsia.ir.errors import InvalidGraph
from intarsia.ir.sizes import Size, evaluate, names, solve


@pytest.mark.parametrize(
    ("dim", "extent"),
    [
        (7, 7),
        ("N", 10),
        ("2*N + H", 23),
        ("(N//4)*(H - 1)", 4),
        ("-N + 12", 2),
        ("N**2", 100),
        ("N % 4", 2),
        ("mod(N, 4)", 2),
        ("max(1, N//20)", 1),
        ("min(N, H)", 3),
    ],
)
def test_a_dimension_is_arithmetic_over_named_sizes(dim: int | str, extent: int) -> None:
    assert evaluate(dim, {"N": 10, "H": 3}) == extent


def test_names_are_the_sizes_and_not_the_functions() -> None:
    assert names("max(1, frames*(height//2))") == {"frames", "height"}
    assert names(3) == frozenset()


def test_a_size_without_a_value_is_named_with_what_to_do() -> None:
    with pytest.raises(InvalidGraph, match=r"dimension '2\*N': size N has no value; give one, such as --size N=8"):
        evaluate("2*N", {})


@pytest.mark.parametrize("dim", ["2*", "N M", "", "((((", "\0", "(" * 500 + ")" * 500])
def test_what_is_no_expression_is_refused(dim: str) -> None:
    with pytest.raises(InvalidGraph, match="is not an expression over named sizes such as"):
        evaluate(dim, {"N": 1})


@pytest.mark.parametrize("dim", ["N/2", "f(N)", "N.real", "[N]", "'a'", "1.5", "N if N else 1", "max(N, key=1)"])
def test_only_integer_arithmetic_is_a_dimension(dim: str) -> None:
    with pytest.raises(InvalidGraph, match="over named sizes are dimensions"):
        evaluate(dim, {"N": 1})


def test_division_by_zero_is_told_with_the_sizes() -> None:
    with pytest.raises(InvalidGraph, match=r"dimension '8//N': divides by zero for sizes \{'N': 0\}"):
        evaluate("8//N", {"N": 0})


def test_a_size_prints_with_its_range() -> None:
    assert str(Size("N", 2, 64)) == "N in [2, 64]"
    assert str(Size("N")) == "N in [1, inf]"


def test_sizes_are_told_by_the_extents_of_dimensions() -> None:
    assert solve({"4*H": 32, "N": 2, "N*H + 1": 17, 3: 3}) == {"H": 8, "N": 2}


@pytest.mark.parametrize(
    ("extents", "said"),
    [
        ({"4*H": 30}, r"dimension '4\*H' is 30, which no size gives"),
        ({"N": 2, "2*N": 6}, r"dimension '2\*N' is 6, which no size gives beside \{'N': 2\}"),
        ({"N*H": 6}, "size N has no value"),
        ({4: 5}, "dimension 4 is 5"),
    ],
)
def test_extents_that_no_size_gives_are_refused(extents: dict[int | str, int], said: str) -> None:
    with pytest.raises(InvalidGraph, match=said):
        solve(extents)
