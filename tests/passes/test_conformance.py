"""Our passes keep their promises, and the check finds passes that do not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from intarsia.ir.graph import Graph, Value
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.program import Program, meta_weights
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import PASSES, Pass, find_pass
from intarsia.passes.conformance import check_pass

GOLDEN = Path(__file__).parent.parent / "golden"

ERRORS = {"cast-floats": 1e-4}
"""Squared errors, relative to the outputs, that passes declare; all others keep every bit."""


KEEPING = sorted(set(PASSES) - {"active-tokens"})
"""Passes that leave the interface as it is; ``test_active_tokens.py`` holds the other one to its promises."""


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("trace", ["wan-block-bf16", "wan-block-dynamic"])
def test_every_pass_keeps_its_promises(
    name: str, trace: str, target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    program = with_weights(Graph.parse((GOLDEN / f"{trace}.traced.graph").read_text()))
    check_pass(find_pass(name), program, target, error=ERRORS.get(name, 0.0))


@pytest.mark.parametrize("name", KEEPING)
def test_every_pass_keeps_its_promises_without_weights(name: str, mlp: Graph, target: Target) -> None:
    check_pass(find_pass(name), Program(mlp, meta_weights(mlp.params)), target)


@dataclass(frozen=True)
class Faulty(Pass):
    name: ClassVar[str] = "faulty"


@dataclass(frozen=True)
class RenamesInput(Faulty):
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, inputs=(Value("z", graph.inputs[0].type), *graph.inputs))


@dataclass(frozen=True)
class AddsWeight(Faulty):
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, params=(*graph.params, Value("fresh", TensorType("f32", (1,)))))


@dataclass(frozen=True)
class BreaksGraph(Faulty):
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, nodes=graph.nodes[1:])


@dataclass(frozen=True)
class BreaksTypes(Faulty):
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, nodes=tuple(replace(n, op=n.op.replace("relu", "sum")) for n in graph.nodes))


@dataclass(frozen=True)
class ChangesResult(Faulty):
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, nodes=tuple(replace(n, op=n.op.replace("relu", "gelu")) for n in graph.nodes))


@dataclass(frozen=True)
class Grows(Faulty):
    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, name=graph.name + "+")


@dataclass(frozen=True)
class OffersOne(Grows):
    def choices(self, graph: Graph, target: Target) -> Choices:
        return {"up": ("keep",)}


@dataclass(frozen=True)
class ChangesByDefault(Faulty):
    def choices(self, graph: Graph, target: Target) -> Choices:
        return {"up": ("keep", "other")}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        return replace(graph, name="changed")


@dataclass(frozen=True)
class ForgetsArgument(Grows):
    rows: int = 1

    def __str__(self) -> str:
        return "faulty"


@pytest.mark.parametrize(
    ("pass_", "sentence"),
    [
        (RenamesInput(), "changes the inputs"),
        (AddsWeight(), "adds or changes the parameter %fresh"),
        (BreaksGraph(), "the graph it gives is broken: %relu: input %up is not defined"),
        (BreaksTypes(), "the graph it gives is broken: %relu"),
        (ChangesResult(), "changes the result by"),
        (Grows(), "a second run changes what the first one left"),
        (OffersOne(), "at least two different options"),
        (ChangesByDefault(), "the first options change the graph"),
        (ForgetsArgument(rows=2), "not the same pass again"),
    ],
)
def test_a_pass_that_breaks_a_promise_is_told_which(
    pass_: Pass, sentence: str, mlp: Graph, target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_pass(pass_, with_weights(mlp), target)


def test_a_pass_may_declare_its_error(mlp: Graph, target: Target, with_weights: Callable[[Graph], Program]) -> None:
    check_pass(ChangesResult(), with_weights(mlp), target, error=0.5)
