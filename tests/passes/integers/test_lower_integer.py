"""Networks on grids become integers, which differ from the float form by roundings and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from intarsia.ir.errors import PlanError
from intarsia.ir.execute import call, check_types, evaluate_nodes
from intarsia.ir.graph import Graph, Ref
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.kernels.integers import golden
from intarsia.passes.conformance import check_pass
from intarsia.passes.integer_only import integer_only
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger

Filled = Callable[[Graph], Program]
Calibrated = Callable[[Program], Program]

NETWORKS = ("residual", "branches", "depthwise", "islands")

Ready = Callable[[Graph], Program]


@pytest.fixture
def ready(with_weights: Filled, calibrated: Calibrated) -> Ready:
    """The graph with random weights, calibrated."""
    return lambda graph: calibrated(with_weights(graph))


def on_grids(program: Program, target: Target, option: str) -> Program:
    choices = QuantizeInteger().choices(program.graph, target)
    chosen = {place: option if option in options else options[-1] for place, options in choices.items()}
    return Program(QuantizeInteger().run(program.graph, target, chosen), program.weights)


def lowered(program: Program, target: Target) -> Program:
    return Program(LowerInteger().run(program.graph, target, {}), program.weights)


def everything(program: Program, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    given = {value.name: tensor for value, tensor in zip(program.graph.inputs, inputs, strict=True)}
    return evaluate_nodes(program.graph.nodes, {**program.weights, **given})


def steps_apart(fake: Program, integer: Program, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """By rounding: how many steps each code in float is from the integer one, both made of the same integer codes."""
    codes = everything(integer, inputs)
    values: dict[str, Tensor] = {**fake.weights, **dict(zip((v.name for v in fake.graph.inputs), inputs, strict=True))}
    found = {}
    with torch.no_grad():
        for node in fake.graph.nodes:
            values.update(zip((value.name for value in node.outputs), call(node, values), strict=True))
            if (exact := codes.get(f"{node.name}.codes")) is not None and node.op == "intarsia.fake_quantize":
                scale = node.args["scale"]
                assert isinstance(scale, float)
                found[node.name] = ((values[node.name] / scale).round() - exact).abs()
                values[node.name] = exact.float() * scale
    return found


@pytest.mark.parametrize("option", ["w8a8", "w4a4"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_pass_keeps_its_promises(
    network: str, option: str, request: pytest.FixtureRequest, ready: Ready, target: Target
) -> None:
    program = on_grids(ready(request.getfixturevalue(network)), target, option)
    check_pass(LowerInteger(), program, target, error=1e-4)


@pytest.mark.parametrize("option", ["w8a8", "w4a4"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_code_is_within_a_step_of_the_float_form_and_most_are_equal(
    network: str, option: str, request: pytest.FixtureRequest, ready: Ready, target: Target
) -> None:
    fake = on_grids(ready(request.getfixturevalue(network)), target, option)
    apart = steps_apart(fake, lowered(fake, target), example_inputs(fake.graph, seed=7))
    assert len(apart) >= 5
    for name, steps in apart.items():
        assert steps.max() <= 1, name
        # A sum rounds both of its operands, the float form only the result.
        # Of 16 bits one in 128 is halfway between two codes: up in integers, to even in float.
        share = 0.35 if name.startswith(("sum", "join")) else 0.03 if name.endswith("i16") else 0.01
        assert (steps > 0).sum() <= max(1, share * steps.numel()), name


@pytest.mark.parametrize("network", ["residual", "branches", "depthwise"])
def test_convolutional_networks_become_integers_from_end_to_end(
    network: str, request: pytest.FixtureRequest, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    fake = on_grids(calibrated(with_weights(request.getfixturevalue(network))), target, "w8a8")
    integer = lowered(fake, target)
    check_types(integer.graph)
    assert integer_only(integer.graph) == ()
    assert integer_only(fake.graph) != ()
    assert len(list(integer.graph.find("intarsia.quantize_static", "intarsia.dequantize_static"))) == 2


def test_eight_bits_stay_close_to_the_unquantized_network(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    program = with_weights(residual)
    (x,) = example_inputs(residual, seed=1)
    (expected,) = program.module()(x)
    (found,) = lowered(on_grids(calibrated(program), target, "w8a8"), target).module()(x)
    assert (found - expected).norm() < 0.025 * expected.norm()


def test_the_residual_unit_in_integers(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    nodes = lowered(on_grids(calibrated(with_weights(residual)), target, "w8a8"), target).graph.producers
    ends = {name: (nodes[name].op, nodes[name].args.get("low"), nodes[name].args.get("high")) for name in nodes}
    assert ends["stem.relu.i16.codes"] == ("intarsia.conv2d_i8i8", 0, 32767)
    assert ends["pool.codes"][0] == "aten.max_pool2d"
    assert ends["pool.i8.codes"] == ("intarsia.requantize", 0, 127)
    assert ends["one.relu.i8.codes"] == ("intarsia.conv2d_i8i8", 0, 127)
    assert ends["two.i16.codes"] == ("intarsia.conv2d_i8i8", -32768, 32767)
    assert ends["sum.relu.i16.codes"] == ("intarsia.add_requantized", 0, 32767)
    assert nodes["sum.relu.i16.codes"].ref("other") == "pool.codes"
    assert nodes["three.i16.codes"].ref("input") == nodes["down.i16.codes"].ref("input") == "sum.relu.i8.codes"
    assert ends["mean.i8.codes"][0] == "intarsia.avg_pool2d_i8"
    assert nodes["mean.i8.codes"].ref("input") == "join.relu.i16.codes"
    assert ends["flat.codes"][0] == "aten.flatten.using_ints"
    assert ends["fc.i16"][0] == "intarsia.dequantize_static"


def test_what_is_concatenated_comes_on_one_grid_and_is_not_rounded_again(
    branches: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = lowered(on_grids(calibrated(with_weights(branches)), target, "w8a8"), target).graph
    parts = [graph.producers[name] for name in graph.producers["cat.codes"].inputs]
    assert [part.op for part in parts] == [
        "intarsia.conv2d_i8i8",
        "intarsia.conv2d_i8i8",
        "intarsia.avg_pool2d_i8",
    ]
    assert not any(graph.find("intarsia.requantize"))


def test_relu6_becomes_the_upper_end_of_the_codes(
    depthwise: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    program = with_weights(depthwise)
    wide = Program(program.graph, {**program.weights, "stem.b": torch.full((8,), 20.0)})
    fake = on_grids(calibrated(wide), target, "w8a8")
    integer = lowered(fake, target)
    call_ = integer.graph.producers["stem.clip.i8.codes"]
    assert (call_.args["low"], call_.args["high"]) == (0, 127)
    assert integer.graph.producers["depth.clip.i8.codes"].args["groups"] == 8
    assert everything(integer, example_inputs(fake.graph))["stem.clip.i8.codes"].max() == 127


def test_a_clamp_below_the_grids_end_clips_the_codes_there(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[2, 4]
  %a: f32[2, 4] = intarsia.fake_quantize(input=%x, scale=0.1, low=-128, high=127)
  %clip: f32[2, 4] = aten.clamp(self=%a, min=-1.0, max=6.0)
  %b: f32[2, 4] = intarsia.fake_quantize(input=%clip, scale=0.2, low=-128, high=127)
  return %b
}
""")
    made = LowerInteger().run(graph, target, {}).producers["b.codes"]
    assert (made.op, made.args["low"], made.args["high"]) == ("intarsia.requantize", -5, 30)


