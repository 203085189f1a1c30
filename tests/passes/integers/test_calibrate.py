"""Where ranges are wanted, and how they come into the graph."""

from collections.abc import Callable

import pytest
import torch

from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.passes.apply import apply
from intarsia.passes.calibrate import Calibrate, places
from intarsia.passes.conformance import check_pass
from intarsia.passes.drop_ranges import DropRanges

from .conftest import BRANCHES, RESIDUAL


def test_places_are_what_layers_sums_and_joins_read_and_give_behind_their_clamps() -> None:
    residual = ("x", "stem.relu", "one.relu", "two", "sum.relu", "three", "down", "join.relu", "fc")
    assert set(places(Graph.parse(RESIDUAL))) == set(residual)
    assert "join" in " ".join(places(Graph.parse(BRANCHES))) or "cat" in " ".join(places(Graph.parse(BRANCHES)))
    for name in places(Graph.parse(BRANCHES)):
        assert not name.endswith(".w")


def test_ranges_stand_behind_their_values_and_all_readers_see_them(target: Target) -> None:
    graph = Graph.parse(RESIDUAL)
    chosen = {"x": "range(low=-1.0, high=1.0)", "sum.relu": "range(low=0.0, high=2.5)"}
    marked = Calibrate().run(graph, target, chosen)
    assert [(node.name, node.args["low"], node.args["high"]) for node in marked.find("intarsia.calibrated")] == [
        ("x.calibrated", -1.0, 1.0),
        ("sum.relu.calibrated", 0.0, 2.5),
    ]
    assert [user.name for user in marked.users["sum.relu"]] == ["sum.relu.calibrated"]
    assert {user.name for user in marked.users["sum.relu.calibrated"]} == {"three", "down"}


def test_the_answer_stays_the_same_to_the_bit(target: Target, with_weights: Callable[[Graph], Program]) -> None:
    program = with_weights(Graph.parse(RESIDUAL))
    inputs = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)),)
    marked = Calibrate().run(program.graph, target, dict.fromkeys(places(program.graph), "range(low=-1.0, high=1.0)"))
    assert torch.equal(Program(marked, program.weights).module()(*inputs)[0], program.module()(*inputs)[0])


@pytest.mark.parametrize(
    ("place", "option", "said"),
    [
        ("sum.relu", "range(low=2.0, high=1.0)", "low is above high"),
        ("sum.relu", "range(low=0.0, high=1e999)", "low and high are finite numbers"),
        ("sum.relu", "range(high=1.0)", r"expected 'range\(low=..., high=...\)'"),
        ("sum.relu", "wide", r"expected 'range\(low=..., high=...\)'"),
        ("sum.rule", "range(low=0.0, high=1.0)", "sum.rule"),
    ],
)
def test_a_plan_with_a_range_that_is_none_is_refused_in_one_line(
    place: str, option: str, said: str, target: Target
) -> None:
    graph = Graph.parse(RESIDUAL)
    plan = Plan(graph.fingerprint, "null", (Phase((Step("calibrate", {place: option}),)),))
    with pytest.raises(PlanError, match=said) as caught:
        apply(plan, graph, target)
    assert "\n" not in str(caught.value)


def test_dropped_ranges_leave_the_graph_as_it_was(target: Target, with_weights: Callable[[Graph], Program]) -> None:
    program = with_weights(Graph.parse(RESIDUAL))
    marked = Calibrate().run(program.graph, target, dict.fromkeys(places(program.graph), "range(low=-1.0, high=1.0)"))
    assert marked != program.graph
    assert DropRanges().run(marked, target, {}) == program.graph
    assert DropRanges().run(program.graph, target, {}) is program.graph
    check_pass(DropRanges(), Program(marked, program.weights), target)


def test_it_keeps_a_passs_promises(target: Target, with_weights: Callable[[Graph], Program]) -> None:
    check_pass(Calibrate(), with_weights(Graph.parse(RESIDUAL)), target)
