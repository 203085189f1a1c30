from __future__ import annotations

import pytest
import torch

from intarsia.backends import agreement
from intarsia.backends.onnx_fusion import fuse
from intarsia.ir.execute import check_types
from intarsia.ir.graph import Arg, Graph, Ref
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.verify import verify

ROPE = """graph rope {
  input %x: f32[2, 6, 32]
  param %cos: f32[1, 6, 1, 4]
  param %sin: f32[1, 6, 1, 4]
  %pairs: f32[2, 6, 4, 4, 2] = aten.view(self=%x, size=[2, 6, 4, 4, 2])
  %even: f32[2, 6, 4, 4], %odd: f32[2, 6, 4, 4] = aten.unbind.int(self=%pairs, dim=-1)
  %a: f32[2, 6, 4, 4] = aten.mul.Tensor(self=%even, other=%cos)
  %b: f32[2, 6, 4, 4] = aten.mul.Tensor(self=%odd, other=%sin)
  %left: f32[2, 6, 4, 4] = aten.sub.Tensor(self=%a, other=%b)
  %c: f32[2, 6, 4, 4] = aten.mul.Tensor(self=%even, other=%sin)
  %d: f32[2, 6, 4, 4] = aten.mul.Tensor(self=%odd, other=%cos)
  %right: f32[2, 6, 4, 4] = aten.add.Tensor(self=%c, other=%d)
  %both: f32[2, 6, 4, 4, 2] = aten.stack(tensors=[%left, %right], dim=4)
  %turned: f32[2, 6, 4, 8] = aten.flatten.using_ints(self=%both, start_dim=3, end_dim=4)
  return %turned
}
"""

FUSED_ROPE = """graph rope {
  input %x: f32[2, 6, 32]
  param %cos: f32[1, 6, 1, 4]
  param %sin: f32[1, 6, 1, 4]
  %cos.by_position: f32[6, 4] = aten.squeeze.dims(self=%cos, dim=[0, 2])
  %sin.by_position: f32[6, 4] = aten.squeeze.dims(self=%sin, dim=[0, 2])
  %"positions[2, 6]": i64[2, 6] = intarsia_onnx.positions(input=%x)
  %turned: f32[2, 6, 4, 8] = intarsia_onnx.rotary(input=%x, heads=4, cos=%cos.by_position, sin=%sin.by_position, \
positions=%"positions[2, 6]")
  return %turned
}
"""

ATTENTION = """graph attention {
  size N in [2, 64]
  input %q: f32[2, N, 4, 8]
  input %k: f32[2, 3, 4, 8]
  input %v: f32[2, 3, 4, 8]
  %qt: f32[2, 4, N, 8] = aten.permute(self=%q, dims=[0, 2, 1, 3])
  %kt: f32[2, 4, 3, 8] = aten.transpose.int(self=%k, dim0=1, dim1=2)
  %vt: f32[2, 4, 3, 8] = aten.permute(self=%v, dims=[0, 2, 1, 3])
  %s: f32[2, 4, N, 8] = aten.scaled_dot_product_attention(query=%qt, key=%kt, value=%vt)
  %y: f32[2, N, 4, 8] = aten.permute(self=%s, dims=[0, 2, 1, 3])
  return %y
}
"""

FUSED_ATTENTION = """graph attention {
  size N in [2, 64]
  input %q: f32[2, N, 4, 8]
  input %k: f32[2, 3, 4, 8]
  input %v: f32[2, 3, 4, 8]
  %y: f32[2, N, 4, 8] = intarsia_onnx.attention(query=%q, key=%k, value=%v, is_causal=False, scale=None)
  return %y
}
"""


def run(graph: Graph) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    weights = {p.name: torch.randn(p.type.shape, generator=generator) for p in graph.params}
    return tuple(Program(graph, weights).module()(*example_inputs(graph)))


@pytest.mark.parametrize(("pieces", "whole"), [(ROPE, FUSED_ROPE), (ATTENTION, FUSED_ATTENTION)])
def test_makes_pieces_whole_with_the_same_answer(pieces: str, whole: str) -> None:
    graph = Graph.parse(pieces)
    fused = fuse(graph)
    assert str(fused) == whole
    verify(fused)
    check_types(fused)
    assert agreement.error(run(fused), run(graph)) < 1e-6


