"""Graphs run eagerly, and PyTorch's fake kernels say whether the declared types are true."""

from __future__ import annotations

import pytest
import torch

from intarsia.ir.errors import InvalidGraph, Unsupported
from intarsia.ir.execute import check_types, evaluate_nodes, to_module
from intarsia.ir.graph import Graph

MLP = """\
graph mlp {
  size N in [1, 64]
  input %x: f32[N, 8]
  param %w: f32[4, 8]
  %linear: f32[N, 4] = aten.linear(input=%x, weight=%w, bias=None)
  %parts.0: f32[N, 2], %parts.1: f32[N, 2] = aten.split.Tensor(self=%linear, split_size=2, dim=1)
  %joined: f32[N, 4] = aten.cat(tensors=[%parts.1, %parts.0], dim=1)
  %half: f16[N, 4] = aten.to.dtype(self=%joined, dtype=torch.float16)
  return %half, %x
}
"""


def test_a_graph_computes_what_its_operators_compute() -> None:
    weight, x = torch.randn(4, 8), torch.randn(3, 8)
    half, same = to_module(Graph.parse(MLP), {"w": weight})(x)
    expected = torch.nn.functional.linear(x, weight)
    assert torch.equal(half, torch.cat([expected[:, 2:], expected[:, :2]], 1).half())
    assert torch.equal(same, x)


def test_nodes_are_evaluated_without_gradients_on_top_of_given_values() -> None:
    graph = Graph.parse(MLP)
    weight = torch.randn(4, 8, requires_grad=True)
    values = evaluate_nodes(graph.nodes[:2], {"x": torch.ones(1, 8), "w": weight})
    assert set(values) == {"x", "w", "linear", "parts.0", "parts.1"}
    assert not values["linear"].requires_grad


@pytest.mark.parametrize("name", ["self", "forward", "class", "torch", "param_0", "a.b", "x y", "0", "_", "print"])
def test_an_input_may_be_called_anything(name: str) -> None:
    printed = name if all(c.isalnum() or c in "._" for c in name) else f'"{name}"'
    graph = Graph.parse(MLP.replace("%x", f"%{printed}"))
    weight, x = torch.randn(4, 8), torch.randn(3, 8)
    assert torch.equal(to_module(graph, {"w": weight})(x)[1], x)


def test_sizes_are_values_that_nodes_compute_with() -> None:
    graph = Graph.parse("""\
graph g {
  size N in [1, inf]
  input %x: f32[N, 2]
  %n: int = aten.sym_size.int(self=%x, dim=0)
  %twice: int = operator.mul(arg0=%n, arg1=2)
  %y: f32[2*N] = aten.view(self=%x, size=[%twice])
  return %y
}
""")
    check_types(graph)
    assert to_module(graph, {})(torch.ones(5, 2))[0].shape == (10,)


def test_true_types_pass() -> None:
    check_types(Graph.parse(MLP))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("%linear: f32[N, 4]", "%linear: f32[N, 5]", "%linear: declared f32[N, 5], aten.linear gives f32[3, 4]"),
        ("%linear: f32[N, 4]", "%linear: f32[3, 4]", "%linear: declared f32[3, 4], aten.linear gives f32[5, 4]"),
        (
            "%linear: f32[N, 4]",
            "%linear: f32[N + 1, 4]",
            "%linear: declared f32[N + 1, 4], aten.linear gives f32[3, 4]",
        ),
        ("%linear: f32[N, 4]", "%linear: bf16[N, 4]", "%linear: declared bf16[N, 4], aten.linear gives f32[3, 4]"),
        ("%linear: f32[N, 4]", "%linear: int", "%linear: declared int, aten.linear gives f32[3, 4]"),
        ("%w: f32[4, 8]", "%w: f32[4, 9]", "%linear: aten.linear does not accept its arguments: "),
        ("dim=1)\n  %joined", "dim=7)\n  %joined", "%parts.0: aten.split.Tensor does not accept its arguments: "),
        ("split_size=2, ", "", "%parts.0: aten.split.Tensor does not accept its arguments: "),
        ("split_size=2", "split_size=1", "%parts.0: aten.split.Tensor gives 4 values, the node names 2"),
    ],
)
def test_a_declared_type_that_is_not_true_is_told_with_both(old: str, new: str, message: str) -> None:
    assert old in MLP
    with pytest.raises(InvalidGraph) as caught:
        check_types(Graph.parse(MLP.replace(old, new, 1)))
    assert str(caught.value).startswith(message)


def test_two_sizes_are_never_taken_for_each_other() -> None:
    swapped = """\
graph g {
  size M in [1, 64]
  size N in [1, 64]
  input %x: f32[N, M]
  %y: f32[N, M] = aten.t(self=%x)
  return %y
}
"""
    with pytest.raises(InvalidGraph, match=r"%y: declared f32\[N, M\], aten\.t gives"):
        check_types(Graph.parse(swapped))


def test_an_operator_that_nobody_registered_is_told_with_what_to_do() -> None:
    graph = Graph.parse(MLP.replace("aten.linear", "their_library.linear"))
    message = r"operator their_library\.linear is not registered with PyTorch; import the library that defines it"
    with pytest.raises(Unsupported, match=message):
        check_types(graph)
    with pytest.raises(Unsupported, match=message):
        to_module(graph, {"w": torch.zeros(4, 8)})
