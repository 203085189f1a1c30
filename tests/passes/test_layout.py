"""The analysis is right when what it says lies by rows does, whatever the extents."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.ir.execute import evaluate_nodes
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.passes.layout import is_contiguous, layouts, reshape_gives_rows

GOLDEN = Path(__file__).parent.parent / "golden"


def known(*lines: str) -> dict[str, frozenset[tuple[int, ...]]]:
    head = "graph g {\n  input %x: f32[2, 3, 4]\n  param %w: f32[4, 4]\n"
    head += "  %rows: f32[2, 3, 4] = aten.linear(input=%x, weight=%w, bias=None)\n"
    return dict(layouts(Graph.parse(head + "".join(f"  {line}\n" for line in lines) + "  return %rows\n}\n")))


def test_inputs_and_parameters_are_unknown() -> None:
    assert known().keys() == {"rows"}


def test_a_linear_layer_lies_by_rows_and_elementwise_functions_follow() -> None:
    found = known("%a: f32[2, 3, 4] = aten.gelu(self=%rows)", "%b: f32[2, 3, 4] = aten.gelu(self=%x)")
    assert is_contiguous("a", found)
    assert "b" not in found


def test_both_operands_must_lie_by_rows() -> None:
    found = known(
        "%a: f32[2, 3, 4] = aten.add.Tensor(self=%rows, other=1)",
        "%b: f32[2, 3, 4] = aten.add.Tensor(self=%a, other=%rows)",
        "%c: f32[2, 3, 4] = aten.add.Tensor(self=%a, other=%x)",
    )
    assert is_contiguous("a", found)
    assert is_contiguous("b", found)
    assert "c" not in found


def test_a_permutation_is_tracked_through_copies_that_preserve() -> None:
    found = known(
        "%p: f32[3, 4, 2] = aten.permute(self=%rows, dims=[1, 2, 0])",
        "%q: f32[3, 4, 2] = aten.clone(self=%p)",
        "%r: f32[3, 4, 2] = aten.clone(self=%p, memory_format=torch.contiguous_format)",
    )
    assert found["q"] == {(2, 0, 1)}
    assert not is_contiguous("q", found)
    assert is_contiguous("r", found)


def test_a_slice_may_have_gaps() -> None:
    assert "s" not in known("%s: f32[2, 3, 2] = aten.slice.Tensor(self=%rows, dim=2, start=0, end=2)")


def test_stacking_is_by_rows_only_along_the_last_axis() -> None:
    found = known(
        "%a: f32[2, 3, 4, 2] = aten.stack(tensors=[%rows, %rows], dim=3)",
        "%b: f32[2, 2, 3, 4] = aten.stack(tensors=[%rows, %rows], dim=0)",
    )
    assert "a" in found
    assert "b" not in found


@given(
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    data=st.data(),
)
def test_reshape_gives_rows_whenever_the_proof_says_so(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    first = data.draw(st.integers(0, len(shape) - 1))
    last = data.draw(st.integers(first, len(shape) - 1))
    tensor = torch.empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
    assert list(tensor.shape) == shape
    target = tensor.flatten(first, last).shape
    if reshape_gives_rows(frozenset({tuple(order)}), shape, target):
        assert tensor.reshape(target).is_contiguous()


@given(batch=st.integers(1, 3), tokens=st.integers(1, 3))
def test_a_proof_with_named_sizes_holds_when_they_are_one(batch: int, tokens: int) -> None:
    orders = frozenset({(0, 1, 2, 3), (0, 2, 1, 3)})
    assert reshape_gives_rows(orders, ("batch", "tokens", 4, 8), ("batch", "tokens", 32))
    for tensor in (torch.empty(batch, tokens, 4, 8), torch.empty(batch, 4, tokens, 8).transpose(1, 2)):
        assert tensor.reshape(batch, tokens, 32).is_contiguous()


@pytest.mark.parametrize("name", ["wan-block-bf16", "wan-block-dynamic"])
def test_everything_it_says_of_a_real_trace_is_so(name: str, with_weights: Callable[[Graph], Program]) -> None:
    program = with_weights(Graph.parse((GOLDEN / f"{name}.traced.graph").read_text()))
    inputs = {
        value.name: tensor for value, tensor in zip(program.graph.inputs, example_inputs(program.graph), strict=True)
    }
    values = evaluate_nodes(program.graph.nodes, {**program.weights, **inputs})
    found = layouts(program.graph)
    assert len(found) > 50
    for name_, orders in found.items():
        tensor = values[name_]
        assert any(tensor.permute(order).is_contiguous() for order in orders), name_
