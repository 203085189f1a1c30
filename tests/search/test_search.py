"""The whole search on a network of three layers: what it promises, and what it does when it is cut short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

import pytest

from intarsia.ir.errors import PlanError, QualityError, UsageError
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.plan import Chosen, Plan
from intarsia.ir.program import meta_weights
from intarsia.ir.rewrite import rewrite
from intarsia.ir.target import Target, load_target
from intarsia.passes.apply import apply
from intarsia.passes.base import Pass
from intarsia.passes.quantize_linear import QuantizeLinear
from intarsia.search.explain import explain
from intarsia.search.journal import Journal
from intarsia.search.quality import Goal
from intarsia.search.roofline import predict
from intarsia.search.search import search
from intarsia.search.trials import Judge

CPU = load_target("cpu-avx2")
PASSES = (QuantizeLinear(),)


@dataclass(frozen=True)
class Scale(Pass):
    """%y = relu(%x) becomes %y = mul(relu(%x), factor): no decision, and harm unless the factor is 1."""

    name: ClassVar[str] = "scale"
    factor: float = 1.0

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        def rule(node: Node) -> Sequence[Node] | None:
            if node.name != "a":
                return None
            plain = replace(node.outputs[0], name="a.plain")
            product_ = Node("aten.mul.Tensor", {"self": Ref("a.plain"), "other": self.factor}, node.outputs)
            return replace(node, outputs=(plain,)), product_

        return graph if "a.plain" in graph.values else rewrite(graph, rule)


def run(program, workload, goal="psnr>=30", **options):
    return search(program, CPU, options.pop("passes", PASSES), workload, Goal.parse(goal), **options)


def test_the_plan_meets_the_goal_saves_bytes_and_replays_without_a_search(program, workload):
    found = run(program, workload)
    assert found.complete
    assert found.quality is not None
    assert found.quality["psnr"].mean >= 30
    assert found.predicted.bytes < found.baseline.bytes / 3
    assert found.gain > 0.2
    graph = apply(Plan.from_json(found.plan.to_json()), program.graph, CPU)
    assert predict(graph, CPU).bytes == found.predicted.bytes


@pytest.mark.parametrize("level", [20, 28, 36, 60])
def test_no_cheaper_selection_meets_the_goal_than_the_one_found(program, workload, level):
    """64 selections are measured one by one; the search measures a few of them."""
    goal = Goal.parse(f"psnr>={level}")
    found = run(program, workload, str(goal), minimize="bytes", effort="full")
    judge = Judge(program, workload, Journal(), _Told(), _Never())
    best = min(
        predict(graph, CPU).bytes
        for options in product(("keep", "i8", "i4(group=32)", "i4(group=64)"), repeat=3)
        for graph in [PASSES[0].run(program.graph, CPU, dict(zip(("first", "second", "third"), options, strict=True)))]
        if goal.confidence_margin(judge.quality(graph)) >= 0
    )
    assert found.predicted.bytes <= best * 1.15
    assert len(found.tried) < 17


class _Told:
    def start(self, phase, total):
        pass

    def advance(self, done=1, *, note=""):
        pass

    def finish(self):
        pass


class _Never:
    def check(self):
        pass


def test_a_stricter_goal_never_gives_a_smaller_engine(program, workload):
    sizes = [run(program, workload, f"psnr>={level}").predicted.bytes for level in (15, 30, 45, 100)]
    assert sizes == sorted(sizes)


def test_a_goal_beyond_rounding_keeps_every_layer_and_reports_no_gain(program, workload):
    found = run(program, workload, "psnr>=140")
    assert found.plan.phases[0].steps[0].chosen == {}
    assert found.gain == 0


def test_a_goal_out_of_reach_says_what_was_reached(program, workload):
    with pytest.raises(QualityError, match=r"psnr>=151 cannot be reached.*psnr 150.00 of 151"):
        run(program, workload, "psnr>=151")
    harm = Scale(factor=0.5)
    with pytest.raises(QualityError, match="with every place left as it is"):
        run(program, workload, "psnr>=60", passes=(harm, *PASSES))


def test_a_pass_without_choices_simply_runs_and_is_part_of_the_plan(program, workload):
    found = run(program, workload, passes=(Scale(factor=1.0), *PASSES))
    runs = [step.run for step in found.plan.phases[0].steps]
    assert runs == ["scale", "quantize-linear"]
    assert found.plan.phases[0].steps[1].chosen
    assert "a.plain" in found.predicted.nodes
    named = run(program, workload, passes=(Scale(),), notations=("mine.py:Scale",))
    assert [step.run for step in named.plan.phases[0].steps] == ["mine.py:Scale"]


def test_two_passes_that_decide_are_solved_together(program, workload):
    found = run(program, workload, passes=(QuantizeLinear(min_rows=65), QuantizeLinear()))
    assert [bool(step.chosen) for step in found.plan.phases[0].steps] == [False, True]


def test_held_out_noise_is_never_asked_for(program, workload_of):
    asked: list[str] = []
    run(program, workload_of(asked))
    assert set(asked) == {"validation"}


def test_the_same_search_gives_the_same_plan_to_the_byte_with_and_without_a_journal(program, workload, tmp_path):
    texts = [
        run(program, workload).plan.to_json(),
        run(program, workload, journal=Journal(tmp_path / "a.jsonl")).plan.to_json(),
        run(program, workload, journal=Journal(tmp_path / "a.jsonl")).plan.to_json(),
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_full_journal_answers_without_running_anything(program, workload_of, tmp_path):
    asked: list[str] = []
    run(program, workload_of(asked), journal=Journal(tmp_path / "a.jsonl"))
    before = len(asked)
    run(program, workload_of(asked), journal=Journal(tmp_path / "a.jsonl"))
    assert len(asked) == before


def test_when_the_time_is_spent_the_best_so_far_is_returned_and_marked(program, workload):
    found = run(program, workload, budget=0.0)
    assert not found.complete
    assert found.plan.notes["complete"] is False
    assert found.plan.phases[0].steps[0].chosen == {}
    assert apply(found.plan, program.graph, CPU) == program.graph


def test_when_the_time_is_spent_among_trials_the_best_one_is_returned(program, workload, monkeypatch):
    whole = run(program, workload, "psnr>=40")
    assert len(whole.tried) > 3
    clock = iter(range(10_000))
    monkeypatch.setattr("intarsia.search.trials.time.monotonic", lambda: next(clock))
    used = [run(program, workload, "psnr>=40", budget=seconds) for seconds in range(20, 70, 5)]
    cut = [found for found in used if not found.complete]
    assert any(len(found.tried) > 2 for found in cut)
    for found in cut:
        assert found.predicted.bytes >= whole.predicted.bytes
        assert found.quality is None or found.quality["psnr"].mean >= 40
    assert used[-1].plan == whole.plan


def test_minimizing_seconds_alone_leaves_layers_that_would_not_be_faster(program, workload):
    free = replace(CPU, bandwidth=1e30, launch=0.0)
    found = search(program, free, PASSES, workload, Goal.parse("psnr>=10"), minimize="seconds")
    assert found.plan.phases[0].steps[0].chosen == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort": "heroic"}, "effort 'heroic' is unknown. Known: quick, default, full"),
        ({"minimize": "joules"}, "minimize 'joules' is unknown. Known: both, seconds, bytes"),
        ({"goal": "ssim>=0.9"}, "ssim does not apply"),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(program, workload, options, message):
    with pytest.raises(UsageError) as caught:
        run(program, workload, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_on_the_meta_device_cannot_be_searched(program, workload):
    with pytest.raises(UsageError, match="meta device"):
        run(replace(program, weights=meta_weights(program.graph.params)), workload)


def test_a_keyboard_interrupt_passes_through_and_leaves_the_journal_readable(program, workload, tmp_path):
    class Impatient(_Told):
        count = 0

        def advance(self, done=1, *, note=""):
            self.count += 1
            if self.count == 5:
                raise KeyboardInterrupt

    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(program, workload, journal=Journal(path), progress=Impatient())
    again = Journal(path)
    assert again.broken == 0
    assert len(again) >= 4
    assert run(program, workload, journal=again).plan == run(program, workload).plan


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from intarsia.ir.program import Program
import importlib.util
spec = importlib.util.spec_from_file_location("toys", sys.argv[3])
toys = importlib.util.module_from_spec(spec); spec.loader.exec_module(toys)
import torch
from intarsia.ir.graph import Graph
from intarsia.ir.target import load_target
from intarsia.passes.quantize_linear import QuantizeLinear
from intarsia.search.journal import open_journal
from intarsia.search.quality import Goal
from intarsia.search.search import search

class Slow:
    def start(self, phase, total): pass
    def advance(self, done=1, *, note=""): time.sleep(float(sys.argv[4]))
    def finish(self): pass

generator = torch.Generator().manual_seed(0)
graph = Graph.parse(toys.THREE_LAYERS)
program = Program(graph, {p.name: torch.randn(64, 64, generator=generator) / 8 for p in graph.params})
workload = toys.make_workload()
found = search(program, load_target("cpu-avx2"), (QuantizeLinear(),), workload, Goal.parse("psnr>=30"),
               journal=open_journal(program, workload), progress=Slow())
Path(sys.argv[1]).write_text(found.plan.to_json())
"""


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_ends_with_the_same_plan(tmp_path: Path):
    toys = Path(__file__).parent / "conftest.py"

    def start(plan: str, cache: str, pause: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / plan), str(tmp_path), str(toys), str(pause)]
        environment = {**os.environ, "INTARSIA_CACHE_DIR": str(tmp_path / cache), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment)

    assert start("whole.json", "one", 0.0).wait(120) == 0
    killed = start("killed.json", "two", 0.2)
    end = time.monotonic() + 120
    while sum(len(path.read_bytes().splitlines()) for path in (tmp_path / "two").rglob("*.jsonl")) < 6:
        assert killed.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    assert not (tmp_path / "killed.json").exists()
    (journal,) = (tmp_path / "two").rglob("*.jsonl")
    before = journal.read_bytes()
    journal.write_bytes(before[:-3])
    assert start("resumed.json", "two", 0.0).wait(120) == 0
    assert journal.read_bytes().startswith(before[:-3])
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "whole.json").read_text()


