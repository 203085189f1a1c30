import pytest
import torch

from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target, load_target
from intarsia.passes.fuse_kernels import FuseKernels

ADALN = """graph adaln {
  size N in [2, 64]
  input %x: bf16[2, N, 8]
  input %scale: f32[2, 1, 8]
  input %shift: f32[2, 1, 8]
  %wide: f32[2, N, 8] = aten._to_copy(self=%x, dtype=torch.float32)
  %norm: f32[2, N, 8] = aten.layer_norm(input=%wide, normalized_shape=[8], weight=None, bias=None, eps=1e-06)
  %factor: f32[2, 1, 8] = aten.add.Tensor(self=%scale, other=1)
  %product: f32[2, N, 8] = aten.mul.Tensor(self=%norm, other=%factor)
  %sum: f32[2, N, 8] = aten.add.Tensor(self=%product, other=%shift)
  %y: bf16[2, N, 8] = aten.type_as(self=%sum, other=%x)
  return %y
}
"""


def fused(text: str, target: Target) -> Graph:
    return FuseKernels(everywhere=True).run(Graph.parse(text), target, {})


def assert_close(text: str, after: Graph) -> None:
    before = Graph.parse(text)
    check_types(after)
    inputs = example_inputs(before)
    torch.testing.assert_close(Program(after, {}).module()(*inputs)[0], Program(before, {}).module()(*inputs)[0])


def test_a_norm_in_f32_between_casts_becomes_one_call_in_sixteen_bits(target: Target) -> None:
    after = fused(ADALN, target)
    assert (
        str(after)
        == """graph adaln {
  size N in [2, 64]
  input %x: bf16[2, N, 8]
  input %scale: f32[2, 1, 8]
  input %shift: f32[2, 1, 8]
  %y: bf16[2, N, 8] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%scale, shift=%shift, eps=1e-06)
  return %y
}
"""
    )
    assert_close(ADALN, after)


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("self=%norm, other=%factor", "self=%factor, other=%norm"),
        ("self=%product, other=%shift", "self=%shift, other=%product"),
        ("weight=None, bias=None, eps=1e-06", "weight=%weight, bias=%weight"),
    ],
)
def test_order_and_affine_norms_make_no_difference(found: str, instead: str, target: Target) -> None:
    text = ADALN.replace(found, instead)
    text = text.replace("  %wide:", "  %weight: f32[8] = aten.arange(end=8, dtype=torch.float32)\n  %wide:")
    after = fused(text, target)
    assert after.producers["y"].op == "intarsia.modulated_norm"
    assert_close(text, after)


def test_a_scale_that_gets_its_axis_after_the_one_is_added_gets_it_before(target: Target) -> None:
    text = ADALN.replace("%scale: f32[2, 1, 8]", "%scale: bf16[2, 8]").replace(
        "%factor: f32[2, 1, 8] = aten.add.Tensor(self=%scale, other=1)",
        "%more: bf16[2, 8] = aten.add.Tensor(self=%scale, other=1)\n"
        "  %factor: bf16[2, 1, 8] = aten.unsqueeze(self=%more, dim=1)",
    )
    after = fused(text, target)
    assert [str(node.op) for node in after.nodes] == ["aten.unsqueeze", "intarsia.modulated_norm"]
    assert str(after.type("y.scale")) == "bf16[2, 1, 8]"
    before = Graph.parse(text)
    inputs = example_inputs(before)
    found, expected = (Program(graph, {}).module()(*inputs)[0] for graph in (after, before))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # 1 + scale was rounded to bf16


def test_a_sum_that_is_also_used_in_f32_ends_the_pattern_there(target: Target) -> None:
    after = fused(ADALN.replace("return %y", "return %y, %sum"), target)
    assert [node.op for node in after.nodes] == ["aten._to_copy", "intarsia.modulated_norm", "aten.type_as"]
    assert_close(ADALN.replace("return %y", "return %y, %sum"), after)


@pytest.mark.parametrize(
    ("found", "instead", "place", "reason"),
    [
        (
            "aten.layer_norm(input=%wide, normalized_shape=[8], weight=None, bias=None, eps=1e-06)",
            "aten.rms_norm(input=%wide, normalized_shape=[8])",
            "sum",
            "%norm is an RMS norm; intarsia.modulated_norm computes layer norms",
        ),
        (
            "aten.add.Tensor(self=%scale, other=1)",
            "aten.add.Tensor(self=%scale, other=2)",
            "sum",
            "the norm is multiplied by %factor, which is not 1 + a scale",
        ),
        ("return %y", "return %y, %norm", "sum", "%norm, inside the pattern, is used elsewhere too"),
        (
            "%shift: f32[2, 1, 8]",
            "%shift: f32[8]",
            "y",
            "shift is f32[8], input bf16[2, N, 8]; intarsia.modulated_norm takes (B or 1, N or 1, C) and (B, N, C)",
        ),
        (
            "%y: bf16[2, N, 8] = aten.type_as(self=%sum, other=%x)",
            "%y: f16[2, N, 8] = aten._to_copy(self=%sum, dtype=torch.float16)",
            "",
            "",
        ),
    ],
)
def test_what_is_almost_the_pattern_is_refused_with_the_reason(
    found: str, instead: str, place: str, reason: str, target: Target
) -> None:
    refusals = FuseKernels().refusals(Graph.parse(ADALN.replace(found, instead)), target)
    assert refusals == ({place: reason} if place else {})


def test_a_row_that_no_block_of_threads_holds_is_refused_for_a_gpu() -> None:
    text = ADALN.replace(", 8]", ", 20480]").replace("shape=[8]", "shape=[20480]")
    assert FuseKernels().refusals(Graph.parse(text), load_target("h100"))["y"].startswith("input has 20480 channels")
