from collections.abc import Callable

import torch

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.passes.drop_unused import DropUnused
from intarsia.passes.merge_views import MergeViews

ATTENTION = """graph g {
  input %x: f32[1, 6, 32]
  param %w: f32[32, 32]
  %rows: f32[1, 6, 32] = aten.linear(input=%x, weight=%w, bias=None)
  %heads: f32[1, 6, 4, 8] = aten.view(self=%rows, size=[1, 6, 4, 8])
  %q: f32[1, 4, 6, 8] = aten.permute(self=%heads, dims=[0, 2, 1, 3])
  %attention: f32[1, 4, 6, 8] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  %back: f32[1, 6, 4, 8] = aten.permute(self=%attention, dims=[0, 2, 1, 3])
  %copy: f32[1, 6, 4, 8] = aten.clone(self=%back, memory_format=torch.contiguous_format)
  %y: f32[1, 6, 32] = aten._unsafe_view(self=%copy, size=[1, 6, 32])
  return %y
}
"""


def test_a_view_of_a_view_looks_at_the_first_ones_input(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[8, 6]
  %a: f32[2, 4, 6] = aten.view(self=%x, size=[2, 4, 6])
  %b: f32[2, 1, 4, 6] = aten.unsqueeze(self=%a, dim=1)
  %c: f32[48] = aten.view(self=%b, size=[-1])
  return %c
}
""")
    assert (
        str(DropUnused().run(MergeViews().run(graph, target, {}), target, {}))
        == """graph g {
  input %x: f32[8, 6]
  %c: f32[48] = aten.view(self=%x, size=[-1])
  return %c
}
"""
    )


def test_a_copy_for_a_view_after_attention_becomes_a_reshape(
    target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    program = with_weights(Graph.parse(ATTENTION))
    changed = DropUnused().run(MergeViews().run(program.graph, target, {}), target, {})
    assert [node.op for node in changed.nodes[-2:]] == ["aten.permute", "aten.reshape"]
    inputs = example_inputs(changed)
    assert torch.equal(program.module()(*inputs)[0], Program(changed, program.weights).module()(*inputs)[0])


def test_a_copy_that_a_reshape_would_not_make_stays(target: Target) -> None:
    text = ATTENTION.replace("%y: f32[1, 6, 32]", "%y: f32[1, 6, 4, 4, 2]").replace(
        "%copy, size=[1, 6, 32]", "%copy, size=[1, 6, 4, 4, 2]"
    )
    graph = Graph.parse(text)
    assert MergeViews().run(graph, target, {}) is graph


def test_a_copy_of_what_may_lie_in_any_way_stays(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[4, 6]
  %p: f32[6, 4] = aten.permute(self=%x, dims=[1, 0])
  %c: f32[6, 4] = aten.clone(self=%p, memory_format=torch.contiguous_format)
  %y: f32[24] = aten.view(self=%c, size=[24])
  return %y
}
""")
    assert MergeViews().run(graph, target, {}) is graph


def test_a_view_that_only_works_where_it_was_traced_becomes_a_reshape(target: Target) -> None:
    lines = ATTENTION.replace("%copy, size", "%back, size").splitlines(keepends=True)
    graph = Graph.parse("".join(line for line in lines if "%copy:" not in line))
    assert MergeViews().run(graph, target, {}).nodes[-1].op == "aten.reshape"
