from collections.abc import Callable

import pytest
import torch

from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target, load_target
from intarsia.passes.fuse_kernels import FuseKernels

MASKED = """graph masked {
  size T in [2, 64]
  input %q: f32[2, 4, 5, 8]
  input %k: f32[2, 4, T, 8]
  input %v: f32[2, 4, T, 8]
  input %lengths: i64[2]
  %tokens: int = aten.sym_size.int(self=%k, dim=2)
  %keys: i64[T] = aten.arange(end=%tokens)
  %row: i64[1, T] = aten.unsqueeze(self=%keys, dim=0)
  %column: i64[2, 1] = aten.unsqueeze(self=%lengths, dim=1)
  %below: b1[2, T] = aten.lt.Tensor(self=%row, other=%column)
  %mask: b1[2, 1, 1, T] = aten.view(self=%below, size=[2, 1, 1, %tokens])
  %y: f32[2, 4, 5, 8] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v, attn_mask=%mask, scale=0.5)
  return %y
}
"""

SPELLED = """graph spelled {
  input %q: f32[2, 4, 5, 8]
  input %k: f32[2, 4, 7, 8]
  input %v: f32[2, 4, 7, 8]
  %t: f32[2, 4, 8, 7] = aten.transpose.int(self=%k, dim0=-2, dim1=-1)
  %product: f32[2, 4, 5, 7] = aten.matmul(self=%q, other=%t)
  %scores: f32[2, 4, 5, 7] = aten.div.Tensor(self=%product, other=4.0)
  %weights: f32[2, 4, 5, 7] = aten.softmax.int(self=%scores, dim=-1)
  %y: f32[2, 4, 5, 8] = aten.matmul(self=%weights, other=%v)
  return %y
}
"""

DIVIDED = "  %scores: f32[2, 4, 5, 7] = aten.div.Tensor(self=%product, other=4.0)\n"


def fused(text: str, target: Target) -> Graph:
    return FuseKernels(everywhere=True).run(Graph.parse(text), target, {})


def refusal(text: str, target: Target) -> str:
    return FuseKernels().refusals(Graph.parse(text), target)["y"]


def assert_same(before: Graph, after: Graph) -> None:
    check_types(after)
    inputs = example_inputs(before)
    torch.testing.assert_close(Program(after, {}).module()(*inputs)[0], Program(before, {}).module()(*inputs)[0])


def test_a_mask_that_is_proved_to_cut_keys_off_becomes_their_lengths(target: Target) -> None:
    after = fused(MASKED, target)
    assert (
        str(after)
        == """graph masked {
  size T in [2, 64]
  input %q: f32[2, 4, 5, 8]
  input %k: f32[2, 4, T, 8]
  input %v: f32[2, 4, T, 8]
  input %lengths: i64[2]
  %y: f32[2, 4, 5, 8] = intarsia.attention(query=%q, key=%k, value=%v, lengths=%lengths, scale=0.5)
  return %y
}
"""
    )
    inputs = (*example_inputs(Graph.parse(MASKED), {"T": 6})[:3], torch.tensor([6, 2]))
    expected = Program(Graph.parse(MASKED), {}).module()(*inputs)[0]
    torch.testing.assert_close(Program(after, {}).module()(*inputs)[0], expected)


@pytest.mark.parametrize(
    "below",
    [
        "%below: b1[2, T] = aten.gt.Tensor(self=%column, other=%row)",
        "%not: b1[2, T] = aten.ge.Tensor(self=%row, other=%column)\n  %below: b1[2, T] = aten.logical_not(self=%not)",
        "%not: b1[2, T] = aten.le.Tensor(self=%column, other=%row)\n"
        "  %ones: b1[2, T] = aten.ones(size=[2, %tokens], dtype=torch.bool)\n"
        "  %below: b1[2, T] = aten.masked_fill.Scalar(self=%ones, mask=%not, value=False)",
        "%is: b1[2, T] = aten.lt.Tensor(self=%row, other=%column)\n"
        "  %zeros: b1[2, T] = aten.zeros(size=[2, %tokens], dtype=torch.bool)\n"
        "  %below: b1[2, T] = aten.masked_fill.Scalar(self=%zeros, mask=%is, value=True)",
    ],
)
def test_the_same_mask_said_otherwise_is_proved_too(below: str, target: Target) -> None:
    text = MASKED.replace("%below: b1[2, T] = aten.lt.Tensor(self=%row, other=%column)", below)
    assert "lengths=%lengths" in str(fused(text, target))


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("aten.lt.Tensor", "aten.le.Tensor"),  # one key more
        ("aten.lt.Tensor", "aten.ge.Tensor"),  # the other keys
        ("self=%row, other=%column", "self=%column, other=%row"),
    ],
)
def test_a_mask_that_says_something_else_is_not_taken_for_lengths(found: str, instead: str, target: Target) -> None:
    assert refusal(MASKED.replace(found, instead), target).endswith("is not proved to be 'key index < length'")


def test_keys_that_are_counted_from_one_are_not_taken_for_indices(target: Target) -> None:
    text = MASKED.replace(
        "%keys: i64[T] = aten.arange(end=%tokens)",
        "%more: int = operator.add(arg0=%tokens, arg1=1)\n  %keys: i64[T] = aten.arange.start(start=1, end=%more)",
    )
    assert (
        refusal(text, target) == "the mask %mask comes from aten.lt.Tensor and is not proved to be 'key index < length'"
    )


