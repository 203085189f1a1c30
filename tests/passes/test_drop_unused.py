from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.passes.drop_unused import DropUnused


def test_drops_calls_and_parameters_that_no_output_needs(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[4]
  param %w: f32[4]
  param %v: f32[4]
  %a: f32[4] = aten.mul.Tensor(self=%x, other=%w)
  %b: f32[4] = aten.mul.Tensor(self=%a, other=%v)
  return %a
}
""")
    assert (
        str(DropUnused().run(graph, target, {}))
        == """graph g {
  input %x: f32[4]
  param %w: f32[4]
  %a: f32[4] = aten.mul.Tensor(self=%x, other=%w)
  return %a
}
"""
    )


def test_keeps_inputs_that_nothing_uses(target: Target) -> None:
    graph = Graph.parse("graph g {\n  input %x: f32[4]\n  input %y: f32[4]\n  return %x\n}\n")
    assert DropUnused().run(graph, target, {}) is graph
