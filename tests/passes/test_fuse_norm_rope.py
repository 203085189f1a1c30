import pytest
import torch

from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.passes.fuse_kernels import FuseKernels

ROTATION = """  %{n}.pairs: {t}[2, 5, 3, 4, 2] = aten.view(self=%{n}, size=[2, 5, 3, 4, 2])
  %{n}.even: {t}[2, 5, 3, 4], %{n}.odd: {t}[2, 5, 3, 4] = aten.unbind.int(self=%{n}.pairs, dim=-1)
  %{n}.a: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%{n}.even, other=%cos)
  %{n}.b: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%{n}.odd, other=%sin)
  %{n}.first: f32[2, 5, 3, 4] = aten.sub.Tensor(self=%{n}.a, other=%{n}.b)
  %{n}.c: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%{n}.even, other=%sin)
  %{n}.d: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%{n}.odd, other=%cos)
  %{n}.second: f32[2, 5, 3, 4] = aten.add.Tensor(self=%{n}.c, other=%{n}.d)
  %{n}.stack: f32[2, 5, 3, 4, 2] = aten.stack(tensors=[%{n}.first, %{n}.second], dim=-1)
  %{n}.flat: f32[2, 5, 3, 8] = aten.flatten.using_ints(self=%{n}.stack, start_dim=3, end_dim=4)
"""

TWO = f"""graph two {{
  input %x: bf16[2, 5, 24]
  input %cos: f32[1, 5, 1, 4]
  input %sin: f32[1, 5, 1, 4]
  input %w: bf16[24]
  %q: bf16[2, 5, 24] = aten.rms_norm(input=%x, normalized_shape=[24], weight=%w, eps=1e-06)
  %k: bf16[2, 5, 24] = aten.rms_norm(input=%x, normalized_shape=[24], weight=None, eps=1e-05)
{ROTATION.format(n="q", t="bf16")}{ROTATION.format(n="k", t="bf16")}\
  %y: bf16[2, 5, 3, 8] = aten._to_copy(self=%q.flat, dtype=torch.bfloat16)
  %z: bf16[2, 5, 3, 8] = aten._to_copy(self=%k.flat, dtype=torch.bfloat16)
  return %y, %z
}}
"""

TURNED = """graph turned {
  input %x: f32[2, 5, 24]
  input %cos: f32[2, 5, 24]
  input %sin: f32[2, 5, 24]
  %q: f32[2, 5, 24] = aten.rms_norm(input=%x, normalized_shape=[24], weight=None, eps=1e-06)
  %pairs: f32[2, 5, 12, 2] = aten.view(self=%q, size=[2, 5, 12, 2])
  %even: f32[2, 5, 12], %odd: f32[2, 5, 12] = aten.unbind.int(self=%pairs, dim=-1)
  %minus: f32[2, 5, 12] = aten.neg(self=%odd)
  %stack: f32[2, 5, 12, 2] = aten.stack(tensors=[%minus, %even], dim=-1)
  %quarter: f32[2, 5, 24] = aten.view(self=%stack, size=[2, 5, 24])
  %a: f32[2, 5, 24] = aten.mul.Tensor(self=%q, other=%cos)
  %b: f32[2, 5, 24] = aten.mul.Tensor(self=%quarter, other=%sin)
  %y: f32[2, 5, 24] = aten.add.Tensor(self=%a, other=%b)
  return %y
}
"""


