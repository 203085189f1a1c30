import pytest

from intarsia.ir.graph import Graph
from intarsia.ir.rotation import Rotation

ROPE = """graph rope {
  input %x: f32[2, 5, 24]
  input %cos: f32[1, 5, 1, 4]
  input %sin: f32[1, 5, 1, 4]
  %pairs: f32[2, 5, 3, 4, 2] = aten.view(self=%x, size=[2, 5, 3, 4, 2])
  %even: f32[2, 5, 3, 4], %odd: f32[2, 5, 3, 4] = aten.unbind.int(self=%pairs, dim=-1)
  %a: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%even, other=%cos)
  %b: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%odd, other=%sin)
  %first: f32[2, 5, 3, 4] = aten.sub.Tensor(self=%a, other=%b)
  %c: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%even, other=%sin)
  %d: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%odd, other=%cos)
  %second: f32[2, 5, 3, 4] = aten.add.Tensor(self=%c, other=%d)
  %stack: f32[2, 5, 3, 4, 2] = aten.stack(tensors=[%first, %second], dim=-1)
  %y: f32[2, 5, 3, 8] = aten.flatten.using_ints(self=%stack, start_dim=3, end_dim=4)
  return %y
}
"""


def rotation(text: str) -> Rotation | None:
    graph = Graph.parse(text)
    return Rotation.ending_at(graph.producers["y"], graph)


def test_a_rotation_is_known_by_what_it_reads() -> None:
    assert rotation(ROPE) == Rotation("x", "cos", "sin")


def test_the_order_of_the_last_sum_makes_no_difference() -> None:
    assert rotation(ROPE.replace("self=%c, other=%d", "self=%d, other=%c")) == Rotation("x", "cos", "sin")


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("aten.sub.Tensor(self=%a, other=%b)", "aten.sub.Tensor(self=%b, other=%a)"),  # mirrored
        ("aten.add.Tensor(self=%c, other=%d)", "aten.sub.Tensor(self=%c, other=%d)"),
        ("%c: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%even", "%c: f32[2, 5, 3, 4] = aten.mul.Tensor(self=%odd"),
        ("tensors=[%first, %second]", "tensors=[%second, %first]"),
        ("%even: f32[2, 5, 3, 4], %odd: f32", "%odd: f32[2, 5, 3, 4], %even: f32"),
        ("aten.unbind.int(self=%pairs, dim=-1)", "aten.unbind.int(self=%pairs, dim=0)"),
    ],
)
def test_what_turns_otherwise_is_no_rotation(found: str, instead: str) -> None:
    assert rotation(ROPE.replace(found, instead)) is None
