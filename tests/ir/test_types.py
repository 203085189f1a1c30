"""Types: how they read, how many bytes they take, and what is no type."""

from __future__ import annotations

import pytest

from intarsia.ir.errors import ParseError
from intarsia.ir.types import ScalarType, TensorType, parse_type


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("f32[]", ()),
        ("f32[ ]", ()),
        ("f32[2, N, 64]", (2, "N", 64)),
        ("f32[2,N]", (2, "N")),
        ("f32[(N//2)*(M//2), 3]", ("(N//2)*(M//2)", 3)),
        ("f32[max(1, (N + 1)//2), 3]", ("max(1, (N + 1)//2)", 3)),
        ("f32[max(1, min(N, 2)), mod(N, 2)]", ("max(1, min(N, 2))", "mod(N, 2)")),
    ],
)
def test_commas_inside_parentheses_do_not_part_extents(text: str, shape: tuple[int | str, ...]) -> None:
    assert parse_type(text) == TensorType("f32", shape)


@pytest.mark.parametrize("kind", ["int", "float", "bool"])
def test_a_number_has_a_type_of_its_own(kind: str) -> None:
    assert parse_type(kind) == ScalarType(kind)
    assert str(ScalarType(kind)) == kind


def test_elements_and_bytes_follow_the_sizes() -> None:
    video = TensorType("bf16", (2, "N", "4*H"))
    assert video.elements({"N": 3, "H": 5}) == 120
    assert video.bytes({"N": 3, "H": 5}) == 240
    assert TensorType("b1", (7,)).bytes() == 7
    assert TensorType("c64", (7,)).bytes() == 56


@pytest.mark.parametrize("text", ["f33[2]", "f32", "f32[2", "f32[2,,3]", "f32[2,]", "tensor", ""])
def test_what_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match="expected"):
        parse_type(text)
