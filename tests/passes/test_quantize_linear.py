from collections.abc import Callable

import pytest
import torch

from intarsia.ir.errors import PlanError
from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import find_pass
from intarsia.passes.quantize_linear import QuantizeLinear

ALL = ("keep", "i8", "i4(group=32)", "i4(group=64)", "i4(group=128)")


def one_layer(rows: int, columns: int, dtype: str = "f32") -> Graph:
    return Graph.parse(f"""graph g {{
  size N in [2, 64]
  input %x: {dtype}[N, {columns}]
  param %w: {dtype}[{rows}, {columns}]
  %y: {dtype}[N, {rows}] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}}
""")


def test_every_large_layer_offers_eight_and_four_bits(mlp: Graph, target: Target) -> None:
    assert QuantizeLinear().choices(mlp, target) == {"up": ALL[:4], "down": ALL}


def test_keeps_layers_smaller_than_min_rows_and_says_so(mlp: Graph, target: Target) -> None:
    assert QuantizeLinear().refusals(mlp, target) == {"head": "8 rows are fewer than min_rows=32"}
    assert "head" in QuantizeLinear(min_rows=8).choices(mlp, target)
    assert find_pass("quantize-linear(min_rows=8)") == QuantizeLinear(min_rows=8)


def test_groups_must_divide_the_columns(target: Target) -> None:
    assert QuantizeLinear().choices(one_layer(64, 96), target) == {"y": ("keep", "i8", "i4(group=32)")}
    assert QuantizeLinear().choices(one_layer(64, 40), target) == {"y": ("keep", "i8")}


def test_a_layer_that_no_kernel_takes_is_refused_with_the_kernels_reasons(target: Target) -> None:
    reasons = QuantizeLinear().refusals(one_layer(64, 128, "f64"), target)
    assert reasons == {
        "y": "weight is f64; intarsia.quantize_rows takes f32, f16, bf16; "
        "weight is f64; intarsia.quantize_groups takes f32, f16, bf16"
    }


def test_a_weight_that_is_computed_from_inputs_is_refused(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[4, 64]
  input %w: f32[64, 64]
  %y: f32[4, 64] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}
""")
    reason = "weight depends on the model's inputs; only weights are rounded at build time"
    assert QuantizeLinear().refusals(graph, target) == {"y": reason}


def test_a_weight_that_is_computed_from_parameters_is_offered(target: Target) -> None:
    text = (
        str(one_layer(64, 32))
        .replace("param %w: f32", "param %v: bf16")
        .replace("  %y:", "  %w: f32[64, 32] = aten._to_copy(self=%v, dtype=torch.float32)\n  %y:")
    )
    assert QuantizeLinear().choices(Graph.parse(text), target) == {"y": ("keep", "i8", "i4(group=32)")}


def test_chosen_layers_become_this(mlp: Graph, target: Target) -> None:
    changed = QuantizeLinear().run(mlp, target, {"up": "i8", "down": "i4(group=64)"})
    assert (
        str(changed)
        == """graph mlp {
  size N in [2, 64]
  input %x: f32[N, 64]
  param %up.weight: f32[128, 64]
  param %up.bias: f32[128]
  param %down.weight: f32[40, 128]
  param %head.weight: f32[8, 40]
  %up.i8: i8[128, 64], %up.scale: f32[128] = intarsia.quantize_rows(weight=%up.weight)
  %up: f32[N, 128] = intarsia.linear_i8(input=%x, weight=%up.i8, scale=%up.scale, bias=%up.bias)
  %relu: f32[N, 128] = aten.relu(self=%up)
  %down.i4: u8[40, 64], %down.scale: f32[40, 2] = intarsia.quantize_groups(weight=%down.weight, group=64)
  %down: f32[N, 40] = intarsia.linear_i4(input=%relu, packed=%down.i4, scale=%down.scale, bias=None, group=64)
  %head: f32[N, 8] = aten.linear(input=%down, weight=%head.weight, bias=None)
  return %head
}
"""
    )
    verify(changed)
    check_types(changed)


def test_names_that_are_taken_are_not_taken_again(target: Target) -> None:
    text = str(one_layer(64, 32)).replace("%x", "%y.i8").replace("%w", "%y.scale")
    changed = QuantizeLinear().run(Graph.parse(text), target, {"y": "i8"})
    verify(changed)
    assert [value.name for value in changed.nodes[0].outputs] == ["y.i8_", "y.scale_"]


def test_keeping_all_changes_nothing(mlp: Graph, target: Target) -> None:
    assert QuantizeLinear().run(mlp, target, {}) is mlp
    assert QuantizeLinear().run(mlp, target, {"up": "keep"}) is mlp


def test_an_option_that_does_not_exist_is_named(mlp: Graph, target: Target) -> None:
    with pytest.raises(PlanError, match=r"quantize-linear: %up offers keep, i8, .*; the plan asks for fp4"):
        QuantizeLinear().run(mlp, target, {"up": "fp4"})


@pytest.mark.parametrize("option", ALL[1:])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_error_is_that_of_the_rounding(
    option: str, dtype: str, target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    program = with_weights(one_layer(64, 128, dtype))
    rounded = Program(QuantizeLinear().run(program.graph, target, {"y": option}), program.weights)
    inputs = example_inputs(program.graph)
    (exact,), (found,) = program.module()(*inputs), rounded.module()(*inputs)
    error = (found.double() - exact.double()).square().sum() / exact.double().square().sum()
    assert 0 < error < (2e-4 if option == "i8" else 0.03)


def test_at_build_time_only_the_rounded_weights_are_left(
    mlp: Graph, target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    program = with_weights(mlp)
    changed = Program(QuantizeLinear().run(mlp, target, {"up": "i8", "down": "i4(group=32)"}), program.weights)
    built = materialize(changed)
    types = {param.name: str(param.type) for param in built.graph.params}
    assert types["up.i8"] == "i8[128, 64]"
    assert types["down.i4"] == "u8[40, 64]"
    assert not {"up.weight", "down.weight"} & types.keys()
    inputs = example_inputs(mlp)
    assert torch.equal(changed.module()(*inputs)[0], built.module()(*inputs)[0])
