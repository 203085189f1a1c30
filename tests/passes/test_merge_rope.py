from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.drop_unused import DropUnused
from intarsia.passes.merge_rope import MergeRope

MACHINE = Target("null", "a machine for tests", "null", "none", {"f32": 1e9}, 1e9, 10**9, 0.0)
END = 9223372036854775807

ROPE = f"""graph rope {{
  input %x: f32[4, 8]
  input %even: f32[4, 4]
  input %odd: f32[4, 4]
  param %w: f32[8, 8]
  %rows: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=None)
  %e: f32[4, 8] = aten.empty_like(self=%rows)
  %l: f32[4, 4] = aten.slice.Tensor(self=%e, dim=1, start=0, end={END}, step=2)
  %c: f32[4, 4] = aten.copy(self=%l, src=%even)
  %s: f32[4, 8] = aten.slice_scatter(self=%e, src=%c, dim=1, start=0, end={END}, step=2)
  %y: f32[4, 8] = aten.slice_scatter(self=%s, src=%odd, dim=1, start=1, end={END}, step=2)
  return %y
}}
"""


def merged(text: str, target: Target) -> Graph:
    return DropUnused().run(MergeRope().run(Graph.parse(text), target, {}), target, {})


def test_a_covering_chain_becomes_stack_and_flatten(target: Target) -> None:
    assert (
        str(merged(ROPE, target))
        == """graph rope {
  input %x: f32[4, 8]
  input %even: f32[4, 4]
  input %odd: f32[4, 4]
  %y.stack: f32[4, 4, 2] = aten.stack(tensors=[%even, %odd], dim=2)
  %y: f32[4, 8] = aten.flatten.using_ints(self=%y.stack, start_dim=1, end_dim=2)
  return %y
}
"""
    )


def test_values_of_another_element_type_are_cast_after_the_flatten(target: Target) -> None:
    text = ROPE.replace("input %even: f32", "input %even: f64").replace("input %odd: f32", "input %odd: f64")
    text = text.replace("  %y:", "  %d: f32[4, 4] = aten.copy(self=%l, src=%odd)\n  %y:").replace(
        "src=%odd, d", "src=%d, d"
    )
    assert [str(node.op) for node in merged(text, target).nodes] == [
        "aten.stack",
        "aten.flatten.using_ints",
        "aten._to_copy",
    ]


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("src=%odd, dim=1, start=1", "src=%odd, dim=1, start=0"),  # offset 1 is never written
        ("src=%odd, dim=1, start=1", "src=%odd, dim=0, start=1"),  # along another axis
        (f"start=1, end={END}", "start=1, end=7"),  # the last one is left out
        ("aten.empty_like(self=%rows)", "aten.empty_like(self=%x)"),  # may lie in any way in memory
    ],
)
def test_a_chain_that_leaves_something_over_stays(found: str, instead: str, target: Target) -> None:
    graph = Graph.parse(ROPE.replace(found, instead))
    assert MergeRope().run(graph, target, {}) is graph


def test_a_chain_over_a_named_extent_is_merged(target: Target) -> None:
    text = ROPE.replace("graph rope {", "graph rope {\n  size N in [1, 64]").replace("f32[4, ", "f32[N, ")
    assert [node.op for node in merged(text, target).nodes] == ["aten.stack", "aten.flatten.using_ints"]


def test_the_chain_stays_where_something_else_uses_it(target: Target) -> None:
    graph = merged(ROPE.replace("return %y", "return %y, %s"), target)
    assert {"e", "s", "y"} <= graph.producers.keys()


@given(step=st.integers(2, 4), axis=st.integers(0, 2), last=st.booleans(), order=st.data())
def test_any_interleaving_gives_the_same_values(step: int, axis: int, last: bool, order: st.DataObject) -> None:
    whole = [2, 3, 2]
    part = list(whole)
    whole[axis] *= step
    starts = order.draw(st.sampled_from(list(permutations(range(step)))))
    lines, base = [], "base"
    for start in starts:
        lines.append(
            f"  %s{start}: f32{whole} = aten.slice_scatter("
            f"self=%{base}, src=%p{start}, dim={axis - 3 if last else axis}, start={start}, step={step})"
        )
        base = f"s{start}"
    inputs = "".join(f"  input %p{i}: f32{part}\n" for i in range(step))
    text = f"graph g {{\n{inputs}  %base: f32{whole} = aten.empty.memory_format(size={whole})\n"
    graph = Graph.parse(text + "\n".join(lines) + f"\n  return %{base}\n}}\n")
    changed = MergeRope().run(graph, MACHINE, {})
    verify(changed)
    assert changed.producers[base].op == "aten.flatten.using_ints"
    parts = [torch.randn(part) for _ in range(step)]
    assert torch.equal(Program(graph, {}).module()(*parts)[0], Program(changed, {}).module()(*parts)[0])


def test_results_are_the_same_to_the_bit(target: Target, with_weights: Callable[[Graph], Program]) -> None:
    program = with_weights(Graph.parse(ROPE))
    inputs = torch.randn(4, 8), torch.randn(4, 4), torch.randn(4, 4)
    changed = Program(MergeRope().run(program.graph, target, {}), program.weights)
    assert torch.equal(program.module()(*inputs)[0], changed.module()(*inputs)[0])
