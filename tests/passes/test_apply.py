import pytest

from intarsia.ir.errors import PlanError, SpecError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.target import Target
from intarsia.passes.apply import apply, cutting, segments
from intarsia.passes.quantize_linear import QuantizeLinear


def plan_for(graph: Graph, *steps: Step) -> Plan:
    return Plan(graph.fingerprint, "null", (Phase(steps),))


def test_a_plan_is_replayed_pass_by_pass(mlp: Graph, target: Target) -> None:
    plan = plan_for(mlp, Step("clean"), Step("quantize-linear(min_rows=8)", {"head": "i8"}))
    assert apply(plan, mlp, target) == QuantizeLinear().run(mlp, target, {"head": "i8"})


def test_phases_are_replayed_one_at_a_time(mlp: Graph, target: Target) -> None:
    quantized = Phase((Step("quantize-linear", {"up": "i8"}),), first=5, last=9)
    plan = Plan(mlp.fingerprint, "null", (Phase((), last=4), quantized))
    assert apply(plan, mlp, target) == mlp
    assert apply(plan, mlp, target, phase=1).producers["up"].op == "intarsia.linear_i8"


def test_a_plan_for_another_graph_names_both_fingerprints(mlp: Graph, target: Target) -> None:
    plan = Plan("0123456789ab", "null", (Phase(()),))
    with pytest.raises(PlanError, match=rf"graph mlp: its fingerprint is {mlp.fingerprint}, .* made for 0123456789ab"):
        apply(plan, mlp, target)


def test_a_phase_that_is_not_there_is_named(mlp: Graph, target: Target) -> None:
    with pytest.raises(PlanError, match="phase 1: the plan has phases 0 to 0"):
        apply(plan_for(mlp), mlp, target, phase=1)


def test_an_option_that_is_not_offered_is_named_with_what_is(mlp: Graph, target: Target) -> None:
    plan = plan_for(mlp, Step("quantize-linear", {"up": "i4(group=128)"}))
    message = r"quantize-linear: %up offers keep, i8, i4\(group=32\), i4\(group=64\); the plan asks for i4\(group=128\)"
    with pytest.raises(PlanError, match=message):
        apply(plan, mlp, target)


def test_a_place_that_is_not_there_is_named(mlp: Graph, target: Target) -> None:
    with pytest.raises(PlanError, match="quantize-linear: nothing to choose at %nowhere"):
        apply(plan_for(mlp, Step("quantize-linear", {"nowhere": "i8"})), mlp, target)


def test_a_pass_that_does_not_exist_is_named(mlp: Graph, target: Target) -> None:
    with pytest.raises(UsageError, match=r"pass 'quantise-linear' is unknown; did you mean quantize-linear\?"):
        apply(plan_for(mlp, Step("quantise-linear")), mlp, target)


def test_an_argument_that_does_not_exist_is_named(mlp: Graph, target: Target) -> None:
    with pytest.raises(SpecError, match="quantize-linear: unknown key 'rows'; it takes min_rows"):
        apply(plan_for(mlp, Step("quantize-linear(rows=4)")), mlp, target)


CUT = """graph cut {
  input %x: f32[2, 4]
  input %text: f32[3, 4]
  param %w: f32[4, 4]
  %k: f32[3, 4] = aten.linear(input=%text, weight=%w)
  %y: f32[2, 3] = aten.linear(input=%x, weight=%k)
  return %y
}
"""


def test_segments_are_those_of_the_plan_s_pass_that_cuts(mlp: Graph) -> None:
    graph = Graph.parse(CUT)
    assert segments(plan_for(graph, Step("clean")), graph) == (graph,)
    made = segments(plan_for(graph, Step("hoist-invariants"), Step("clean")), graph)
    assert [[node.name for node in one.nodes] for one in made] == [["k"], ["y"]]
    with pytest.raises(Unsupported, match="hoist-invariants: mlp multiplies no weight by what anything else tells"):
        segments(plan_for(mlp, Step("hoist-invariants")), mlp)


def test_one_pass_of_a_plan_cuts(mlp: Graph) -> None:
    plan = plan_for(mlp, Step("hoist-invariants"), Step("clean"), Step("teacache"))
    with pytest.raises(PlanError, match="plan: hoist-invariants and teacache cut a step into segments each; leave all"):
        cutting(plan)


def test_a_plan_with_phases_cuts_no_step(mlp: Graph) -> None:
    phases = (Phase((Step("hoist-invariants"),), last=4), Phase((), first=5))
    with pytest.raises(PlanError, match="hoist-invariants cuts a step into segments; give it one phase, not 2"):
        cutting(Plan(mlp.fingerprint, "null", phases))