def test_layers_share_tables_and_positions() -> None:
    second = ROPE[ROPE.index("  %pairs") : ROPE.index("  return")]
    for name in ("pairs", "even", "odd", "a", "b", "c", "d", "left", "right", "both", "turned"):
        second = second.replace(f"%{name}:", f"%{name}2:").replace(f"%{name},", f"%{name}2,")
        second = second.replace(f"%{name})", f"%{name}2)").replace(f"%{name}]", f"%{name}2]")
    text = ROPE.replace("  return %turned", f"{second}  return %turned, %turned2")
    fused = fuse(Graph.parse(text))
    assert [node.op for node in fused.nodes] == [
        "aten.squeeze.dims",
        "aten.squeeze.dims",
        "intarsia_onnx.positions",
        "intarsia_onnx.rotary",
        "intarsia_onnx.rotary",
    ]
    assert agreement.error(run(fused), run(Graph.parse(text))) < 1e-6


@pytest.mark.parametrize(
    ("old", "fresh"),
    [
        ("aten.sub.Tensor(self=%a, other=%b)", "aten.sub.Tensor(self=%b, other=%a)"),
        ("aten.sub.Tensor(self=%a, other=%b)", "aten.sub.Tensor(self=%a, other=%b, alpha=2)"),
        ("aten.add.Tensor(self=%c, other=%d)", "aten.add.Tensor(self=%c, other=%a)"),
        ("aten.stack(tensors=[%left, %right]", "aten.stack(tensors=[%right, %left]"),
        ("f32[1, 6, 1, 4]", "f32[2, 6, 1, 4]"),
        ("f32[1, 6, 1, 4]", "f32[1, 1, 1, 4]"),
        ("self=%even, other=%sin", "self=%odd, other=%sin"),
    ],
)
def test_leaves_what_only_looks_like_a_rotation(old: str, fresh: str) -> None:
    assert old in ROPE
    graph = Graph.parse(ROPE.replace(old, fresh))
    assert not any(node.op.startswith("intarsia_onnx") for node in fuse(graph).nodes)


@pytest.mark.parametrize(
    ("old", "fresh"),
    [
        ("value=%vt)", "value=%vt, dropout_p=0.5)"),
        ("value=%vt)", "value=%vt, enable_gqa=True)"),
        ("return %y", "return %y, %s"),
        ("dim0=1, dim1=2", "dim0=1, dim1=3"),
        (
            "%vt: f32[2, 4, 3, 8] = aten.permute(self=%v, dims=[0, 2, 1, 3])",
            "%vt: f32[2, 4, 3, 8] = aten.relu(self=%v)",
        ),
    ],
)
def test_leaves_attention_that_onnx_would_compute_otherwise(old: str, fresh: str) -> None:
    assert old in ATTENTION
    graph = Graph.parse(ATTENTION.replace(old, fresh))
    assert fuse(graph) is graph


@pytest.mark.parametrize(
    ("op", "given", "kept"),
    [
        ("aten.scaled_dot_product_attention", "attn_mask=%m", {"mask": Ref("m")}),
        ("intarsia.attention", "lengths=%n, scale=None", {"lengths": Ref("n")}),
    ],
)
def test_keeps_masks_and_lengths(op: str, given: str, kept: dict[str, Arg]) -> None:
    text = ATTENTION.replace("aten.scaled_dot_product_attention(", f"{op}(").replace(
        "value=%vt)", f"value=%vt, {given})"
    )
    text = text.replace("  input %k", "  input %m: f32[2, 1, 1, 3]\n  input %n: i64[2]\n  input %k")
    graph = Graph.parse(text)
    (node,) = fuse(graph).nodes
    assert {key: node.args[key] for key in kept} == kept
    inputs = [
        torch.tensor([1, 3]) if value.name == "n" else given
        for value, given in zip(graph.inputs, example_inputs(graph), strict=True)
    ]
    assert agreement.error(Program(fuse(graph), {}).module()(*inputs), Program(graph, {}).module()(*inputs)) < 1e-6


def test_keeps_causality_and_scale() -> None:
    text = ATTENTION.replace("value=%vt)", "value=%vt, is_causal=True, scale=0.25)")
    (node,) = fuse(Graph.parse(text)).nodes
    assert node.args["is_causal"] is True
    assert node.args["scale"] == 0.25
    assert agreement.error(run(fuse(Graph.parse(text))), run(Graph.parse(text))) < 1e-6
