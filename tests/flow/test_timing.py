"""Seconds of a single call, measured through an engine of its own."""

from __future__ import annotations

import pytest

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.target import load_target
from intarsia.timing import measured_seconds

GRAPH = Graph.parse(
    """graph g {
  input %x: f32[SIZE, SIZE]
  %y: f32[SIZE, SIZE] = aten.relu(self=%x)
  %z: f32[SIZE, SIZE] = aten.mm(self=%y, mat2=%x)
  return %z
}""".replace("SIZE", "512")
)


def test_a_call_is_timed_alone_and_a_product_takes_longer_than_a_relu():
    seconds = measured_seconds(load_target("cpu-avx2"), repeats=5)
    relu, product = (seconds(node, GRAPH) for node in GRAPH.nodes)
    assert 0 < relu < product < 10


def test_times_of_another_kind_of_machine_are_refused():
    with pytest.raises(UsageError, match="those of this machine's CPU, and --target h100 is none"):
        measured_seconds(load_target("h100"))
