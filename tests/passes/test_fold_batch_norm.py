"""Batch norms folded into the layers before them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.models.base import find
from intarsia.passes.conformance import check_pass
from intarsia.passes.fold_batch_norm import NORMS, FoldBatchNorm


def network(layer: nn.Module, norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for part in (layer, norm):
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if tensor.is_floating_point():
                low = 0.5 if "var" in name else -1.0
                tensor.data = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 1.5 + low
    return nn.Sequential(layer, norm, nn.ReLU()).double().eval()


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), (2, 3, 9, 7)),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8, affine=False, eps=0.1), (2, 4, 9, 7)),
        (nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), (2, 3, 12)),
        (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (1, 2, 5, 6, 7)),
        (nn.Linear(6, 4), nn.BatchNorm1d(4), (3, 6)),
    ],
)
def test_a_layer_and_its_norm_are_one_layer(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], target: Target
) -> None:
    example = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    program = trace(network(layer, norm), {"input": example})
    folded = FoldBatchNorm().run(program.graph, target, {})
    assert not any(folded.find(*NORMS))
    ready = materialize(Program(folded, program.weights))
    assert len(ready.graph.nodes) == 2
    (found,), (expected,) = ready.module()(example), program.module()(example)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_whole_networks_lose_all_their_norms_and_answer_as_before(name: str, target: Target) -> None:
    model = find(name)
    example = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    program = trace(model.build().double(), {"pixel_values": example}, static=model.static)
    folded = FoldBatchNorm().run(program.graph, target, {})
    assert any(program.graph.find(*NORMS))
    assert not any(folded.find(*NORMS))
    inputs = (torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    found, expected = Program(folded, program.weights).module()(*inputs)[0], program.module()(*inputs)[0]
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


NORM = """graph g {
  input %x: f32[2, 4, 5, 5]
  param %w: f32[4, 4, 1, 1]
  param %m: f32[4]
  param %v: f32[4]
  %c: f32[2, 4, 5, 5] = aten.conv2d(input=%x, weight=%w, bias=None)
  %y: f32[2, 4, 5, 5] = aten.batch_norm(input=%c, weight=None, bias=None, running_mean=%m, running_var=%v, training=False, momentum=0.1, eps=0.001, cudnn_enabled=True)
  return %y
}"""  # noqa: E501


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("training=False", "training=True", "it takes its statistics from the batch; trace the model in eval mode"),
        ("running_mean=%m", "running_mean=None", "it has no running statistics"),
        ("return %y", "return %y, %c", "what it normalizes, %c, is used elsewhere too"),
        ("%w: f32", "%w: bf16", "its numbers are f32 and the layer's weight is bf16; cast one of them"),
        ("(input=%c", "(input=%x", "what it normalizes, %x, comes from outside, not from a layer"),
    ],
)
def test_what_cannot_be_folded_stays_and_is_told(old: str, new: str, said: str, target: Target) -> None:
    graph = Graph.parse(NORM.replace(old, new))
    assert FoldBatchNorm().run(graph, target, {}) is graph
    assert FoldBatchNorm().refusals(graph, target)["y"].startswith(said)


def test_it_keeps_a_passs_promises(target: Target, with_weights: Callable[[Graph], Program]) -> None:
    program = with_weights(Graph.parse(NORM))
    variances: dict[str, Tensor] = {"v": program.weights["v"].abs() + 0.5}
    check_pass(FoldBatchNorm(), Program(program.graph, {**program.weights, **variances}), target, error=1e-10)
