"""The search over bits: what it measures, what it chooses within limits and goals, and the plan that tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from intarsia.ir.errors import QualityError, SpecError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, materialize
from intarsia.ir.spec import Spec, construct
from intarsia.ir.target import load_target
from intarsia.passes.apply import apply
from intarsia.passes.calibrate import range_of
from intarsia.passes.integer_only import integer_only
from intarsia.search.bit_data import Data
from intarsia.search.bit_errors import distances
from intarsia.search.bit_readers import read_by
from intarsia.search.bit_search import search_bits
from intarsia.search.bit_settings import BitSearch
from intarsia.search.bit_study import BitStudy, Part
from intarsia.search.bits import Infeasible
from intarsia.search.explain import explain
from intarsia.search.journal import Journal
from intarsia.search.progress import Silent
from intarsia.search.quality import Goal
from intarsia.search.workload import Workload

TARGET = load_target("null")
LAYERS = ("first", "second", "third", "fourth")

FOUR = """graph four {
  input %x: f32[16, 32]
  param %w1: f32[32, 32]
  param %w2: f32[32, 32]
  param %w3: f32[32, 32]
  param %w4: f32[8, 32]
  %first: f32[16, 32] = aten.linear(input=%x, weight=%w1)
  %a: f32[16, 32] = aten.relu(self=%first)
  %second: f32[16, 32] = aten.linear(input=%a, weight=%w2)
  %third: f32[16, 32] = aten.linear(input=%a, weight=%w3)
  %sum: f32[16, 32] = aten.add.Tensor(self=%second, other=%third)
  %b: f32[16, 32] = aten.relu(self=%sum)
  %fourth: f32[16, 8] = aten.linear(input=%b, weight=%w4)
  return %fourth
}"""


@pytest.fixture
def four() -> Program:
    """Four layers, the two in the middle reading the same value; the second has ten times the weights of the third."""
    graph, generator = Graph.parse(FOUR), torch.Generator().manual_seed(0)
    weights = {param.name: torch.randn(param.type.shape, generator=generator) / 6 for param in graph.params}  # type: ignore[union-attr]
    weights["w3"] /= 10
    return Program(graph, weights)


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(1)
    return Data([(torch.randn(16, 32, generator=generator),) for _ in range(3)])


def searched(program: Program, data: Data, text: str, **wishes: object) -> Plan:
    how = construct(BitSearch, Spec.parse(text))
    return search_bits(program, TARGET, (Part(data),), how=how, **wishes).plan  # type: ignore[arg-type]


def bits_of(plan: Plan, phase: int = 0) -> dict[str, str]:
    return dict(next(step.chosen for step in plan.phases[phase].steps if step.run == "quantize-integer"))


def test_without_a_limit_all_layers_have_eight_bits_and_the_network_is_integers_alone(four: Program, data: Data):
    plan = searched(four, data, "bits")
    assert [step.run for step in plan.phases[0].steps] == ["calibrate", "quantize-integer", "lower-integer"]
    assert bits_of(plan) == dict.fromkeys(("first", "second", "third", "fourth"), "w8a8")
    graph = apply(plan, four.graph, TARGET)
    assert integer_only(materialize(Program(graph, four.weights)).graph) == ()
    (x,) = data.batches[0]
    ours, theirs = (Program(g, four.weights).module()(x)[0] for g in (graph, four.graph))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_layers_that_read_the_same_value_have_the_same_bits_and_a_limit_is_kept(four: Program, data: Data):
    plan = searched(four, data, "bits(bops=0.0, options='w8a8,w4a4')")
    chosen = bits_of(plan)
    assert chosen == {"first": "w8a8", "second": "w4a4", "third": "w4a4", "fourth": "w8a8"}
    used, limit = plan.notes["used"]["bops"], plan.notes["limits"]["bops"]  # type: ignore[index]
    assert used <= limit == pytest.approx(64 * 16 * 32 * 40 + 16 * 2 * 16 * 32 * 32, rel=1e-5)


def test_weights_alone_take_fewer_bits_where_size_alone_is_limited(four: Program, data: Data):
    assert bits_of(searched(four, data, "bits(size=0.0)"))["second"] == "w4a8"


def test_a_perturbation_is_what_the_whole_network_with_the_layers_on_grids_gives(four: Program, data: Data):
    study = BitStudy(four, TARGET, (Part(data),), BitSearch(samples=48))
    alone = dict.fromkeys(study.offered[0], "keep") | {"second": "w4a4", "third": "w4a4"}
    graph = apply(study.plan(alone), four.graph, TARGET)
    # first and last stay in float, so what lower-integer computes differs from the measured grids by roundings
    found = torch.cat(
        [
            distances(Program(graph, four.weights).module()(x)[0], four.module()(x)[0], classes=True)
            for (x,) in data.batches
        ]
    )
    both = study.errors["second"]["w4a4"].mean + study.errors["third"]["w4a4"].mean
    assert both == pytest.approx(float(found.mean()), rel=0.1)
    low, high = study.errors["second"]["w4a4"].interval
    assert low < study.errors["second"]["w4a4"].mean < high
    assert study.errors["second"]["w8a8"].mean < study.errors["second"]["w4a4"].mean / 20


def test_what_was_measured_is_read_back_and_gives_the_same_plan(four: Program, data: Data, tmp_path: Path):
    asked: list[str] = []

    class Counting(Journal):
        def put(self, key: str, value: object) -> None:
            asked.append(key)
            super().put(key, value)

    first = searched(four, data, "bits(bops=0.5)", journal=Counting(tmp_path / "j.jsonl"))
    measured = len(asked)
    lines = (tmp_path / "j.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_text("".join(lines[: measured // 2]) + lines[measured // 2][:9])
    asked.clear()
    again = searched(four, data, "bits(bops=0.5)", journal=Counting(tmp_path / "j.jsonl"))
    assert again.to_json() == first.to_json()
    assert len(asked) == measured - measured // 2


@pytest.mark.parametrize("sensitivity", ["hessian", "fisher", "output"])
def test_other_sensitivities_lead_to_a_plan_too(four: Program, data: Data, sensitivity: str):
    plan = searched(four, data, f"bits(bops=0.5, sensitivity='{sensitivity}', samples=16)")
    assert set(bits_of(plan).values()) <= {"w8a8", "w4a8", "w4a4"}
    assert integer_only(materialize(Program(apply(plan, four.graph, TARGET), four.weights)).graph) == ()


def test_explain_tells_options_intervals_ties_and_why_a_layer_is_fixed(four: Program, data: Data):
    found = explain(searched(four, data, "bits(bops=0.0, options='w8a8,w4a4')"), four.graph, TARGET)
    rows = {row.place: row for row in found.rows if row.run == "quantize-integer"}
    assert [option.option for option in rows["second"].options] == ["keep", "w8a8", "w4a4"]
    assert rows["second"].options[2].interval is not None
    assert rows["second"].options[2].bytes == -32 * 32 * 28 // 8
    assert "tied to third, which read the same value" in rows["second"].why
    assert "against w8a8" in rows["second"].why
    assert rows["first"].why.startswith("eight bits: the first layer")


def test_a_spent_budget_gives_eight_bits_and_says_that_it_is_not_complete(four: Program, data: Data):
    plan = searched(four, data, "bits(bops=0.0)", budget=0.0)
    assert plan.notes["complete"] is False
    assert set(bits_of(plan).values()) == {"w8a8"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits(bops=1.5)", "strategy bits: bops=1.5: a number without a unit is a fraction"),
        ("bits(size='6.5MB/s')", "strategy bits: size=6.5MB/s: expected a fraction such as 0.5, or a number with B"),
        ("bits(size='1B')", "limit size="),
    ],
)
def test_limits_that_cannot_be_are_one_line(four: Program, data: Data, text: str, said: str):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as caught:
        searched(four, data, text)
    assert isinstance(caught.value, Infeasible) == said.startswith("limit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits(bops=2)", "strategy bits: bops=2: a number without a unit is a fraction from 0 to 1; units: M, G, T"),
        ("bits(size='6')", "strategy bits: size=6: a number without a unit is a fraction from 0 to 1; units: B, kB"),
        (
            "bits(latency='4 years')",
            "strategy bits: latency=4 years: expected a fraction such as 0.5, or a number",
        ),
    ],
)
def test_a_limit_that_says_nothing_is_refused_before_there_is_anything_to_measure(text: str, said: str):
    with pytest.raises(UsageError) as caught:
        construct(BitSearch, Spec.parse(text))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("limit", ["size='1B'", "bops='1M'"])
def test_a_limit_that_nothing_keeps_is_refused_before_sensitivities_are_measured(four: Program, data: Data, limit: str):
    journal = Journal()
    with pytest.raises(Infeasible):
        searched(four, data, f"bits({limit})", journal=journal)
    assert len(journal) == 0


def test_sensitivities_are_measured_on_a_part_s_sample_and_ranges_on_all_of_it(four: Program, data: Data):
    few = Data(data.batches[:1])
    study = BitStudy(four, TARGET, (Part(data, sample=few),), BitSearch(samples=48))
    whole = BitStudy(four, TARGET, (Part(data),), BitSearch(samples=48))
    assert study.ranges(0, {}) == whole.ranges(0, {})
    assert len(study.errors["second"]["w4a4"].samples) == 16
    assert whole.errors["second"]["w4a4"].samples[:16] == study.errors["second"]["w4a4"].samples


def test_progress_goes_on_while_changed_graphs_are_made_and_names_the_phase(four: Program, data: Data):
    told: list[tuple[str, int | None]] = []

    class Told(Silent):
        def start(self, phase: str, total: int | None) -> None:
            told.append((phase, total))

    class Asked(BitStudy):
        def _changed(self, number: int, group: tuple[str, ...], option: str) -> Graph:
            assert told[-1][0] == f"layers on grids, phase {number + 1} of 2"
            return super()._changed(number, group, option)

    parts = (Part(data, 0, 1, 0.5), Part(data, 2, 3, 0.5))
    study = Asked(four, TARGET, parts, BitSearch(options="w8a8,w4a4", samples=16, smooth="no"), progress=Told())
    assert study.errors.keys() == {f"{number}/{layer}" for number in (0, 1) for layer in LAYERS}
    assert [phase for phase, _ in told[-2:]] == ["layers on grids, phase 1 of 2", "layers on grids, phase 2 of 2"]
    assert [one for one in told if one[0].startswith("layers")] == [
        ("layers on grids, phase 1 of 2", 2),
        ("layers on grids, phase 2 of 2", 2),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits(options='w2a2')", "options is 'w2a2'; it is some of w8a8,w4a8,w4a4"),
        ("bits(sensitivity='guess')", "sensitivity is 'guess'; it is one of grids, hessian, fisher, output"),
        ("bits(ranges='most')", "method 'most' is unknown"),
        ("bits(smooth='i8')", "smooth is 'i8'"),
        ("bits(phases=0)", "samples is at least 0, phases at least 1"),
        ("bits(bops=[1])", "bops is a share such as 0.5"),
    ],
)
def test_settings_that_cannot_be_are_one_line(text: str, said: str):
    with pytest.raises(SpecError) as caught:
        construct(BitSearch, Spec.parse(text))
    assert said in str(caught.value)


def test_what_layers_of_four_bits_alone_read_has_a_range_for_four_bits(four: Program, data: Data):
    found = read_by({"second", "third"}, ("x", "a", "b"), four.graph)
    assert found == {"a"}
    assert read_by({"second"}, ("a",), four.graph) == set()
    study = BitStudy(four, TARGET, (Part(data),), BitSearch())
    wide, narrow = study.ranges(0, {}), study.ranges(0, {"second": "w4a4", "third": "w4a4"})
    assert range_of(narrow["a"])[1] < range_of(wide["a"])[1]
    assert {place for place in wide if wide[place] != narrow[place]} == {"a"}


def test_a_layer_may_stay_in_float_where_that_is_offered(four: Program, data: Data):
    plan = searched(four, data, "bits(options='keep,w8a8')")
    assert bits_of(plan) == dict.fromkeys(("first", "second", "third", "fourth"), "w8a8")
    study = BitStudy(four, TARGET, (Part(data),), BitSearch(options="keep,w8a8"))
    float_or_eight = study.solve({"bops": study.used(dict.fromkeys(study.offered[0], "w8a8"), "bops") * 4})
    assert "keep" in float_or_eight.values()
    assert "second" not in bits_of(study.plan({**float_or_eight, "second": "keep"}))


def test_a_goal_needs_a_loop(four: Program, data: Data):
    with pytest.raises(UsageError, match="--quality is measured on whole answers of a loop, and four has none"):
        searched(four, data, "bits", goal=Goal.parse("psnr>=30"))


def test_phases_have_ranges_and_bits_of_their_own_by_one_program(denoiser: Program, denoising: Callable[..., Workload]):
    workload = denoising()
    parts = loop_parts(workload)
    result = search_bits(denoiser, TARGET, parts, how=BitSearch(bops=0.5, phases=2), workload=workload, effort="quick")
    first, second = result.plan.phases
    assert (first.first, first.last, second.first, second.last) == (0, 1, 2, 4)
    ranges = [next(step.chosen for step in phase.steps if step.run == "calibrate") for phase in (first, second)]
    assert ranges[0] != ranges[1]
    used, limit = result.plan.notes["used"], result.plan.notes["limits"]
    assert used["bops"] <= limit["bops"]  # type: ignore[index]
    assert result.quality is not None
    assert result.quality["psnr"].mean > 20
    explained = explain(result.plan, denoiser.graph, TARGET)
    assert {row.phase for row in explained.rows} == {0, 1}


def test_a_goal_is_met_with_the_smallest_share_that_meets_it(denoiser: Program, denoising: Callable[..., Workload]):
    workload = denoising()
    most = search_bits(denoiser, TARGET, loop_parts(workload), how=BitSearch(), workload=workload, effort="quick")
    assert most.quality is not None
    bound = most.quality["psnr"].mean - 6
    goal = Goal.parse(f"psnr>={bound:.2f}")
    found = search_bits(
        denoiser, TARGET, loop_parts(workload), how=BitSearch(), goal=goal, workload=workload, effort="quick"
    )
    assert found.quality is not None
    assert goal.met(found.quality)
    assert found.plan.notes["used"]["bops"] <= most.plan.notes["used"]["bops"]  # type: ignore[index]
    with pytest.raises(QualityError, match="with the most bits everywhere"):
        search_bits(
            denoiser,
            TARGET,
            loop_parts(workload),
            how=BitSearch(),
            goal=Goal.parse("psnr>=140"),
            workload=workload,
            effort="quick",
        )


def loop_parts(workload: Workload) -> tuple[Part, ...]:
    """The first two steps and the last three."""
    assert workload.loop is not None
    recorded = workload.loop.record("calibration", [0, 1, 3], Silent())
    early, late = [*recorded[0], *recorded[1]], recorded[2]
    return (Part(Data(early, squared=True), 0, 1, 0.4), Part(Data(late, squared=True), 2, 4, 0.6))
