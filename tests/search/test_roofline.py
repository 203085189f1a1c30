"""Times are compared with divisions done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from intarsia.ir.graph import Graph
from intarsia.ir.target import Target, load_target, shipped_targets
from intarsia.search.roofline import peak, predict

MACHINE = Target(
    name="toy", summary="toy", kind="cuda", architecture="sm_00", flops={"f32": 1e9, "f16": 4e9}, bandwidth=1e6,
    memory=1 << 30, launch=1e-6,
)  # fmt: skip

LINEAR = """graph g {
  input %x: f32[1000, 64]
  param %w: f32[64, 64]
  %y: f32[1000, 64] = aten.linear(input=%x, weight=%w)
  %v: f32[64, 1000] = aten.t(self=%y)
  %r: f32[64, 1000] = aten.relu(self=%v)
  return %r
}"""


def test_a_call_takes_its_launch_and_the_slower_of_computing_and_moving():
    found = predict(Graph.parse(LINEAR), MACHINE)
    moved = 4 * (2 * 64_000 + 64 * 64)
    assert found.nodes["y"].seconds == pytest.approx(1e-6 + moved / 1e6)
    assert (found.nodes["y"].bound, found.nodes["y"].bytes) == ("memory", moved)
    assert found.nodes["r"].seconds == pytest.approx(1e-6 + 8 * 64_000 / 1e6)
    assert found.seconds == pytest.approx(sum(cost.seconds for cost in found.nodes.values()))
    fast = replace(MACHINE, bandwidth=1e12)
    computing = predict(Graph.parse(LINEAR), fast).nodes["y"]
    assert computing.seconds == pytest.approx(1e-6 + 2 * 1000 * 64 * 64 / 1e9)
    assert computing.bound == "compute"


def test_views_cost_nothing():
    assert predict(Graph.parse(LINEAR), MACHINE).nodes["v"].seconds == 0


def test_nodes_that_only_read_weights_cost_no_time_and_their_results_count_as_weights():
    graph = Graph.parse("""graph g {
      input %x: f32[8, 64]
      param %w: f32[64, 64]
      %q: i8[64, 64], %s: f32[64] = intarsia.quantize_rows(weight=%w)
      %y: f32[8, 64] = intarsia.linear_i8(input=%x, weight=%q, scale=%s, bias=None)
      return %y
    }""")
    found = predict(graph, MACHINE)
    assert set(found.nodes) == {"y"}
    assert found.bytes == 64 * 64 + 4 * 64


def test_an_element_type_that_the_machine_does_not_multiply_counts_as_f32():
    assert peak(MACHINE, "f16") == 4e9
    assert peak(MACHINE, "bf16") == 1e9


def test_a_smaller_weight_is_predicted_to_be_faster_where_memory_is_the_limit():
    dense = predict(Graph.parse(LINEAR), MACHINE)
    small = Graph.parse(LINEAR.replace("f32", "f16"))
    assert predict(small, MACHINE).seconds < dense.seconds


def test_the_expected_machines_ship():
    assert {"h200", "h100", "a100", "t4", "l40s", "rtx4090", "cpu-avx2", "null"} <= set(shipped_targets())


@pytest.mark.parametrize("name", shipped_targets())
def test_every_number_of_a_shipped_machine_has_a_source(name: str):
    target = load_target(name)
    assert {"flops", "bandwidth", "memory", "launch"} <= target.sources.keys()
    assert all(len(source) > 20 for source in target.sources.values())


def test_the_null_machine_counts_operations_and_bytes():
    found = predict(Graph.parse(LINEAR), load_target("null"))
    assert found.nodes["y"].seconds == 2 * 1000 * 64 * 64
    assert found.nodes["r"].seconds == 8 * 64_000


def test_dense_figures_of_hopper_are_half_of_those_with_sparsity():
    assert load_target("h200").flops["bf16"] == load_target("h100").flops["bf16"] == 989e12
    assert load_target("h200").bandwidth == 4.8e12