def test_a_mask_of_queries_by_keys_is_refused(target: Target) -> None:
    text = MASKED.replace("[2, 1, 1, T]", "[1, 1, 2, T]").replace("size=[2, 1, 1, %t", "size=[1, 1, 2, %t")
    assert refusal(text, target) == "the mask %mask is b1[1, 1, 2, T]; keys are cut off by (B, 1, 1, T) alone"


def test_one_row_of_a_mask_for_a_whole_batch_is_refused(target: Target) -> None:
    text = MASKED.replace("lengths: i64[2]", "lengths: i64[1]").replace("i64[2, 1]", "i64[1, 1]")
    text = text.replace("b1[2, T]", "b1[1, T]").replace("b1[2, 1, 1, T]", "b1[1, 1, 1, T]").replace("=[2, 1", "=[1, 1")
    assert refusal(text, target) == "the mask %mask is b1[1, 1, 1, T], not one row for each of the batch"


def test_a_mask_that_is_added_is_refused(target: Target) -> None:
    text = MASKED.replace("%mask: b1", "%bits: b1").replace(
        "  %y:", "  %mask: f32[2, 1, 1, T] = aten._to_copy(self=%bits, dtype=torch.float32)\n  %y:"
    )
    assert refusal(text, target) == (
        "the mask %mask is f32[2, 1, 1, T], added to the scores and not proved to cut keys off"
    )


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("is_causal=True", "is_causal is set; intarsia.attention lets every query see every key"),
        ("dropout_p=0.1", "dropout_p is 0.1; intarsia.attention drops nothing"),
        ("enable_gqa=True", "enable_gqa is set; intarsia.attention has as many heads in key and value as in query"),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused_by_name(argument: str, reason: str, target: Target) -> None:
    assert refusal(MASKED.replace("attn_mask=%mask", argument), target) == reason


def test_the_kernels_own_limits_are_asked_for_the_target() -> None:
    text = MASKED.replace(", attn_mask=%mask", "")
    assert refusal(text, load_target("h100")).startswith("a head has 8 channels; on a GPU intarsia.attention takes")


def test_attention_in_pieces_becomes_one_call_with_its_scale(target: Target) -> None:
    before, after = Graph.parse(SPELLED), fused(SPELLED, target)
    assert [str(node.op) for node in after.nodes] == ["intarsia.attention"]
    assert dict(after.nodes[0].args)["scale"] == 0.25
    assert after.nodes[0].ref("key") == "k"
    assert_same(before, after)


def test_a_key_that_came_transposed_is_turned_back(target: Target) -> None:
    text = SPELLED.replace("  input %k: f32[2, 4, 7, 8]", "  input %k: f32[2, 4, 8, 7]")
    text = text.replace("aten.transpose.int(self=%k, dim0=-2, dim1=-1)", "aten.relu(self=%k)")
    after = fused(text, target)
    assert [node.op for node in after.nodes] == ["aten.relu", "aten.transpose.int", "intarsia.attention"]
    assert_same(Graph.parse(text), after)


def test_scores_without_a_scale_keep_their_size(target: Target) -> None:
    text = SPELLED.replace("self=%scores, dim", "self=%product, dim").replace(DIVIDED, "")
    after = fused(text, target)
    assert after.producers["y"].args["scale"] == 1.0
    assert_same(Graph.parse(text), after)


def test_softmax_in_f32_between_products_in_sixteen_bits_is_looked_through(target: Target) -> None:
    text = SPELLED.replace("f32[", "f16[")
    text = text.replace(
        "%weights: f16[2, 4, 5, 7] = aten.softmax.int(self=%scores, dim=-1)",
        "%wide: f32[2, 4, 5, 7] = aten._to_copy(self=%scores, dtype=torch.float32)\n"
        "  %soft: f32[2, 4, 5, 7] = aten.softmax.int(self=%wide, dim=3)\n"
        "  %weights: f16[2, 4, 5, 7] = aten._to_copy(self=%soft, dtype=torch.float16)",
    )
    assert [node.op for node in fused(text, target).nodes] == ["intarsia.attention"]


def test_scores_with_a_bias_are_refused(target: Target) -> None:
    text = SPELLED.replace("aten.div.Tensor(self=%product, other=4.0)", "aten.add.Tensor(self=%product, other=%bias)")
    text = text.replace("  %t:", "  %bias: f32[5, 7] = aten.ones(size=[5, 7])\n  %t:")
    assert (
        refusal(text, target)
        == "the scores %scores come from aten.add.Tensor; intarsia.attention only scales a product"
    )


def test_weights_that_are_also_an_output_are_not_computed_twice(target: Target) -> None:
    text = SPELLED.replace("return %y", "return %y, %weights")
    assert refusal(text, target) == "%weights, inside the pattern, is used elsewhere too"


def test_a_softmax_that_weighs_no_scores_is_no_attention(
    target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    graph = Graph.parse("""graph router {
  input %x: f32[4, 8]
  param %w: f32[8, 8]
  %logits: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=None)
  %p: f32[4, 8] = aten.softmax.int(self=%logits, dim=-1)
  %y: f32[4, 8] = aten.matmul(self=%p, other=%w)
  return %y
}
""")
    assert FuseKernels().refusals(graph, target) == {}
    assert FuseKernels(everywhere=True).run(graph, target, {}) is graph