def test_integers_of_a_materialized_network_have_no_float_weights(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    integer = lowered(on_grids(calibrated(with_weights(residual)), target, "w4a4"), target)
    built = materialize(integer)
    assert {param.type.dtype for param in built.graph.params if hasattr(param.type, "dtype")} == {"i8", "i32"}
    assert built.weights["one.codes"].abs().max() <= 8
    (x,) = example_inputs(residual)
    assert torch.equal(built.module()(x)[0], integer.module()(x)[0])


def test_a_float_operator_becomes_an_island_between_integers(
    islands: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    graph = lowered(on_grids(calibrated(with_weights(islands)), target, "w4a8"), target).graph
    assert integer_only(graph) == (
        "%gelu: aten.gelu is in float; integer-islands has an integer form",
        "%softmax: aten.softmax.int is in float; integer-islands has an integer form",
    )
    assert graph.producers[graph.producers["gelu"].ref("self")].op == "intarsia.dequantize_static"
    assert graph.producers["softmax.i8.codes"].op == "intarsia.quantize_static"


def test_a_layer_that_was_kept_stays_in_float_and_is_listed(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    program = calibrated(with_weights(residual))
    choices = QuantizeInteger().choices(program.graph, target)
    chosen = {place: "w8a8" for place in choices if place != "three"}
    graph = LowerInteger().run(QuantizeInteger().run(program.graph, target, chosen), target, {})
    assert integer_only(graph) == (
        "%three: aten.conv2d is kept in float: its input, weight or result is on no integer grid",
        "%join: aten.add.Tensor is computed in float: not all that it reads comes in integers",
        "%join.relu: aten.relu is computed in float: not all that it reads comes in integers",
        "%mean: aten.adaptive_avg_pool2d is computed in float: not all that it reads comes in integers",
        "%flat: aten.flatten.using_ints is computed in float: not all that it reads comes in integers",
    )


def test_a_graph_without_grids_is_left_alone(residual: Graph, target: Target) -> None:
    assert LowerInteger().run(residual, target, {}) is residual


def test_steps_too_far_apart_for_a_shift_are_told_in_one_line(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[2, 4]
  %a: f32[2, 4] = intarsia.fake_quantize(input=%x, scale=1e-12, low=-128, high=127)
  %b: f32[2, 4] = intarsia.fake_quantize(input=%a, scale=1.0, low=-128, high=127)
  return %b
}
""")
    message = r"lower-integer: %b: one step is 1e-12 of the next grid's, which underflows a dyadic number \(shift 70, "
    with pytest.raises(PlanError, match=message):
        LowerInteger().run(graph, target, {})


def test_a_sum_that_int32_may_not_hold_is_refused_here_too(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[1, 131072]
  param %w: f32[4, 131072]
  %a: f32[1, 131072] = intarsia.fake_quantize(input=%x, scale=0.1, low=-128, high=127)
  %w8: f32[4, 131072] = intarsia.fake_quantize_channels(weight=%w, bits=8)
  %y: f32[1, 4] = aten.linear(input=%a, weight=%w8, bias=None)
  %b: f32[1, 4] = intarsia.fake_quantize(input=%y, scale=0.1, low=-128, high=127)
  return %b
}
""")
    with pytest.raises(
        PlanError, match=r"lower-integer: %y: a sum of 131,072 products of 8-bit weights and codes up to"
    ):
        LowerInteger().run(graph, target, {})


def test_sixteen_bit_codes_are_no_input_of_a_product_and_stay_in_float(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[1, 8]
  param %w: f32[4, 8]
  %a: f32[1, 8] = intarsia.fake_quantize(input=%x, scale=0.1, low=-32768, high=32767)
  %w8: f32[4, 8] = intarsia.fake_quantize_channels(weight=%w, bits=8)
  %y: f32[1, 4] = aten.linear(input=%a, weight=%w8, bias=None)
  %b: f32[1, 4] = intarsia.fake_quantize(input=%y, scale=0.1, low=-128, high=127)
  return %b
}
""")
    lines = integer_only(LowerInteger().run(graph, target, {}))
    assert lines == ("%y: aten.linear is kept in float: its input, weight or result is on no integer grid",)


BIASED = """graph g {
  input %x: f32[1, 8]
  param %w: f32[2, 8]
  param %b: f32[2]
  %a: f32[1, 8] = intarsia.fake_quantize(input=%x, scale=0.01, low=-128, high=127)
  %w8: f32[2, 8] = intarsia.fake_quantize_channels(weight=%w, bits=8)
  %y.bias: f32[2] = intarsia.fake_quantize_bias(bias=%b, weight=%w, bits=8, input_scale=0.01)
  %y: f32[1, 2] = aten.linear(input=%a, weight=%w8, bias=%y.bias)
  %z: f32[1, 2] = intarsia.fake_quantize(input=%y, scale=0.02, low=-128, high=127)
  return %z
}
"""


def both(weight: Tensor, bias: list[float], target: Target) -> tuple[Tensor, Tensor]:
    """What the layer gives of ones on grids in float, and in integers by their definition."""
    graph = Graph.parse(BIASED)
    parameters = {"w": weight, "b": torch.tensor(bias)}
    x = torch.ones(1, 8)
    (real,) = Program(graph, parameters).module()(x)
    ready = materialize(Program(LowerInteger().run(graph, target, {}), parameters))
    (layer,) = ready.graph.find("intarsia.linear_i8i8")
    given = {
        key: ready.weights[arg.name].numpy()
        for key, arg in layer.args.items()
        if key != "input" and isinstance(arg, Ref)
    }
    codes = golden.linear_i8i8(golden.quantize_static(x.numpy(), 0.01), **given)
    return real, torch.from_numpy(codes) * 0.02


def test_a_channel_without_weights_keeps_its_bias(target: Target) -> None:
    weight = torch.stack([torch.zeros(8), torch.full((8,), 0.01)])
    real, integer = both(weight, [1.5, 0.3], target)
    torch.testing.assert_close(real, torch.tensor([[1.5, 0.38]]), atol=0.011, rtol=0)
    torch.testing.assert_close(integer, real)


def test_a_bias_beyond_int32_leaves_room_for_the_sum_it_is_added_to(target: Target) -> None:
    """1e-7 of weight and 1 of bias: 1.3e11 steps, which saturate; then a sum on top of them is still in int32."""
    real, integer = both(torch.full((2, 8), 1e-7), [1.0, -1.0], target)
    assert integer[0, 0] > 0 > integer[0, 1]
    assert (integer.abs() <= real.abs() + 0.02).all()
