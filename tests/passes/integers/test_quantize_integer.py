"""Where layers go on integer grids, on which grids, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.passes.base import check_chosen, find_pass
from intarsia.passes.conformance import check_pass
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.quantize_integer_layers import ties

Filled = Callable[[Graph], Program]
Calibrated = Callable[[Program], Program]
Ranges = Mapping[str, tuple[float, float]]

LINEAR = """graph g {{
  input %x: f32[2, {columns}]
  param %a.w: f32[8, {columns}]
  param %b.w: f32[8, 8]
  param %c.w: f32[8, 8]
  %a: f32[2, 8] = aten.linear(input=%x, weight=%a.w, bias=None)
  %b: f32[2, 8] = aten.linear(input=%a, weight=%b.w, bias=None)
  %c: f32[2, 8] = aten.linear(input=%b, weight=%c.w, bias=None)
  return %c
}}
"""


def linear(columns: int = 8) -> Graph:
    return Graph.parse(LINEAR.format(columns=columns))


def grids(graph: Graph) -> dict[str, tuple[object, object]]:
    return {node.name: (node.args["low"], node.args["high"]) for node in graph.find("intarsia.fake_quantize")}


def chosen(graph: Graph, target: Target, option: str) -> dict[str, str]:
    choices = QuantizeInteger().choices(graph, target)
    return {place: option if option in options else "w8a8" for place, options in choices.items()}


@pytest.mark.parametrize("network", ["residual", "branches", "depthwise", "islands"])
def test_the_pass_keeps_its_promises(
    network: str, request: pytest.FixtureRequest, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    check_pass(QuantizeInteger(), calibrated(with_weights(request.getfixturevalue(network))), target)


def test_convolutions_offer_equal_bits_and_linear_layers_four_bit_weights_too(
    residual: Graph, islands: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    options = QuantizeInteger().choices(calibrated(with_weights(residual)).graph, target)
    assert options["one"] == ("keep", "w8a8", "w4a4")
    options = QuantizeInteger().choices(calibrated(with_weights(islands)).graph, target)
    assert options["mid"] == ("keep", "w8a8", "w4a8", "w4a4")


def test_the_first_and_the_last_layer_stay_in_eight_bits_and_say_so(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = calibrated(with_weights(residual)).graph
    options = QuantizeInteger().choices(graph, target)
    assert options["stem"] == options["fc"] == ("keep", "w8a8")
    message = r"%fc offers keep, w8a8; the plan asks for w4a4: the last layer stays in 8 bits"
    with pytest.raises(PlanError, match=message):
        check_chosen(QuantizeInteger(), graph, target, {"fc": "w4a4"})
    with pytest.raises(PlanError, match=r"%stem offers keep, w8a8; .*the first layer stays in 8 bits"):
        QuantizeInteger().run(graph, target, {"stem": "w4a4"})


def test_layers_that_read_the_same_input_are_tied(
    residual: Graph, branches: Graph, with_weights: Filled, calibrated: Calibrated
) -> None:
    assert ties(calibrated(with_weights(residual)).graph) == (("three", "down"),)
    assert ties(calibrated(with_weights(branches)).graph) == (("left", "right"),)


def test_sums_are_on_sixteen_bits_and_each_block_reads_the_sum_once_in_eight(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = calibrated(with_weights(residual)).graph
    found = QuantizeInteger().run(graph, target, chosen(graph, target, "w8a8"))
    eight, sixteen = (-128, 127), (-32768, 32767)
    assert grids(found) == {
        "x.i8": eight,
        "stem.relu.i16": sixteen,
        "pool.i8": eight,
        "one.relu.i8": eight,
        "two.i16": sixteen,
        "sum.relu.i16": sixteen,
        "sum.relu.i8": eight,
        "three.i16": sixteen,
        "down.i16": sixteen,
        "join.relu.i16": sixteen,
        "mean.i8": eight,
        "fc.i16": sixteen,
    }
    producers = found.producers
    assert producers["three"].ref("input") == producers["down"].ref("input") == "sum.relu.i8"
    assert producers["sum"].inputs == ("two.i16", "pool")


@pytest.mark.parametrize("small", [4.0, 0.01])
def test_what_is_added_is_on_one_grid_unless_it_would_lose_bits(
    small: float, residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    ranged = calibrated(with_weights(residual)).graph
    nodes = [
        replace(node, args={**node.args, "low": -small, "high": small})
        if node.op == "intarsia.calibrated" and node.ref("input") == "three"
        else node
        for node in ranged.nodes
    ]
    found = QuantizeInteger().run(replace(ranged, nodes=tuple(nodes)), target, chosen(ranged, target, "w8a8"))
    rounded = found.producers
    scales = {name: rounded[f"{name}.i16"].args["scale"] for name in ("three", "down", "join.relu")}
    assert scales["down"] == scales["join.relu"]
    assert (scales["three"] == scales["down"]) is (small > 1)
    steps = scales["three"], rounded["sum.relu.i8"].args["scale"]
    assert rounded["three.w8"].args["grain"] == pytest.approx(steps[0] / steps[1] / 128)
    assert "grain" not in rounded["one.w8"].args


def test_four_bits_are_signed_where_something_is_negative(
    with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    graph = with_ranges(linear(), dict.fromkeys(("x", "a", "b", "c"), (-1.0, 2.0)))
    found = QuantizeInteger().run(graph, target, {"b": "w4a4"})
    assert grids(found)["a.i4"] == (-8, 7)


def test_four_bits_are_unsigned_behind_a_relu(
    residual: Graph, depthwise: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = calibrated(with_weights(residual)).graph
    found = QuantizeInteger().run(graph, target, chosen(graph, target, "w4a4"))
    assert grids(found)["one.relu.u4"] == (0, 15)
    weights = {node.name: node.args["bits"] for node in found.find("intarsia.fake_quantize_channels")}
    assert weights["one.w4"] == 4
    assert weights["stem.w8"] == 8
    graph = calibrated(with_weights(depthwise)).graph
    found = QuantizeInteger().run(graph, target, chosen(graph, target, "w4a4"))
    assert grids(found)["depth.clip.u4"] == (0, 15)


def test_readers_in_different_bits_each_get_their_own_rounding(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = calibrated(with_weights(residual)).graph
    found = QuantizeInteger().run(graph, target, {"three": "w4a4", "down": "w8a8"})
    assert found.producers["three"].ref("input") == "sum.relu.u4"
    assert found.producers["down"].ref("input") == "sum.relu.i8"


def test_what_is_concatenated_is_on_one_grid(
    branches: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = calibrated(with_weights(branches)).graph
    found = QuantizeInteger().run(graph, target, chosen(graph, target, "w8a8"))
    parts = [found.producers[name] for name in found.producers["cat"].inputs]
    assert [part.op for part in parts] == ["intarsia.fake_quantize"] * 3
    assert len({part.args["scale"] for part in parts}) == 1


def test_a_float_operator_between_layers_stays_as_it_is(
    islands: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = calibrated(with_weights(islands)).graph
    found = QuantizeInteger().run(graph, target, chosen(graph, target, "w4a8"))
    assert found.producers["gelu"].ref("self") == "up.i16"
    assert found.producers["mid"].ref("input") == "gelu.i8"
    assert found.producers["mid"].ref("weight") == "mid.w4"


def test_a_network_on_grids_trains_with_gradients_straight_through(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    program = calibrated(with_weights(residual))
    found = QuantizeInteger().run(program.graph, target, chosen(program.graph, target, "w4a4"))
    weights = {name: tensor.clone().requires_grad_() for name, tensor in program.weights.items()}
    (x,) = example_inputs(found)
    module = Program(found, weights).module()
    before = module(x)[0].square().mean()
    before.backward()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.any(), name
    with torch.no_grad():
        stepped = {name: tensor - 0.02 * tensor.grad for name, tensor in weights.items() if tensor.grad is not None}
    assert Program(found, stepped).module()(x)[0].square().mean() < before


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ((0.0, 0.0), "%a was zero on all calibration data; a range of 0 has no scale"),
        ((math.nan, 1.0), "%a was calibrated to nan to 1.0; a range is finite, look for NaN"),
        ((-1.0, math.inf), "%a was calibrated to -1.0 to inf; a range is finite"),
        ((2.0, 1.0), "%a was calibrated to 2.0 to 1.0; the lower end comes first"),
        ((-1e-36, 1e-36), "%a was calibrated to -1e-36 to 1e-36; its scale underflows f32"),
    ],
)
def test_a_range_without_a_scale_is_refused_in_one_line(
    seen: tuple[float, float], reason: str, with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    graph = with_ranges(linear(), {"x": (-1.0, 1.0), "a": seen, "b": (-1.0, 1.0), "c": (-1.0, 1.0)})
    refusals = QuantizeInteger().refusals(graph, target)
    assert set(refusals) == {"a", "b"}
    assert refusals["a"].startswith(reason)
    with pytest.raises(PlanError, match=r"quantize-integer: %b offers keep; the plan asks for w8a8: %a was"):
        QuantizeInteger().run(graph, target, {"b": "w8a8"})


def test_a_network_without_ranges_is_sent_to_calibration(residual: Graph, target: Target) -> None:
    assert QuantizeInteger().choices(residual, target) == {}
    assert QuantizeInteger().refusals(residual, target)["stem"] == "%x has no calibrated range; run calibrate first"


def test_a_sum_that_int32_may_not_hold_is_refused_with_its_bounds(
    with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    graph = with_ranges(linear(columns=65_537), dict.fromkeys(("x", "a", "b", "c"), (-1.0, 1.0)))
    assert QuantizeInteger().refusals(graph, target)["a"] == (
        "a sum of 65,537 products of 8-bit weights and codes up to 128 leaves no room for a bias in int32; 65,536 "
        "fit, split the layer or use fewer bits; the first layer stays in 8 bits (HAWQ-V3, bit_config.py)"
    )
    fits = with_ranges(linear(columns=65_536), dict.fromkeys(("x", "a", "b", "c"), (-1.0, 1.0)))
    assert QuantizeInteger().choices(fits, target)["a"] == ("keep", "w8a8")


def test_what_is_no_layer_has_no_option(residual: Graph, target: Target) -> None:
    with pytest.raises(PlanError, match=r"nothing to choose at %pool; it is no convolution and no linear layer"):
        QuantizeInteger().run(residual, target, {"pool": "w8a8"})


def test_the_pass_is_known_by_its_name() -> None:
    assert find_pass("quantize-integer") == QuantizeInteger()
