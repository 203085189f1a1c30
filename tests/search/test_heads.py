"""The whole search over heads, on a network of four heads in a loop of five steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from intarsia import flow
from intarsia import subject as subjects
from intarsia.ir.errors import QualityError, SpecError, Unsupported, UsageError
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.plan import Chosen, Plan
from intarsia.ir.program import Program, materialize, meta_weights
from intarsia.ir.rewrite import rewrite
from intarsia.ir.spec import Spec, construct
from intarsia.ir.target import Target, load_target
from intarsia.models import base as models
from intarsia.models import wan
from intarsia.models.sampler import FlowMatchEuler, noise
from intarsia.passes.apply import apply
from intarsia.passes.base import Pass, find_pass
from intarsia.passes.fuse_heads import FuseHeads
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.quantize_linear import QuantizeLinear
from intarsia.passes.sparse_attention import SparseAttention
from intarsia.search.head_errors import Heads
from intarsia.search.head_settings import HeadSearch
from intarsia.search.heads import search_heads
from intarsia.search.journal import Journal
from intarsia.search.progress import Silent
from intarsia.search.quality import Goal, measure
from intarsia.search.search import SearchResult
from intarsia.search.workload import Workload

CPU = load_target("cpu-avx2")
MODES = ("skip", "diagonal(density=0.5)", "diagonal(density=0.25)", "multi-diagonal(density=0.5)")
SPARSE = SparseAttention(block=16, patterns=MODES)
FIRST, SECOND = "blocks.0.scaled_dot_product_attention", "blocks.1.scaled_dot_product_attention"
PLACES = (f"{FIRST}#0", f"{FIRST}#1", f"{SECOND}#0", f"{SECOND}#1")

Make = Callable[..., Workload]


@dataclass(frozen=True)
class Halved(Pass):
    """%y = linear(...) becomes %y = mul(linear(...), 0.5) at the network's last layer: no decision, and harm."""

    name: ClassVar[str] = "halved"

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        def rule(node: Node) -> Sequence[Node] | None:
            if node.name != "out.linear":
                return None
            whole = replace(node.outputs[0], name="out.whole")
            half = Node("aten.mul.Tensor", {"self": Ref("out.whole"), "other": 0.5}, node.outputs)
            return replace(node, outputs=(whole,)), half

        return graph if "out.whole" in graph.values else rewrite(graph, rule)


@pytest.fixture
def run(denoiser: Program, denoising: Make) -> Callable[..., SearchResult]:
    """``run(density=0.5, goal="psnr>=30")``: a search; options of ``HeadSearch`` and of ``search_heads``."""

    def search(*, goal: str | None = None, program: Program = denoiser, **options: object) -> SearchResult:
        asked = {key: options.pop(key) for key in list(options) if key in HeadSearch.__dataclass_fields__}
        workload = options.pop("workload", None) or denoising()
        passes = options.pop("passes", (SPARSE,))
        how = construct(HeadSearch, Spec("heads", {"phases": 0, **asked}))  # type: ignore[dict-item]
        target = options.pop("target", CPU)
        wanted = Goal.parse(goal) if goal else None
        return search_heads(program, target, passes, workload, wanted, how=how, **options)  # type: ignore[arg-type]

    return search


def options_of(found: SearchResult) -> list[tuple[str, ...]]:
    """What the four heads do at each of the five steps."""
    by_step: list[tuple[str, ...]] = []
    for phase in found.plan.phases:
        last = 4 if phase.last is None else phase.last
        chosen = phase.steps[0].chosen
        by_step += [tuple(chosen.get(place, "dense") for place in PLACES)] * (last - phase.first + 1)
    return by_step


def density_of(options: list[tuple[str, ...]], program: Program) -> float:
    """The share of pairs of queries and keys, in the mean over heads and steps."""
    layout = SPARSE.sites(program.graph)[0].layout
    share = {option: SPARSE.mask(option, layout).density for row in options for option in row}
    return float(np.mean([[share[option] for option in row] for row in options]))


