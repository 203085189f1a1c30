"""Layers of a graph, what they hold and compute, which must agree, and what bits make of them."""

from __future__ import annotations

import pytest

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.search.bit_counts import bops, counts, problem, size_bytes, size_mib, ties, uniform
from intarsia.search.bits import solve

RESIDUAL = """graph residual {
  size batch in [1, 64]
  input %x: f32[batch, 3, 8, 8]
  param %first.w: f32[4, 3, 3, 3]
  param %a.w: f32[8, 4, 3, 3]
  param %a.b: f32[8]
  param %b.w: f32[8, 2, 3, 3]
  param %short.w: f32[8, 4, 1, 1]
  param %short.gain: f32[8, 1, 1, 1]
  param %last.w: f32[10, 128]
  %first: f32[batch, 4, 8, 8] = aten.conv2d(input=%x, weight=%first.w, bias=None, padding=[1, 1])
  %a: f32[batch, 8, 4, 4] = aten.conv2d(input=%first, weight=%a.w, bias=%a.b, stride=[2, 2], padding=[1, 1])
  %b: f32[batch, 8, 4, 4] = aten.conv2d(input=%a, weight=%b.w, bias=None, stride=[1, 1], padding=[1, 1], groups=4)
  %short.folded: f32[8, 4, 1, 1] = aten.mul.Tensor(self=%short.w, other=%short.gain)
  %short: f32[batch, 8, 4, 4] = aten.conv2d(input=%first, weight=%short.folded, bias=None, stride=[2, 2])
  %sum: f32[batch, 8, 4, 4] = aten.add.Tensor(self=%b, other=%short)
  %product: f32[batch, 8, 4, 4] = aten.matmul(self=%sum, other=%sum)
  %flat: f32[batch, 128] = aten.view(self=%product, size=[-1, 128])
  %last: f32[batch, 10] = aten.linear(input=%flat, weight=%last.w, bias=None)
  return %last
}"""

SHARED = """graph shared {
  input %x: f32[1, 8]
  param %w: f32[8, 8]
  %one: f32[1, 8] = aten.linear(input=%x, weight=%w, bias=None)
  %two: f32[1, 8] = aten.linear(input=%one, weight=%w, bias=None)
  return %two
}"""


def test_weights_and_multiply_adds_of_every_layer_are_counted_folded_or_not():
    found = counts(Graph.parse(RESIDUAL), {"batch": 1})
    assert [(count.name, count.weight, count.parameters, count.macs) for count in found] == [
        ("first", "first.w", 4 * 27, 64 * 4 * 27),
        ("a", "a.w", 8 * 36, 16 * 8 * 36),
        ("b", "b.w", 8 * 18, 16 * 8 * 18),
        ("short", "short.folded", 8 * 4, 16 * 8 * 4),
        ("last", "last.w", 1280, 1280),
    ]


def test_multiply_adds_grow_with_the_batch_and_weights_do_not():
    one, two = (counts(Graph.parse(RESIDUAL), {"batch": batch}) for batch in (1, 2))
    assert [2 * count.macs for count in one] == [count.macs for count in two]
    assert [count.parameters for count in one] == [count.parameters for count in two]


def test_layers_that_read_the_same_value_or_share_weights_are_tied():
    assert ties(counts(Graph.parse(RESIDUAL), {"batch": 1})) == (("a", "short"),)
    shared = counts(Graph.parse(SHARED))
    assert ties(shared) == (("one", "two"),)
    assert [count.parameters for count in shared] == [64, 0]


def test_first_and_last_layer_keep_eight_bits():
    found = counts(Graph.parse(RESIDUAL), {"batch": 1})
    chosen = uniform(found, "w4a4")
    assert chosen == {"first": "w8a8", "a": "w4a4", "b": "w4a4", "short": "w4a4", "last": "w8a8"}
    inner = 288 + 144 + 32
    assert size_bytes(found, chosen) == 108 + inner / 2 + 1280
    assert size_mib(found, chosen) * 2**20 == size_bytes(found, chosen)
    assert bops(found, chosen) == 64 * (64 * 108 + 1280) + 16 * 16 * inner
    assert bops(found, {**chosen, "a": "w4a8"}) - bops(found, chosen) == 16 * 16 * 288


def test_a_problem_of_the_graph_keeps_ends_at_eight_bits_and_ties_the_shortcut():
    found = counts(Graph.parse(RESIDUAL), {"batch": 1})
    wrong = {"a": 1.0, "b": 3.0, "short": 1.0}
    asked = problem(found, {name: {"w4a4": value, "w8a8": 0.0} for name, value in wrong.items()})
    assert asked.extent("size") == (
        size_bytes(found, uniform(found, "w4a4")),
        size_bytes(found, uniform(found, "w8a8")),
    )
    assert solve(asked, {"size": asked.extent("size")[0] + 100}).bits == "10101"
    assert solve(asked, {"size": asked.extent("size")[0] + 160}).bits == "10101"
    assert solve(asked, {"size": asked.extent("size")[1]}).bits == "11111"
    untied = problem(found, {name: {"w4a4": value, "w8a8": 0.0} for name, value in wrong.items()}, tied=())
    assert solve(untied, {"size": asked.extent("size")[0] + 100}).bits == "10111"


def test_a_perturbation_of_what_is_no_layer_is_refused():
    with pytest.raises(UsageError, match="sum is no convolution or linear layer of the graph"):
        problem(counts(Graph.parse(RESIDUAL), {"batch": 1}), {"sum": {"w8a8": 0.0}})
    with pytest.raises(UsageError, match="sum is no convolution or linear layer of the graph"):
        problem(counts(Graph.parse(RESIDUAL), {"batch": 1}), {}, tied=[("a", "sum")])
