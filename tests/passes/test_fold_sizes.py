from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.passes.fold_sizes import FoldSizes


def test_numbers_replace_sizes_that_the_types_know(target: Target) -> None:
    graph = Graph.parse("""graph g {
  size N in [2, 64]
  input %x: f32[N, 4]
  input %y: f32[N, 8]
  %a: int = aten.sym_size.int(self=%x, dim=0)
  %b: int = aten.sym_size.int(self=%y, dim=0)
  %c: int = aten.sym_size.int(self=%x, dim=1)
  %d: int = operator.mul(arg0=%c, arg1=2)
  %z: f32[N, 8] = aten.expand(self=%y, size=[%b, %d])
  return %z
}
""")
    assert (
        str(FoldSizes().run(graph, target, {}))
        == """graph g {
  size N in [2, 64]
  input %x: f32[N, 4]
  input %y: f32[N, 8]
  %a: int = aten.sym_size.int(self=%x, dim=0)
  %z: f32[N, 8] = aten.expand(self=%y, size=[%a, 8])
  return %z
}
"""
    )


def test_arithmetic_with_an_unknown_size_stays(target: Target) -> None:
    graph = Graph.parse("""graph g {
  size N in [2, 64]
  input %x: f32[N, 4]
  %a: int = aten.sym_size.int(self=%x, dim=0)
  %b: int = operator.floordiv(arg0=%a, arg1=2)
  %z: f32[2*(N//2)] = aten.arange(end=%b)
  return %z
}
""")
    assert FoldSizes().run(graph, target, {}) is graph


def test_sizes_of_other_expressions_are_not_merged(target: Target) -> None:
    graph = Graph.parse("""graph g {
  size N in [2, 64]
  input %x: f32[N, 2*N]
  %a: int = aten.sym_size.int(self=%x, dim=0)
  %b: int = aten.sym_size.int(self=%x, dim=1)
  %y: f32[N, 2*N] = aten.view(self=%x, size=[%a, %b])
  return %y
}
""")
    assert FoldSizes().run(graph, target, {}) is graph