def test_explain_tells_for_every_place_what_each_option_brings_and_why_one_was_chosen(program, workload):
    found = run(program, workload)
    told = explain(found.plan, program.graph, CPU)
    assert [row.place for row in told.rows] == ["first", "second", "third"]
    for row in told.rows:
        assert row.chosen in [option.option for option in row.options]
        assert row.options[0].error == 0
        assert row.options[1].bytes == -(64 * 64 * 4 - 64 * 64 - 4 * 64)
        assert row.options[1].error > 0
    assert "saves" in told.rows[0].why
    assert json.loads(json.dumps(told.to_json()))["notes"]["goal"] == "psnr>=30"


def test_explain_predicts_costs_for_a_plan_written_by_hand_and_gives_reasons_of_refused_places(program):
    plan = Plan.from_json(
        json.dumps({
            "version": 1, "graph": program.graph.fingerprint, "target": "cpu-avx2", "notes": {},
            "phases": [{"first": 0, "last": None, "steps": [
                {"run": "quantize-linear", "chosen": {"first": "i8"}},
                {"run": "quantize-linear(min_rows=65)", "chosen": {}}]}],
        })
    )  # fmt: skip
    told = explain(plan, program.graph, CPU)
    first = told.rows[0]
    assert (first.chosen, first.options[1].error) == ("i8", None)
    assert first.options[1].bytes == -(64 * 64 * 4 - 64 * 64 - 4 * 64)
    assert any(row.options == () and "65" in row.why for row in told.rows)


def test_explain_refuses_a_plan_that_asks_for_what_is_not_offered(program, workload):
    plan = run(program, workload).plan
    step = replace(plan.phases[0].steps[0], chosen={"first": "fp4"})
    wrong = replace(plan, phases=(replace(plan.phases[0], steps=(step,)),))
    with pytest.raises(PlanError, match="the plan asks for fp4"):
        explain(wrong, program.graph, CPU)