def test_query_and_key_become_one_call_each_and_share_their_tables(target: Target) -> None:
    after = FuseKernels(everywhere=True).run(Graph.parse(TWO), target, {})
    check_types(after)
    assert (
        str(after)
        == """graph two {
  input %x: bf16[2, 5, 24]
  input %cos: f32[1, 5, 1, 4]
  input %sin: f32[1, 5, 1, 4]
  input %w: bf16[24]
  %cos.rows: f32[5, 4] = aten.squeeze.dims(self=%cos, dim=[0, 2])
  %sin.rows: f32[5, 4] = aten.squeeze.dims(self=%sin, dim=[0, 2])
  %y: bf16[2, 5, 3, 8] = intarsia.norm_rope(input=%x, weight=%w, cos=%cos.rows, sin=%sin.rows, heads=3, eps=1e-06)
  %z: bf16[2, 5, 3, 8] = intarsia.norm_rope(input=%x, weight=None, cos=%cos.rows, sin=%sin.rows, heads=3, eps=1e-05)
  return %y, %z
}
"""
    )
    inputs = example_inputs(after)
    for found, expected in zip(
        Program(after, {}).module()(*inputs), Program(Graph.parse(TWO), {}).module()(*inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # the norm was rounded to bf16


def test_in_f32_the_result_is_the_same(target: Target) -> None:
    text = TWO.replace("bf16", "f32").replace("torch.bfloat16", "torch.float32")
    before, after = Graph.parse(text), FuseKernels(everywhere=True).run(Graph.parse(text), target, {})
    assert {node.op for node in after.nodes} == {"aten.squeeze.dims", "intarsia.norm_rope", "aten._to_copy"}
    inputs = example_inputs(before)
    for found, expected in zip(
        Program(after, {}).module()(*inputs), Program(before, {}).module()(*inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tables_in_sixteen_bits_are_widened(target: Target) -> None:
    text = TWO.replace("%cos: f32", "%cos: f16").replace("%sin: f32", "%sin: f16")
    after = FuseKernels(everywhere=True).run(Graph.parse(text), target, {})
    check_types(after)
    assert after.producers["y"].ref("cos") == "cos.rows.f32"


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        (
            "aten.rms_norm(input=%x, normalized_shape=[24], weight=%w, eps=1e-06)",
            "aten.layer_norm(input=%x, normalized_shape=[24], weight=%w)",
            "%q is a layer norm; intarsia.norm_rope computes RMS norms",
        ),
        (
            "aten.rms_norm(input=%x, normalized_shape=[24], weight=%w, eps=1e-06)",
            "aten.relu(self=%x)",
            "%q is turned without a norm; intarsia.norm_rope norms first",
        ),
        (
            "%sin: f32[1, 5, 1, 4]",
            "%sin: f32[2, 5, 1, 4]",
            "%cos is f32[1, 5, 1, 4], %sin f32[2, 5, 1, 4]; "
            "intarsia.norm_rope takes one row of D/2 entries for each token",
        ),
    ],
)
def test_what_is_almost_the_pattern_is_refused_with_the_reason(
    found: str, instead: str, reason: str, target: Target
) -> None:
    assert FuseKernels().refusals(Graph.parse(TWO.replace(found, instead)), target)["q.flat"] == reason


def test_pairs_that_do_not_come_from_their_own_token_are_refused(target: Target) -> None:
    text = TWO.replace("5, 3, 4", "15, 1, 4").replace("5, 3, 8", "15, 1, 8")
    text = text.replace("%cos: f32[1, 5", "%cos: f32[1, 15").replace("%sin: f32[1, 5", "%sin: f32[1, 15")
    assert "turns (B, N, heads, D), every head alike" in FuseKernels().refusals(Graph.parse(text), target)["q.flat"]


def test_a_norm_that_is_also_an_output_is_not_computed_twice(target: Target) -> None:
    graph = Graph.parse(TWO.replace("return %y, %z", "return %y, %z, %q"))
    assert FuseKernels().refusals(graph, target) == {"q.flat": "%q, inside the pattern, is used elsewhere too"}


def test_a_norm_of_each_head_is_refused(target: Target) -> None:
    text = TURNED.replace("5, 24]", "5, 3, 8]").replace("5, 12", "5, 3, 4").replace("shape=[24]", "shape=[8]")
    assert FuseKernels().refusals(Graph.parse(text), target) == {
        "y": "%q norms each head's [8] alone; intarsia.norm_rope norms all heads of a token together"
    }


def test_tables_that_differ_from_head_to_head_are_refused(target: Target) -> None:
    assert FuseKernels().refusals(Graph.parse(TURNED), target) == {
        "y": "%cos is f32[2, 5, 24], and %y f32[2, 5, 24]; intarsia.norm_rope turns (B, N, heads, D), every head alike"
    }


def test_turning_a_part_of_the_tokens_is_refused(target: Target) -> None:
    head, tail = TURNED.split("  %pairs:")
    part = "  %part: f32[2, 5, 24] = aten.slice.Tensor(self=%q, dim=1, start=0, end=5)\n  %pairs:"
    graph = Graph.parse(head + part + tail.replace("self=%q,", "self=%part,"))
    assert FuseKernels().refusals(graph, target) == {
        "y": "only a part of %q is turned; intarsia.norm_rope turns all tokens"
    }