def videos(program: Program, workload: Workload, options: list[tuple[str, ...]]) -> Tensor:
    """Whole answers on validation noise with these options, by running the changed graphs."""
    graphs = [
        SPARSE.run(program.graph, CPU, {p: o for p, o in zip(PLACES, row, strict=True) if o != "dense"})
        for row in options
    ]
    assert workload.loop is not None
    modules = [materialize(Program(graph, program.weights)).module() for graph in graphs]
    run = workload.loop.by_step([(step, step, module) for step, module in enumerate(modules)])
    with torch.no_grad():
        return workload.outputs(run, "validation", Silent())


def psnr(program: Program, workload: Workload, options: list[tuple[str, ...]]) -> float:
    dense = [("dense",) * 4] * 5
    return measure(videos(program, workload, options), videos(program, workload, dense))["psnr"].mean


def plain_algorithm(
    program: Program, *, weight: float, epsilon: float, samples: int = 2
) -> tuple[list[tuple[str, ...]], list[Tensor]]:
    """Sparse-vDiT's algorithm 1 for this network, spelled out: decisions by step, and the last videos.

    One loop over steps, layers and heads; masks are dense booleans; losses are means over samples.
    """
    weights = program.weights
    layout = SPARSE.sites(program.graph)[0].layout
    masks = {mode: torch.from_numpy(SPARSE.mask(mode, layout).tokens()) for mode in ("dense", *MODES)}
    densities = {mode: float(mask.float().mean()) for mode, mask in masks.items()}
    linear = torch.nn.functional.linear
    seeds = range(samples)
    xs = [torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    table: list[tuple[str, ...]] = []
    for step in range(5):
        time, chosen, hs = 1 - step / 5, [], []
        for x in xs:
            embedded = torch.nn.functional.conv3d(x, weights["patch.weight"], weights["patch.bias"])
            hs.append((embedded.flatten(2).transpose(1, 2) + weights["place"]) * (0.5 + time))
        for layer in ("blocks.0", "blocks.1"):

            def apply_(name: str, h: Tensor, layer: str = layer) -> Tensor:
                return linear(h, weights[f"{layer}.{name}.weight"], weights[f"{layer}.{name}.bias"])

            results = []
            for h in hs:
                normed = torch.nn.functional.layer_norm(
                    h, (8,), weights[f"{layer}.norm.weight"], weights[f"{layer}.norm.bias"]
                )
                q, k, v = (apply_(name, normed).view(64, 2, 4).transpose(0, 1) for name in ("to_q", "to_k", "to_v"))
                scores = q @ k.transpose(1, 2) / 2
                by_mode = {
                    mode: torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1).nan_to_num(0.0) @ v
                    for mode, mask in masks.items()
                }
                results.append(by_mode)
            modes = []
            for head in range(2):
                losses = {}
                for mode in MODES:
                    errors = [float((r[mode][head] - r["dense"][head]).square().mean()) for r in results]
                    losses[mode] = sum(errors) / len(errors) + weight * densities[mode]
                best = min(MODES, key=lambda mode: losses[mode])
                modes.append("dense" if all(loss > epsilon for loss in losses.values()) else best)
            chosen += modes
            for number, r in enumerate(results):
                joined = torch.stack([r[mode][head] for head, mode in enumerate(modes)], dim=1).reshape(1, 64, 8)
                hs[number] = hs[number] + apply_("to_out", joined)
        for number, h in enumerate(hs):
            velocity = linear(h, weights["out.weight"], weights["out.bias"]).transpose(1, 2).unflatten(2, (4, 4, 4))
            xs[number] = xs[number] - velocity / 5
        table.append(tuple(chosen))
    return table, xs


@pytest.mark.parametrize("epsilon", [0.45, 0.7, 0.8, 5.0])
def test_greedy_is_the_papers_algorithm_in_closed_loop(run, denoiser: Program, denoising: Make, epsilon: float) -> None:
    found = run(choose="greedy", score="mse", epsilon=epsilon, rows=0)
    expected, _ = plain_algorithm(denoiser, weight=0.5, epsilon=epsilon)
    assert options_of(found) == expected
    assert found.quality is not None
    assert found.quality["psnr"].mean == pytest.approx(psnr(denoiser, denoising(), expected), abs=1e-2)
    assert found.plan.notes["density"] == pytest.approx(density_of(expected, denoiser), abs=1e-5)


