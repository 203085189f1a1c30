from __future__ import annotations

import math

import pytest
import torch

from intarsia.backends import agreement
from intarsia.ir.graph import Graph

INF, NAN = math.inf, math.nan


def error(found: list[float], expected: list[float]) -> float:
    return agreement.error([torch.tensor(found)], [torch.tensor(expected)])


def test_error_is_relative_to_the_size_of_the_expected_answer() -> None:
    assert error([1000.0, 1001.0], [1000.0, 1000.0]) == pytest.approx(1 / 1000 / math.sqrt(2), rel=1e-3)


def test_equal_answers_have_no_error_even_if_all_is_zero() -> None:
    assert error([0.0, 0.0], [0.0, 0.0]) == 0


def test_an_error_where_zero_is_expected_counts_as_it_is() -> None:
    assert error([0.0, 0.5], [0.0, 0.0]) == 0.5


def test_infinities_and_nans_must_stand_at_the_same_places() -> None:
    assert error([INF, NAN, 1.0], [INF, NAN, 1.0]) == 0
    assert error([1.0, 2.0], [1.0, NAN]) == INF
    assert error([INF, 1.0], [-INF, 1.0]) == INF
    assert not error([NAN, 1.0], [1.0, 1.0]) <= 1e9


def test_other_shapes_dtypes_and_counts_never_agree() -> None:
    one = torch.ones(2)
    assert agreement.error([one], [torch.ones(2, 1)]) == INF
    assert agreement.error([one], [one.double()]) == INF
    assert agreement.error([one], [one, one]) == INF


def test_the_worst_output_counts() -> None:
    one, off = torch.ones(2), torch.tensor([1.0, 3.0])
    assert agreement.error([one, off], [one, one]) == pytest.approx(math.sqrt(2))


def test_integers_differ_by_the_share_of_elements() -> None:
    assert agreement.error([torch.tensor([1, 2, 3, 4])], [torch.tensor([1, 2, 0, 4])]) == 0.25


def test_the_coarsest_element_type_sets_the_tolerance() -> None:
    text = """graph g {
      input %x: f32[2]
      %half: bf16[2] = aten.to.dtype(self=%x, dtype=torch.bfloat16)
      return %half
    }"""
    assert agreement.tolerance(Graph.parse(text)) == agreement.TOLERANCES["bf16"]
    assert agreement.tolerance(Graph.parse("graph g {\n input %i: i64[2]\n return %i\n}")) == 0


def test_activations_rounded_to_eight_bits_behind_floats_may_differ_by_a_step() -> None:
    text = """graph g {
      input %x: f32[4]
      %y: f32[4] = aten.sin(self=%x)
      %q: i8[4] = intarsia.quantize_static(input=%y, scale=0.1)
      return %q
    }"""
    assert agreement.tolerance(Graph.parse(text)) == agreement.QUANTIZED


def test_integers_are_equal_and_so_are_inputs_that_are_rounded_and_outputs_that_get_a_scale() -> None:
    integers = "graph g {\n  input %x: i32[4]\n  %y: i32[4] = aten.neg(self=%x)\n  return %y\n}\n"
    assert agreement.tolerance(Graph.parse(integers)) == 0.0
    network = """graph g {
      input %x: f32[4]
      %q: i8[4] = intarsia.quantize_static(input=%x, scale=0.1)
      %n: i8[4] = aten.neg(self=%q)
      %y: f32[4] = intarsia.dequantize_static(input=%n, scale=0.1, dtype=torch.float32)
      return %y
    }"""
    assert agreement.tolerance(Graph.parse(network)) == 0.0
    again = network.replace("return %y", "%z: f32[4] = aten.sin(self=%y)\n return %z")
    assert agreement.tolerance(Graph.parse(again)) == agreement.QUANTIZED
