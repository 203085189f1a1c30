"""``name(key=value)``: the notation of passes, options and targets."""

from __future__ import annotations

from dataclasses import dataclass
from keyword import iskeyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.ir.errors import SpecError
from intarsia.ir.spec import Spec, construct, spec_of


@dataclass(frozen=True)
class Quantize:
    group: int
    min_rows: int = 64
    scale: float = 1.0
    exact: bool = False
    only: str = ""
    skip: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.group % 2:
            raise ValueError("group must be even")


@pytest.mark.parametrize(
    "text", ["keep", "i4(group=32)", "quantize-linear(min_rows=64, only='blocks.*')", "a.b(x=(1, 2), y=None, z=-1.5)"]
)
def test_the_notation_reads_and_prints_back(text: str) -> None:
    assert str(Spec.parse(text)) == text


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
keys = st.from_regex(r"\A[a-z_][a-z0-9_]{0,6}\Z").filter(lambda key: not iskeyword(key))


@given(st.dictionaries(keys, literals, max_size=4))
def test_any_literal_argument_reads_back_exactly(args: dict[str, object]) -> None:
    spec = Spec("name", args)  # type: ignore[arg-type]
    assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        *("", "(a=1)", "two words"),
        *("i4(32)", "i4(group=32", "i4(group=32))", "i4(group=x)", "i4(**a)", "i4(a=1, a=2)"),
        *("i4(a=1)(b=2)", "i4(a=1).b(c=2)", "i4() + 1", "i4(a=open('x'))", "i4(a=\0)"),
    ],
)
def test_anything_else_is_refused_with_the_form_that_is_expected(text: str) -> None:
    with pytest.raises(SpecError, match=r"expected 'name\(key=value, \.\.\.\)'"):
        Spec.parse(text)


def test_a_dataclass_is_made_from_its_notation_and_prints_what_differs_from_its_defaults() -> None:
    made = construct(Quantize, Spec.parse("quantize(group=32, only='blocks.*', scale=2)"))
    assert made == Quantize(group=32, only="blocks.*", scale=2)
    assert str(spec_of("quantize", made)) == "quantize(group=32, scale=2, only='blocks.*')"
    assert construct(Quantize, spec_of("quantize", made)) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize(group=32, rows=2)", "quantize: unknown key 'rows'; it takes group, min_rows, scale"),
        ("quantize", "quantize: group must be given"),
        ("quantize(group=32, min_rows='a')", "quantize: min_rows takes a int, found 'a'"),
        ("quantize(group=32, min_rows=True)", "quantize: min_rows takes a int, found True"),
        ("quantize(group=32, exact=1)", "quantize: exact takes a bool, found 1"),
        ("quantize(group=33)", "quantize(group=33): group must be even"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        construct(Quantize, Spec.parse(text))
    assert str(caught.value).startswith(message)
