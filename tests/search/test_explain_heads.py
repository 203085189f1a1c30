"""Explanations of heads: what each pattern saves and loses, in each phase, and why one was chosen."""

from __future__ import annotations

import json

import pytest
from rich.table import Table

from intarsia.ir.errors import PlanError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.target import load_target
from intarsia.search.explain import explain, noted
from intarsia.search.explain_heads import Bargains, abridged, why_head
from intarsia.search.weighed import Weighed
from intarsia.summaries import explained

CPU = load_target("cpu-avx2")
RUN = "sparse-attention(tokens='tokens(frames=8, height=8, width=8)')"
CALIBRATED = "vertical-stripe(density=0.25, columns='0-3,9')"
GRAPH = Graph.parse("""\
graph two {
  input %q: f32[1, 2, 512, 16]
  %blocks.0.y: f32[1, 2, 512, 16] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  %blocks.1.y: f32[1, 2, 512, 16] = aten.scaled_dot_product_attention(query=%blocks.0.y, key=%q, value=%q)
  return %blocks.1.y
}
""")
HEADS = [f"blocks.{layer}.y#{head}" for layer in range(2) for head in range(2)]


def plan(*phases: tuple[int, int | None, dict[str, str]], **notes: object) -> Plan:
    made = tuple(Phase((Step(RUN, chosen),), first, last) for first, last, chosen in phases)
    return Plan(GRAPH.fingerprint, "cpu-avx2", made, notes)


def entry(steps: list[int], place: str, *options: tuple[str, float, float]) -> dict[str, object]:
    listed = [{"option": o, "error": error, "seconds": seconds, "bytes": 0} for o, error, seconds in options]
    return {"steps": steps, "step": 0, "place": place, "options": listed}


def test_long_lists_in_patterns_are_abridged_for_people() -> None:
    long = "tile-offsets(density=0.5, tile=(1, 2, 8), offsets='0.0.0,0.1.0,0.-1.0,1.0.0,0.3.0,0.2.0,0.-2.0', mean=0.1)"
    assert abridged(long) == (
        "tile-offsets(density=0.5, tile=(1, 2, 8), offsets='0.0.0,0.1.0,0.-1.0,1.0.0,0.3.0 and 2 more', mean=0.1)"
    )
    short = "vertical-stripe(density=0.1, columns='0-3,5,7,9,10', sink=0)"
    assert abridged(short) == short


def test_heads_of_one_layer_cost_alike_and_are_told_in_order_of_execution():
    told = explain(plan((0, None, {"blocks.1.y#1": "diagonal(density=0.25)"})), GRAPH, CPU)
    assert [row.place for row in told.rows] == HEADS
    assert told.rows[0].options == told.rows[1].options
    seconds = {option.option: option.seconds for option in told.rows[0].options}
    assert seconds["dense"] == 0
    assert seconds["skip"] < seconds["diagonal(density=0.0625)"] < seconds["diagonal(density=0.5)"] < 0
    assert {option.error for option in told.rows[0].options} == {None}
    assert told.rows[0].why.startswith("stays dense; skip would save most, ")
    assert told.rows[3].why.startswith("saves ")
    assert "diagonal(density=0.125) would save" in told.rows[3].why


def test_a_pattern_that_the_pass_does_not_list_is_weighed_too():
    told = explain(plan((0, None, {HEADS[0]: CALIBRATED})), GRAPH, CPU)
    (taken,) = (option for option in told.rows[0].options if option.option == CALIBRATED)
    assert taken.seconds < 0
    assert told.rows[0].chosen == CALIBRATED
    assert CALIBRATED not in [option.option for option in told.rows[1].options]


def test_a_choice_that_was_written_in_by_hand_stands_beside_what_the_search_noted():
    notes = [entry([0, 9], HEADS[0], ("dense", 0.0, 0.0), ("skip", 0.5, -2e-4))]
    told = explain(plan((0, None, {HEADS[0]: "diagonal(density=0.25)"}), places=notes, error=1.0), GRAPH, CPU)
    assert [(option.option, option.error) for option in told.rows[0].options] == [
        ("dense", 0.0), ("skip", 0.5), ("diagonal(density=0.25)", None),
    ]  # fmt: skip