def test_the_closed_loop_goes_on_with_what_it_has_chosen(
    denoiser: Program, denoising: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, answers = denoising(), []
    assert workload.loop is not None
    together = workload.loop.together

    def kept(step, split, progress):
        answers.append(together(step, split, progress))
        return answers[-1]

    watched = replace(workload, loop=replace(workload.loop, together=kept))
    how = HeadSearch(choose="greedy", score="mse", epsilon=0.7, rows=0, phases=0)
    search_heads(denoiser, CPU, (SPARSE,), watched, None, how=how)
    _, expected = plain_algorithm(denoiser, weight=0.5, epsilon=0.7)
    dense = workload.outputs(denoiser.module(), "calibration", Silent())
    assert len(answers) == 1
    assert torch.allclose(answers[0], torch.cat(expected), atol=1e-4)
    assert not torch.allclose(answers[0], dense, atol=1e-2)


@pytest.mark.parametrize("density", [0.5, 0.75, 1.0])
def test_greedy_finds_the_epsilon_that_keeps_a_budget(run, denoiser: Program, density: float) -> None:
    found = run(choose="greedy", density=density, weight=2.0)
    assert found.complete
    assert density_of(options_of(found), denoiser) <= density + 1e-9
    assert found.plan.notes["density"] == pytest.approx(density_of(options_of(found), denoiser), abs=1e-5)
    given = run(choose="greedy", epsilon=found.plan.notes["epsilon"], weight=2.0)
    assert abs(density_of(options_of(given), denoiser) - density_of(options_of(found), denoiser)) < 0.11


def test_a_budget_that_no_epsilon_keeps_says_what_to_change(run) -> None:
    with pytest.raises(UsageError, match=r"no epsilon keeps the budget of heads\(.*density=0.05.*\): .*raise weight"):
        run(choose="greedy", density=0.05, weight=0.0)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_the_exact_choice_keeps_the_budget_and_beats_one_pattern_for_all(
    run, denoiser: Program, denoising: Make, density: float
) -> None:
    found = run(density=density)
    assert density_of(options_of(found), denoiser) <= density + 1e-9
    assert found.plan.notes["gap"] == 0
    assert found.quality is not None
    ours = psnr(denoiser, denoising(), options_of(found))
    assert found.quality["psnr"].mean == pytest.approx(ours, abs=1e-2)
    layout = SPARSE.sites(denoiser.graph)[0].layout
    uniform = [mode for mode in MODES if SPARSE.mask(mode, layout).density <= density]
    assert uniform
    assert all(ours > psnr(denoiser, denoising(), [(mode,) * 4] * 5) for mode in uniform)


def test_means_are_found_where_patterns_name_none_and_left_out_where_nobody_wants_them(run) -> None:
    sparse = SparseAttention(block=16, patterns=("skip()", "diagonal(density=0.25, mean=0.3)", "diagonal(density=0.5)"))

    def chosen(**how: object) -> list[str]:
        found = run(density=0.3, passes=(sparse,), **how)
        noted = [option["option"] for place in found.plan.notes["places"] for option in place["options"]]
        return [option for option in noted if option != "dense"]

    plain = chosen(means=False)
    assert {text for text in plain if "mean=" in text} == {"diagonal(density=0.25, mean=0.3)"}
    blended = chosen()
    assert any(text.startswith("skip(mean=") for text in blended)
    assert any(text.startswith("diagonal(density=0.5, mean=") for text in blended)
    assert "diagonal(density=0.25, mean=0.3)" in blended
    assert all(text.count("mean=") <= 1 and str(find_pattern(text)) for text in blended)


def test_a_budget_of_everything_leaves_every_head_dense(run) -> None:
    found = run(density=1.0)
    assert [phase.steps[0].chosen for phase in found.plan.phases] == [{}]
    assert (found.plan.phases[0].first, found.plan.phases[0].last) == (0, None)
    assert found.quality["psnr"].mean == 150
    assert found.gain == 0


def test_a_budget_of_seconds_is_kept_by_the_prediction(run, denoiser: Program) -> None:
    slow = replace(CPU, launch=0.0, flops={"f32": 1e6})
    dense = run(density=1.0, target=slow).baseline.seconds
    found = run(seconds=0.8 * dense, target=slow)
    assert 0.7 * dense < found.predicted.seconds <= 0.8 * dense * (1 + 1e-9)
    assert 0.2 <= found.gain <= 0.3
    with pytest.raises(UsageError, match=r"all but self-attention is predicted to take .* s of the .* asked for"):
        run(seconds=0.01 * dense, target=slow)


def test_a_goal_is_met_and_a_stricter_one_computes_more(run, denoiser: Program) -> None:
    densities = []
    for level in (15, 22, 30, 100):
        found = run(goal=f"psnr>={level}", effort="full", phases=2)
        assert found.quality["psnr"].mean >= level
        densities.append(density_of(options_of(found), denoiser))
    assert densities == sorted(densities)
    assert densities[0] < 0.6
    assert densities[-1] == 1


def test_greedy_meets_a_goal_too(run, denoiser: Program) -> None:
    found = run(choose="greedy", goal="psnr>=20", weight=0.1)
    assert found.quality["psnr"].mean >= 20
    assert density_of(options_of(found), denoiser) < 1


def test_a_goal_that_the_cheapest_patterns_meet_is_answered_by_nearly_nothing(run, denoiser: Program) -> None:
    found = run(goal="psnr>=1", effort="full")
    assert density_of(options_of(found), denoiser) <= 0.05
    assert len(found.tried) < 16


def test_a_goal_out_of_reach_and_one_that_a_budget_misses_say_what_was_reached(run) -> None:
    with pytest.raises(QualityError, match=r"psnr>=151 cannot be reached: with every head dense, psnr 150.00 of 151"):
        run(goal="psnr>=151")
    with pytest.raises(QualityError, match=r"psnr>=100 is missed by heads\(.*density=0.3\): psnr .* of 100; allow"):
        run(goal="psnr>=100", density=0.3)
    assert run(goal="psnr>=5", density=0.3).plan.notes["goal"] == "psnr>=5"


def test_a_selection_that_was_measured_before_is_judged_by_its_own_measurement(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alternately cheap and dense choices: every second one is known already, and is not the last one measured."""
    from intarsia.search.head_table import HeadTable

    def exact(table: HeadTable, budget: float):
        turns.append(budget)
        choice = np.full((len(table.phases), 4), len(turns) % 2, dtype=np.int64)
        return choice, 0.0

    turns: list[float] = []
    found_weights = np.ones(5)
    monkeypatch.setattr("intarsia.search.head_exact.ExactStudy._weights", found_weights)
    monkeypatch.setattr(HeadTable, "exact", exact)
    found = run(goal="psnr>=40", effort="full", transfer=False)
    assert found.quality["psnr"].mean >= 40
    assert len(found.tried) == 2


def test_what_other_noise_would_have_chosen_is_measured_and_noted(run) -> None:
    found = run(density=0.4)
    noted = found.plan.notes["transfer"]
    assert 0 <= noted["agreement"] <= 1
    assert noted["metric"] == "psnr"
    ours = found.quality["psnr"].mean
    losses = [trial.quality["psnr"].mean - ours for trial in found.tried]
    assert any(noted["loss_db"] == pytest.approx(loss, abs=1e-4) for loss in losses)
    assert "transfer" not in run(density=0.4, transfer=False).plan.notes
    assert "transfer" not in run(density=0.4, effort="quick").plan.notes


def test_measured_seconds_of_attention_stand_for_predicted_ones_before_and_after(run) -> None:
    """A dense call of two heads takes 2 s in each of two layers, a sparse one 1 s: what is saved is saved from that."""
    found = run(density=0.4, transfer=False, probes=1, price=lambda node, graph: 1.0 + ("scaled_dot" in node.op))
    assert 4.0 < found.baseline.seconds < 4.1
    assert 0 < found.predicted.seconds < found.baseline.seconds


def test_of_several_drifts_the_one_with_the_best_answers_is_kept(run) -> None:
    found = run(density=0.4, transfer=False)
    assert found.quality["psnr"].mean == max(trial.quality["psnr"].mean for trial in found.tried)
    assert found.plan.notes["drift"] in (0.0, 1.5, 3.0, 4.5)
    assert run(density=0.4, effort="quick").plan.notes["drift"] == 3.0


def test_phases_cover_the_loop_and_those_that_decide_alike_are_one(run) -> None:
    for phases in (0, 2, 9):
        plan = run(density=0.5, phases=phases, transfer=False, probes=1).plan
        ends = [(phase.first, phase.last) for phase in plan.phases]
        assert ends[0][0] == 0
        assert ends[-1][1] in (4, None)
        assert all(before[1] + 1 == after[0] for before, after in pairwise(ends))
        steps = [phase.steps for phase in plan.phases]
        assert all(before != after for before, after in pairwise(steps))
        assert len(ends) <= (phases or 5)
        assert (len(ends) == 1) == (ends[-1][1] is None)
    assert run(density=0.5, phases=1, transfer=False).plan.phases[0].last is None


def test_a_plan_replays_phase_by_phase_with_the_passes_behind(run, denoiser: Program) -> None:
    found = run(density=0.5, passes=(SPARSE, FuseHeads()), notations=(str(SPARSE), "fuse-heads"))
    plan = Plan.from_json(found.plan.to_json())
    assert [step.run for step in plan.phases[0].steps] == [str(SPARSE), "fuse-heads"]
    for number, phase in enumerate(plan.phases):
        graph = apply(plan, denoiser.graph, CPU, phase=number)
        named = {place.partition("#")[0] for place in phase.steps[0].chosen}
        assert ("block_sparse_attention" in str(graph) or "zeros_like" in str(graph)) == bool(named)
    assert plan.notes["strategy"] == "heads(phases=0, density=0.5)"
    assert construct(HeadSearch, Spec.parse(plan.notes["strategy"])).density == 0.5


def test_what_passes_behind_do_is_judged_against_the_unchanged_model(run) -> None:
    alone = run(density=1.0).quality["psnr"].mean
    coarse = QuantizeLinear(min_rows=65)
    assert run(density=1.0, passes=(SPARSE, coarse)).quality["psnr"].mean == alone == 150
    with pytest.raises(QualityError, match="with every head dense, psnr"):
        run(goal="psnr>=120", passes=(SPARSE, Halved()))


class Killed(Journal):
    """A journal at whose ``lines``-th measurement the user presses Ctrl-C."""

    def __init__(self, path: Path, lines: int) -> None:
        super().__init__(path)
        self.left = lines

    def put(self, key: str, value: object) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        super().put(key, value)


WAYS = {
    "exact": {"density": 0.5, "phases": 2, "probes": 1},
    "exact, goal": {"goal": "psnr>=22", "phases": 2, "probes": 1},
    "greedy": {"choose": "greedy", "density": 0.6, "phases": 2, "weight": 2.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lines", [1, 5])
def test_a_search_that_was_killed_goes_on_and_ends_with_the_same_plan(
    run, denoising: Make, tmp_path: Path, way: str, lines: int
) -> None:
    whole: list[str] = []
    expected = run(workload=denoising(asked=whole), **WAYS[way])
    path = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(journal=Killed(path, lines), **WAYS[way])
    kept = Journal(path)
    assert (len(kept), kept.broken) == (lines, 0)
    before, resumed = path.read_bytes(), []
    found = run(workload=denoising(asked=resumed), journal=kept, **WAYS[way])
    assert found.plan.to_json() == expected.plan.to_json()
    assert path.read_bytes().startswith(before)
    assert len(resumed) <= len(whole)
    again: list[str] = []
    third = run(workload=denoising(asked=again), journal=Journal(path), **WAYS[way])
    assert third.plan.to_json() == expected.plan.to_json()
    assert path.read_bytes().count(b"\n") == len(Journal(path))
    assert not [call for call in again if call.startswith("outputs")]
    assert len(again) < len(whole)


OTHERWISE = [
    {"phases": 3},
    {"probes": 2},
    {"seed": 1},
    {"passes": (SparseAttention(block=32, patterns=MODES),)},
    {"passes": (SparseAttention(block=16, patterns=("skip", "vertical-stripe(density=0.5)")),)},
    {"passes": (SPARSE, Halved())},
    {"effort": "full"},
    {"density": 0.8},
    {"seconds": 1e9, "density": 0.0},
    {"choose": "greedy", "weight": 2.0},
    {"choose": "greedy", "weight": 3.0},
    {"choose": "greedy", "weight": 2.0, "score": "mse"},
    {"choose": "greedy", "weight": 2.0, "rows": 3},
    {"choose": "greedy", "weight": 2.0, "phases": 1},
]


def test_one_journal_serves_searches_that_ask_for_different_things(run, denoising: Make, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    first = {"density": 0.6, "phases": 2, "probes": 1, "transfer": False, "workload": denoising(samples=1)}
    run(**first, journal=journal)
    for other in OTHERWISE:
        wanted = {**first, **other}
        assert run(**wanted, journal=journal).plan.to_json() == run(**wanted).plan.to_json(), other


def test_another_budget_measures_no_errors_again(run, denoising: Make, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    run(density=0.5, phases=1, transfer=False, journal=journal)
    keys = len(journal)
    run(density=0.8, phases=1, transfer=False, journal=journal)
    assert len(journal) == keys + 1


def test_when_the_time_is_spent_the_best_so_far_is_returned_and_marked(run, denoiser: Program) -> None:
    for options in ({"density": 0.5}, {"goal": "psnr>=30"}, {"choose": "greedy", "density": 0.6}):
        found = run(**options, budget=0.0)
        assert not found.complete
        assert found.plan.notes["complete"] is False
        assert [(phase.first, phase.last) for phase in found.plan.phases] == [(0, None)]
        assert found.plan.phases[0].steps[0].chosen == {}
        assert apply(found.plan, denoiser.graph, CPU) == denoiser.graph


@pytest.mark.parametrize(
    "options", [{"density": 0.5}, {"goal": "psnr>=24"}, {"choose": "greedy", "density": 0.6, "weight": 2.0}]
)
def test_whenever_the_time_is_spent_what_is_returned_keeps_the_goal_or_the_budget(
    run, denoiser: Program, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    known = Journal()
    whole = run(**options, phases=2, journal=known)
    clock: Iterator[int] = iter(range(10**6))
    monkeypatch.setattr("intarsia.search.trials.time.monotonic", lambda: next(clock))
    run(**options, phases=2, journal=Journal(), budget=10**6)
    checks = next(clock)
    useful = 0
    for seconds in range(checks // 4, checks, checks // 4):
        found = run(**options, phases=2, budget=seconds)
        assert not found.complete
        density = density_of(options_of(found), denoiser)
        if "density" in options:
            assert density <= options["density"] + 1e-9 or density == 1
        if found.quality is not None and "goal" in options:
            assert found.quality["psnr"].mean >= 24
        useful += density < 1
    assert useful
    assert run(**options, phases=2, budget=checks + 1).plan.to_json() == whole.plan.to_json()


def table_of(program: Program, path: Path, steps: int, sparse: SparseAttention = SPARSE) -> np.ndarray:
    heads = Heads.of(sparse, program.graph, CPU, {})
    errors = np.random.default_rng(0).lognormal(size=(steps, len(heads.places), heads.width)).astype(np.float32)
    errors[:, :, 0] = 0
    save_file({"errors": errors}, path)
    return errors


def test_a_table_of_errors_plans_a_model_that_has_no_weights(denoiser: Program, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    errors = table_of(denoiser, path, 6)
    meta = Program(denoiser.graph, meta_weights(denoiser.graph.params))
    how = HeadSearch(density=0.4, steps=6, phases=3, table=str(path))
    found = search_heads(meta, CPU, (SPARSE,), None, None, how=how)
    assert found.complete
    assert found.quality is None
    assert found.tried == ()
    assert found.plan.notes["density"] <= 0.4 + 1e-6
    chosen = {phase.first: phase.steps[0].chosen for phase in found.plan.phases}
    assert set(chosen) <= {0, 1, 3}
    total = 0.0
    for first, end in ((0, 1), (1, 3), (3, 6)):
        answers = chosen[max(start for start in chosen if start <= first)]
        for head, place in enumerate(PLACES):
            number = ("dense", *MODES).index(answers.get(place, "dense"))
            total += float(errors[first:end, head, number].sum())
    assert found.plan.notes["error"] == pytest.approx(total, rel=1e-4)


def test_a_model_without_a_loop_has_one_phase_whatever_is_asked(denoiser: Program, denoising: Make) -> None:
    whole = denoising()
    call = (torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5]))

    def outputs(run, split, progress):
        return run(*call)[0]

    alone = Workload((call,), outputs, {"kind": "one call"})
    for how in (HeadSearch(density=0.5, steps=7), HeadSearch(density=0.6, choose="greedy", weight=2.0, phases=3)):
        plan = search_heads(denoiser, CPU, (SPARSE,), alone, None, how=how).plan
        assert [(phase.first, phase.last) for phase in plan.phases] == [(0, None)]
        assert plan.phases[0].steps[0].chosen
    assert whole.loop is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"density": 1.5}, "density is 1.5; it is a share of all pairs"),
        ({"density": 0.5, "seconds": 1.0}, "density and seconds are both given"),
        ({"choose": "best"}, "choose is 'best'; it is one of exact, greedy"),
        ({"score": "psnr"}, "score is 'psnr'; it is one of mse, relative"),
        ({"choose": "greedy", "table": "t.safetensors"}, "greedy measures in closed loop and takes none"),
        ({"epsilon": 1.0}, "epsilon is given; it decides by itself, for choose='greedy' without density or seconds"),
        ({"epsilon": 1.0, "choose": "greedy", "density": 0.5}, "epsilon is given; it decides by itself"),
        ({"phases": -1}, "phases, rows and steps are at least 0"),
        ({"probes": 0}, "probes at least 1"),
        ({"seconds": -1.0}, "seconds, epsilon and weight are at least 0"),
        ({"phases": 2.5}, "phases takes a int"),
        ({"heads": 2}, "unknown key 'heads'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        construct(HeadSearch, Spec("heads", options))  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"density": 0.5, "passes": (FuseHeads(), SPARSE)}, "the first --pass is sparse-attention"),
        ({"density": 0.5, "passes": ()}, "the first --pass is sparse-attention"),
        ({}, "give --quality, or a budget as heads(density=0.25) or heads(seconds=0.5)"),
        ({"density": 0.5, "effort": "heroic"}, "effort 'heroic' is unknown"),
        ({"goal": "psnr>=20", "table": "t.safetensors"}, "says nothing of quality; add density or seconds"),
        ({"density": 0.5, "table": "t.safetensors"}, "table t.safetensors: cannot be read"),
        ({"seconds": 1e-9}, "all but self-attention is predicted to take"),
        ({"density": 0.1, "passes": (SparseAttention(block=16, patterns=("diagonal(density=0.5)",)),)}, "cheapest"),
        ({"goal": "ssim>=0.9,psnr>=3,motion_psnr>=200,x>=3"}, "metric 'x' is unknown"),
        (
            {"density": 0.5, "passes": (SparseAttention(tokens="tokens(frames=3, height=3, width=3)"),)},
            "the graph shows tokens(frames=4, height=4, width=4)",
        ),
    ],
)
def test_a_wrong_request_is_one_line(run, options: dict[str, object], says: str) -> None:
    with pytest.raises((UsageError, SpecError)) as caught:
        run(**options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_another_shape_is_one_line(run, denoiser: Program, tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table_of(denoiser, path, 4)
    with pytest.raises(UsageError, match=r"holds errors \(4, 4, 5\); this model has 5 steps, 4 heads and 5 options"):
        run(density=0.5, table=str(path))


def test_a_model_without_weights_is_one_line(run, denoiser: Program) -> None:
    with pytest.raises(UsageError, match="a search measures, and the weights are on the meta device"):
        run(density=0.5, program=Program(denoiser.graph, meta_weights(denoiser.graph.params)))


def test_a_model_whose_heads_take_no_pattern_is_refused_with_the_reason(run, program: Program) -> None:
    with pytest.raises(Unsupported, match="strategy heads: three calls no attention"):
        run(density=0.5, program=program)
    with pytest.raises(Unsupported, match=r"offers no head a pattern.*%blocks.0.*#0: .*diagonal\(density=0.01\)"):
        run(density=0.5, passes=(SparseAttention(block=16, patterns=("diagonal(density=0.01)",)),))
    with pytest.raises(Unsupported, match=r"offers no head a pattern.*: no patterns are given"):
        run(density=0.5, passes=(SparseAttention(block=16, patterns=()),))


SAMPLER = FlowMatchEuler(steps=3, shift=3.0, guidance=3.0)
WHOLE = wan.wan_mini


def first_block() -> models.Model:
    """wan-mini cut down to its first block, for videos of two small frames: 2 x 4 x 4 tokens."""
    whole = WHOLE()

    def build() -> nn.Module:
        module = whole.build()
        module.blocks = module.blocks[:1]
        return module

    def inputs() -> dict[str, Tensor]:
        video = noise((3, 2, 16, 16), seed=0, count=2).to(torch.get_default_device())
        return {**whole.inputs(), "hidden_states": video}

    return replace(whole, build=build, inputs=inputs, weights=None, sampler=SAMPLER)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subjects.Subject]:
    """wan-mini, which is its first block as long as this lives, traced; splits are of two videos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "wan_mini", first_block)
        patch.setitem(subjects.SAMPLES, "quick", {"calibration": 2, "validation": 2, "held-out": 2})  # type: ignore[arg-type]
        patch.setenv("INTARSIA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield subjects.resolve("wan-mini")


def test_a_samplers_loop_records_runs_side_by_side_and_switches_by_step(small: subjects.Subject) -> None:
    work = subjects.workload(small, seed=0, effort="quick", progress=Silent(), record=False)
    assert work.calibration == ()
    loop = work.loop
    assert loop is not None
    assert loop.steps == 3
    module, seen = small.program.module(), []

    def watched(*inputs: Tensor) -> tuple[Tensor, ...]:
        seen.append(inputs)
        with torch.no_grad():
            return tuple(module(*inputs))

    whole = work.outputs(watched, "validation", Silent())
    assert len(seen) == 6
    recorded = loop.record("validation", [2, 0], Silent())
    for calls, step in zip(recorded, (2, 0), strict=True):
        assert len(calls) == 2
        for number, call in enumerate(calls):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(call, seen[3 * number + step], strict=True))
    with torch.no_grad():
        side_by_side = loop.together(lambda calls: [module(*inputs)[0] for inputs in calls], "validation", Silent())
    assert torch.allclose(side_by_side, whole, atol=1e-5)
    rows = module(*seen[0])[0]
    assert torch.allclose(loop.guide(rows), rows[1:] + 3.0 * (rows[:1] - rows[1:]), atol=1e-5)
    told: list[str] = []

    def told_by(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            told.append(name)
            return watched(*inputs)

        return run

    by_step = loop.by_step([(0, 0, told_by("early")), (1, 2, told_by("late"))])
    assert torch.equal(work.outputs(by_step, "validation", Silent()), whole)
    assert told == ["early", "late", "late"] * 2


HEADS = "sparse-attention(block=16, patterns=('skip', 'diagonal(density=0.5)'))"


@pytest.mark.parametrize("strategy", ["heads(density=0.5, phases=2)", "heads(choose='greedy', density=0.6, weight=3)"])
def test_a_registered_model_is_searched_by_its_sampler(small: subjects.Subject, strategy: str) -> None:
    found = flow.search(small, target="cpu-avx2", passes=(HEADS,), strategy=strategy, effort="quick")
    assert found.complete
    assert found.quality is not None
    assert set(found.quality.metrics) == {"psnr", "ssim", "motion_psnr"}
    assert found.plan.notes["density"] <= 0.6
    again = flow.search(small, target="cpu-avx2", passes=(HEADS,), strategy=strategy, effort="quick")
    assert again.plan.to_json() == found.plan.to_json()


@pytest.mark.usefixtures("small")
def test_a_graph_whose_batch_has_a_name_is_searched_with_the_size_of_its_calls() -> None:
    subject = subjects.resolve("wan-mini", dynamic=subjects.dynamic_axes("wan-mini", ["batch"]))
    assert subject.program.graph.sizes
    found = flow.search(
        subject, target="cpu-avx2", passes=(HEADS,), strategy="heads(density=0.5, phases=1)", effort="quick"
    )
    assert found.complete
    assert found.predicted.seconds < found.baseline.seconds


def test_a_table_needs_no_weights_and_takes_the_samplers_steps(small: subjects.Subject, tmp_path: Path) -> None:
    heads = Heads.of(find_pass(HEADS), small.program.graph, CPU, {})  # type: ignore[arg-type]
    errors = np.ones((3, len(heads.places), heads.width), np.float32)
    errors[:, :, 0] = 0
    path = tmp_path / "t.safetensors"
    save_file({"errors": errors}, path)
    strategy = f"heads(density=0.5, table={str(path)!r})"
    found = flow.search("wan-mini", target="cpu-avx2", passes=(HEADS,), strategy=strategy)
    assert found.complete
    assert found.quality is None
    assert found.plan.notes["density"] <= 0.5
