"""ResNet-18 on grids and in integers, from the picture to the logits, and a video transformer's layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from intarsia.ir.execute import evaluate_nodes
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.models.resnet import resnet18
from intarsia.passes.clean import Clean
from intarsia.passes.integer_only import integer_only
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.quantize_integer_layers import ties

Calibrated = Callable[[Program], Program]

PREFIX = "resnet.encoder.stages."


def folded_resnet18(target: Target) -> Program:
    """ResNet-18 for pictures of 32x32, batch norms folded into the convolutions before them."""
    torch.manual_seed(0)
    model = resnet18()
    module = model.build()
    for unit in module.modules():
        if isinstance(getattr(unit, "normalization", None), nn.BatchNorm2d):
            unit.convolution = nn.utils.fuse_conv_bn_eval(unit.convolution, unit.normalization)
            unit.normalization = nn.Identity()
    picture = {"pixel_values": torch.randn(2, 3, 32, 32)}
    program = trace(module, picture, name="resnet18", static=model.static, dynamic=model.dynamic)
    return Program(Clean().run(program.graph, target, {}), program.weights)


def values(graph: Graph, program: Program, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    given = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    return evaluate_nodes(graph.nodes, {**program.weights, **given})


def test_resnet18_in_integers_is_the_network_on_grids_but_for_roundings(calibrated: Calibrated, target: Target) -> None:
    program = calibrated(folded_resnet18(target))
    choices = QuantizeInteger().choices(program.graph, target)
    fake = QuantizeInteger().run(program.graph, target, dict.fromkeys(choices, "w8a8"))
    integer = LowerInteger().run(fake, target, {})
    inputs = example_inputs(program.graph, seed=1)
    expected, rounded, exact = (values(graph, program, inputs) for graph in (program.graph, fake, integer))

    assert integer_only(integer) == ()
    assert len(choices) == 21
    assert ties(program.graph) == tuple(
        (
            f"{PREFIX}{stage}.layers.0.layer.0.convolution.conv2d",
            f"{PREFIX}{stage}.layers.0.shortcut.convolution.conv2d",
        )
        for stage in (1, 2, 3)
    )
    eight = [node for node in fake.find("intarsia.fake_quantize") if node.args["low"] == -128]
    apart = torch.cat(
        [
            (rounded[node.name] / torch.tensor(node.args["scale"])).round().sub(exact[f"{node.name}.codes"]).flatten()
            for node in eight
        ]
    ).abs()
    # Sixteen bits of trunk differ by a step where a sum rounds both operands, and 18 layers pass that on.
    assert (apart > 0).float().mean() < 0.1
    assert (apart > 1).float().mean() < 0.002
    assert apart.max() <= 4

    logits, integers = expected[program.graph.outputs[0]], exact[integer.outputs[0]]
    assert (integers - logits).norm() < 0.03 * logits.norm()
    assert torch.equal(integers.argmax(1), logits.argmax(1))
    assert (integers - rounded[fake.outputs[0]]).norm() < 0.02 * logits.norm()


def test_the_linear_layers_of_a_video_transformer_become_integers_between_float_islands(
    wan_mini: Program, calibrated: Calibrated, target: Target
) -> None:
    program = calibrated(wan_mini)
    chosen = {name: "w4a8" for name in program.graph.producers if name.startswith("blocks.0.ffn")}
    choices = QuantizeInteger().choices(program.graph, target)
    chosen = {name: option for name, option in chosen.items() if name in choices}
    assert len(chosen) == 2
    graph = LowerInteger().run(QuantizeInteger().run(program.graph, target, chosen), target, {})
    assert len(list(graph.find("intarsia.linear_i8i8"))) == 2
    assert "%blocks.0.ffn.net.0.gelu: aten.gelu is in float; integer-islands has an integer form" in integer_only(graph)
    inputs = example_inputs(graph, seed=1)
    (expected,), (found,) = (Program(one, program.weights).module()(*inputs) for one in (wan_mini.graph, graph))
    assert (found - expected).norm() < 0.05 * expected.norm()