def test_each_phase_has_the_numbers_of_its_own_steps():
    places = [
        entry([0, 9], HEADS[0], ("dense", 0.0, 0.0), ("skip", 0.5, -2e-4)),
        entry([10, 19], HEADS[0], ("dense", 0.0, 0.0), ("skip", 0.1, -2e-4)),
        entry([20, 29], HEADS[0], ("dense", 0.0, 0.0), ("skip", 0.02, -2e-4)),
    ]
    told = explain(plan((0, 9, {}), (10, 29, {HEADS[0]: "skip"}), places=places, error=0.12), GRAPH, CPU)
    first, second = (row for row in told.rows if row.place == HEADS[0])
    assert (first.phase, first.steps, first.options[1].error) == (0, (0, 9), 0.5)
    assert (second.phase, second.steps) == (1, (10, 29))
    assert second.options[1].error == pytest.approx(0.12)  # ranges that decide alike are one phase
    assert second.why == "saves 200 us at 100.0% of the plan's error; nothing offered is cheaper"
    assert json.loads(json.dumps(told.to_json()))["rows"][-1]["steps"] == [10, 29]


def test_notes_without_steps_are_of_every_phase():
    two = plan((0, 4, {}), (5, None, {}), places=[{"step": 0, "place": "a", "options": []}])
    assert noted(two, 0) == noted(two, 1) == {(0, "a"): ()}


def test_other_targets_have_predicted_costs_and_no_errors():
    notes = [entry([0, 9], HEADS[0], ("dense", 0.0, 0.0), ("skip", 0.5, -2e-4))]
    told = explain(plan((0, None, {}), places=notes), GRAPH, load_target("h200"))
    assert {option.error for row in told.rows for option in row.options} == {None}


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match=r"blocks\.0\.y#0 offers dense, .*the plan asks for diagonal\(density=7\)"):
        explain(plan((0, None, {HEADS[0]: "diagonal(density=7)"})), GRAPH, CPU)


DENSE = Weighed("dense", 0.0, 0, 0.0)
HALF = Weighed("diagonal(density=0.5)", -2e-4, 0, 0.010)
STRIPE = Weighed("vertical-stripe(density=0.5)", -1.99e-4, 0, 0.004)
SKIP = Weighed("skip", -4e-4, 0, 0.030)


def test_a_dense_head_tells_its_best_bargain_and_what_others_pay():
    cheap = (DENSE, Weighed("skip", -4e-4, 0, 0.002))
    bargains = Bargains.of(plan(error=0.1), [((DENSE, HALF, SKIP), "dense"), (cheap, "skip")])
    assert bargains.paid == pytest.approx(5.0)
    assert why_head((DENSE, HALF, SKIP), "dense", bargains) == (
        "stays dense; the best bargain, diagonal(density=0.5), would save 200 us at 10.0% of the plan's error; "
        "other heads pay at most 1.0% for as much"
    )


def test_a_dense_head_of_a_greedy_search_tells_epsilon():
    greedy = plan(error=0.1, strategy="HeadSearch(choose='greedy', epsilon=0.3)")
    told = why_head((DENSE, HALF, SKIP), "dense", Bargains.of(greedy, []))
    assert told.startswith("stays dense: every pattern's loss exceeds epsilon, 0.3; diagonal(density=0.5) loses least")


def test_the_next_cheaper_pattern_is_the_best_of_those_that_cost_alike():
    told = why_head((DENSE, HALF, STRIPE, SKIP), "dense", Bargains(0.1, None, None))
    assert "the best bargain, vertical-stripe(density=0.5), " in told
    quarter, other = Weighed("a", -3e-4, 0, 0.02), Weighed("b", -3.01e-4, 0, 0.015)
    assert "next, b would save 301 us at 15.0%" in why_head(
        (DENSE, STRIPE, quarter, other, SKIP), STRIPE.option, Bargains(0.1)
    )


def test_heads_of_which_the_same_is_to_be_said_are_one_line():
    explanation = explain(plan((0, None, {HEADS[3]: "skip"})), GRAPH, CPU)
    told = explained(explanation, None)
    assert told is not None
    (listed,) = told[1]
    assert isinstance(listed, Table)
    assert list(listed.columns[0].cells) == ["blocks.0.y#0 to #1", "blocks.1.y#0", "blocks.1.y#1"]


def test_a_layer_stands_for_its_heads_and_a_head_for_itself():
    explanation = explain(plan((0, 4, {}), (5, None, {HEADS[1]: "skip"})), GRAPH, CPU)
    whole, head = explained(explanation, "blocks.0.y"), explained(explanation, HEADS[1])
    assert whole is not None
    assert head is not None
    assert [line for line in whole[1] if line in HEADS] == HEADS[:2] * 2
    assert [line for line in head[1] if isinstance(line, str) and line.startswith("phase")] == [
        "phase 0, steps 0 to 4", "phase 1, steps 5 to the last",
    ]  # fmt: skip
    assert [row["chosen"] for row in head[0]["rows"]] == ["dense", "skip"]  # type: ignore[attr-defined]
    assert explained(explanation, "blocks.2.y") is None
