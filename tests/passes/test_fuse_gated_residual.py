import pytest
import torch

from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.passes.fuse_kernels import FuseKernels

GATED = """graph gated {
  size N in [2, 64]
  input %x: bf16[2, N, 8]
  input %branch: bf16[2, N, 8]
  input %gate: f32[2, 1, 8]
  %wide: f32[2, N, 8] = aten._to_copy(self=%x, dtype=torch.float32)
  %product: f32[2, N, 8] = aten.mul.Tensor(self=%branch, other=%gate)
  %sum: f32[2, N, 8] = aten.add.Tensor(self=%wide, other=%product)
  %y: bf16[2, N, 8] = aten.type_as(self=%sum, other=%x)
  return %y
}
"""


def fused(text: str, target: Target) -> Graph:
    after = FuseKernels(everywhere=True).run(Graph.parse(text), target, {})
    check_types(after)
    return after


def assert_close(text: str, after: Graph) -> None:
    before = Graph.parse(text)
    inputs = example_inputs(before)
    torch.testing.assert_close(Program(after, {}).module()(*inputs)[0], Program(before, {}).module()(*inputs)[0])


def test_a_sum_in_f32_between_casts_becomes_one_call_in_sixteen_bits(target: Target) -> None:
    after = fused(GATED, target)
    assert (
        str(after)
        == """graph gated {
  size N in [2, 64]
  input %x: bf16[2, N, 8]
  input %branch: bf16[2, N, 8]
  input %gate: f32[2, 1, 8]
  %y: bf16[2, N, 8] = intarsia.gated_residual(residual=%x, input=%branch, gate=%gate)
  return %y
}
"""
    )
    assert_close(GATED, after)


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("self=%branch, other=%gate", "self=%gate, other=%branch"),
        ("self=%wide, other=%product", "self=%product, other=%wide"),
    ],
)
def test_order_makes_no_difference(found: str, instead: str, target: Target) -> None:
    after = fused(GATED.replace(found, instead), target)
    assert after == fused(GATED, target)


def test_one_element_type_throughout_needs_no_casts(target: Target) -> None:
    text = GATED.replace("bf16", "f32")
    after = fused(text, target)
    assert [node.name for node in after.nodes if node.op == "intarsia.gated_residual"] == ["sum"]
    assert_close(text, after)


def test_a_gate_for_each_token_is_taken_where_the_residual_is_no_product_itself(target: Target) -> None:
    text = GATED.replace("%gate: f32[2, 1, 8]", "%gate: f32[2, N, 8]")
    assert fused(text, target).producers["y"].op == "intarsia.gated_residual"
    two_products = text.replace("aten._to_copy(self=%x, dtype=torch.float32)", "aten.mul.Tensor(self=%x, other=%gate)")
    assert FuseKernels().choices(Graph.parse(two_products), target) == {}
    assert FuseKernels().refusals(Graph.parse(two_products), target) == {}


@pytest.mark.parametrize(
    ("found", "instead", "refusals"),
    [
        ("return %y", "return %y, %product", {"sum": "%product, inside the pattern, is used elsewhere too"}),
        (
            "%gate: f32[2, 1, 8]",
            "%gate: f32[8]",
            {
                "y": "gate is f32[8], residual bf16[2, N, 8]; "
                "intarsia.gated_residual takes (B or 1, N or 1, C) and (B, N, C)"
            },
        ),
        (
            "self=%wide, other=%product",
            "self=%x, other=%product",
            {},
        ),
        ("self=%wide, other=%product", "self=%wide, other=%product, alpha=2", {}),
    ],
)
def test_what_is_almost_the_pattern(found: str, instead: str, refusals: dict[str, str], target: Target) -> None:
    assert FuseKernels().refusals(Graph.parse(GATED.replace(found, instead)), target) == refusals
