from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.backends.sharing import share_weights
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, meta_weights


def program(**weights: Tensor) -> Program:
    """Multiplies x (4,) with every weight (4,), one after the other."""
    lines, last = [], "x"
    for name in weights:
        lines.append(f"%by.{name}: f32[4] = aten.mul.Tensor(self=%{last}, other=%{name})")
        last = f"by.{name}"
    params = [f"param %{name}: f32[4]" for name in weights]
    text = ["graph product {", "input %x: f32[4]", *params, *lines, f"return %{last}", "}"]
    return Program(Graph.parse("\n".join(text)), weights)


ONE, TWO, THREE = (torch.full((4,), float(number)) for number in (1, 2, 3))


def answers(made: Program) -> list[float]:
    answer: list[float] = made.module()(torch.ones(4))[0].tolist()
    return answer


def test_a_weight_with_the_same_bits_keeps_its_name_and_is_the_same_tensor() -> None:
    shared = share_weights({0: program(scale=TWO), 1: program(scale=TWO.clone(), bias=THREE)})
    assert shared[1].weights["scale"] is shared[0].weights["scale"]
    assert set(shared[1].weights) == {"scale", "bias"}


def test_a_weight_with_other_bits_gets_a_name_of_its_own_and_the_answer_stays() -> None:
    given = {0: program(scale=TWO), 1: program(scale=THREE, bias=TWO)}
    shared = share_weights(given)
    assert [value.name for value in shared[1].graph.params] == ["scale.phase1", "bias"]
    assert {phase: answers(one) for phase, one in shared.items()} == {p: answers(one) for p, one in given.items()}


def test_a_third_program_takes_the_name_of_the_one_that_has_its_bits() -> None:
    shared = share_weights({0: program(w=ONE), 2: program(w=TWO), 5: program(w=TWO.clone()), 6: program(w=ONE)})
    assert [list(one.weights) for one in shared.values()] == [["w"], ["w.phase2"], ["w.phase2"], ["w"]]


def test_a_name_that_is_taken_in_any_program_is_not_given_to_another_weight() -> None:
    taken = {"w": ONE, "w.phase1": TWO}
    shared = share_weights({0: program(**taken), 1: program(w=THREE)})
    assert list(shared[1].weights) == ["w.phase1_"]
    shared = share_weights({0: program(w=ONE), 1: program(w=TWO), 2: program(**{"w": TWO, "w.phase1": THREE})})
    held: dict[str, Tensor] = {}
    for one in shared.values():
        for name, tensor in one.weights.items():
            assert torch.equal(held.setdefault(name, tensor), tensor)


def test_zeros_of_different_sign_are_different_bits() -> None:
    shared = share_weights({0: program(w=torch.zeros(4)), 1: program(w=-torch.zeros(4))})
    assert list(shared[1].weights) == ["w.phase1"]


def test_weights_without_memory_cannot_be_compared() -> None:
    graph = program(w=ONE).graph
    with pytest.raises(UsageError, match="on the meta device"):
        share_weights({0: Program(graph, meta_weights(graph.params))})
