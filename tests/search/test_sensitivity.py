"""An error measured on shared values is the error of running the whole changed graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from intarsia.ir.program import Program
from intarsia.ir.target import load_target
from intarsia.passes.quantize_linear import QuantizeLinear
from intarsia.search import sensitivity
from intarsia.search.journal import Journal
from intarsia.search.sensitivity import difference, sensitivities

TARGET = load_target("null")


def changed(program: Program, place: str, option: str):
    return QuantizeLinear().run(program.graph, TARGET, {place: option})


def test_only_what_depends_on_the_change_runs_again(program):
    found = difference(program.graph, changed(program, "second", "i8"))
    assert [node.op for node in found.nodes] == ["intarsia.quantize_rows", "intarsia.linear_i8"]
    assert [node.name for node in found.again if node.op.startswith("aten")] == ["b", "third"]


def test_the_fingerprint_of_a_difference_tells_options_and_places_apart(program):
    pairs = [(place, option) for place in ("first", "second") for option in ("i8", "i4(group=32)", "i4(group=64)")]
    found = {difference(program.graph, changed(program, *pair)).fingerprint for pair in pairs}
    assert len(found) == len(pairs)


@pytest.mark.parametrize("place", ["first", "second", "third"])
def test_agrees_with_running_both_graphs_from_the_start(program, workload, place):
    after = changed(program, place, "i4(group=64)")
    error = norm = 0.0
    for batch in workload.calibration:
        (ours,), (theirs,) = Program(after, program.weights).module()(*batch), program.module()(*batch)
        error += float((ours.double() - theirs.double()).square().sum())
        norm += float(theirs.double().square().sum())
    (found,) = sensitivities(program, [lambda: after], workload.calibration, journal=Journal(), measured=lambda: None)
    assert found == pytest.approx(error / norm, rel=1e-6)
    assert 1e-5 < found < 0.1


def test_fewer_bits_bring_more_error(program, workload):
    options = ["i8", "i4(group=32)", "i4(group=64)"]
    found = sensitivities(
        program,
        [partial(changed, program, "second", option) for option in options],
        workload.calibration,
        journal=Journal(),
        measured=lambda: None,
    )
    assert list(found) == sorted(found)
    assert found[0] < found[1] / 10


def test_what_the_journal_knows_is_not_run_again_and_gives_the_same_numbers(program, workload, monkeypatch, tmp_path):
    changes = [partial(changed, program, "first", option) for option in ("i8", "i4(group=32)")]
    arguments = (program, changes, workload.calibration)
    path = tmp_path / "a.jsonl"
    first = sensitivities(*arguments, journal=Journal(path), measured=lambda: None)
    monkeypatch.setattr(sensitivity, "call", None)
    monkeypatch.setattr(sensitivity, "evaluate_nodes", None)
    assert sensitivities(*arguments, journal=Journal(path), measured=lambda: None) == first


def test_a_change_that_computes_the_same_has_no_error(program, workload):
    (found,) = sensitivities(
        program, [lambda: program.graph], workload.calibration, journal=Journal(), measured=lambda: None
    )
    assert found == 0.0


def test_tells_after_every_measurement(program, workload):
    told: list[int] = []
    changes = [partial(changed, program, "first", "i8")] * 2
    sensitivities(program, changes, workload.calibration, journal=Journal(), measured=lambda: told.append(1))
    assert len(told) == 2 * len(workload.calibration)


def test_gradients_are_not_kept(program, workload):
    weights = {name: tensor.requires_grad_() for name, tensor in program.weights.items()}
    (found,) = sensitivities(
        Program(program.graph, weights),
        [partial(changed, program, "first", "i8")],
        workload.calibration,
        journal=Journal(),
        measured=lambda: None,
    )
    assert found > 0
    assert torch.is_grad_enabled()
