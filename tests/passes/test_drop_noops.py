import pytest

from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.passes.drop_noops import DropNoops

HEAD = """graph g {
  size N in [2, 64]
  input %x: f32[N, 4]
  input %i: i64[N, 4]
  param %w: f32[4, 4]
  %rows: f32[N, 4] = aten.linear(input=%x, weight=%w, bias=None)
"""


def graph_with(line: str, name: str = "y") -> Graph:
    return Graph.parse(f"{HEAD}  {line}\n  return %{name}\n}}\n")


def dropped(line: str, target: Target) -> bool:
    changed = DropNoops().run(graph_with(line), target, {})
    assert len(changed.nodes) in (1, 2)
    return len(changed.nodes) == 1


@pytest.mark.parametrize(
    "line",
    [
        "%y: f32[N, 4] = aten.alias(self=%x)",
        "%y: f32[N, 4] = aten.detach(self=%x)",
        "%y: f32[N, 4] = aten.type_as(self=%x, other=%rows)",
        "%y: f32[N, 4] = aten.to.dtype(self=%x, dtype=torch.float32)",
        "%y: f32[N, 4] = aten._to_copy(self=%rows, dtype=torch.float32)",
        "%y: f32[N, 4] = aten.clone(self=%rows)",
        "%y: f32[N, 4] = aten.clone(self=%rows, memory_format=torch.contiguous_format)",
        "%y: f32[N, 4] = aten.contiguous(self=%rows)",
        "%y: f32[N, 4] = aten.dropout(input=%x, p=0.5, train=False)",
        "%y: f32[N, 4] = aten.dropout(input=%x, p=0.0, train=True)",
        "%y: f32[N, 4] = aten.expand(self=%x, size=[-1, 4])",
        "%y: f32[N, 4] = aten.view(self=%x, size=[-1, 4])",
        "%y: f32[N, 4] = aten.reshape(self=%x, shape=[-1, 4])",
        "%y: f32[N, 4] = aten.squeeze.dim(self=%x, dim=0)",
        "%y: f32[N, 4] = aten.slice.Tensor(self=%x, dim=0, start=0, end=9223372036854775807)",
        "%y: f32[N, 4] = aten.permute(self=%x, dims=[0, 1])",
        "%y: f32[N, 4] = aten.transpose.int(self=%x, dim0=1, dim1=1)",
    ],
)
def test_drops_what_gives_back_its_input(line: str, target: Target) -> None:
    assert dropped(line, target)


@pytest.mark.parametrize(
    "line",
    [
        "%y: f32[N, 4] = aten.relu(self=%x)",
        "%y: f16[N, 4] = aten.to.dtype(self=%x, dtype=torch.float16)",
        "%y: f32[N, 4] = aten.to.dtype(self=%i, dtype=torch.float32)",
        "%y: f32[N, 4] = aten.to.dtype(self=%x, dtype=torch.float32, copy=True)",
        "%y: f32[N, 4] = aten.to.dtype(self=%x, dtype=torch.float32, memory_format=torch.contiguous_format)",
        "%y: f32[N, 4] = aten.dropout(input=%x, p=0.5, train=True)",
        "%y: f32[2, N, 4] = aten.expand(self=%x, size=[2, -1, 4])",
        "%y: f32[4, N] = aten.permute(self=%x, dims=[1, 0])",
    ],
)
def test_keeps_what_changes_values_or_types(line: str, target: Target) -> None:
    assert not dropped(line, target)


@pytest.mark.parametrize(
    "line",
    [
        "%y: f32[N, 4] = aten.clone(self=%x)",
        "%y: f32[N, 4] = aten.clone(self=%x, memory_format=torch.contiguous_format)",
        "%y: f32[N, 4] = aten.clone(self=%rows, memory_format=torch.channels_last)",
        "%y: f32[N, 4] = aten.contiguous(self=%x)",
        "%y: f32[N, 4] = aten._to_copy(self=%x, dtype=torch.float32)",
    ],
)
def test_keeps_copies_of_what_may_lie_otherwise(line: str, target: Target) -> None:
    assert not dropped(line, target)


def test_users_and_outputs_name_what_the_noop_was_given(target: Target) -> None:
    graph = graph_with("%a: f32[N, 4] = aten.alias(self=%rows)\n  %y: f32[N, 4] = aten.detach(self=%a)")
    changed = DropNoops().run(graph, target, {})
    assert changed.outputs == ("rows",)
    assert [node.name for node in changed.nodes] == ["rows"]


def test_a_square_transpose_is_no_noop(target: Target) -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[4, 4]
  %y: f32[4, 4] = aten.transpose.int(self=%x, dim0=0, dim1=1)
  %z: f32[4, 4] = aten.permute(self=%y, dims=[1, 0])
  return %z
}
""")
    assert DropNoops().run(graph, target, {}) is graph
