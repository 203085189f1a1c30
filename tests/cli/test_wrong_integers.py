"""Integer networks from wrong input: data, ranges, sizes and plans that give none, told in one line with its code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.calibration_flow import calibrated
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import save_weights

from .conftest import Run
from .test_wrong_input import failed

NETWORK = """graph network {{
  input %x: {dtype}[{lines}, {columns}]
  param %up.w: {dtype}[8, {columns}]
  param %up.b: {dtype}[8]
  param %down.w: {dtype}[4, 8]
  %up: {dtype}[{lines}, 8] = aten.linear(input=%x, weight=%up.w, bias=%up.b)
  %between: {dtype}[{lines}, 8] = {between}
  %down: {dtype}[{lines}, 4] = aten.linear(input=%between, weight=%down.w, bias=None)
  return %down
}}
"""

RELU, SOFTMAX = "aten.relu(self=%up)", "aten.softmax.int(self=%up, dim=-1)"
CHOSEN = {"up": "w8a8", "down": "w8a8"}

Network = Callable[..., Path]


@pytest.fixture
def network() -> Network:
    """``network(between=SOFTMAX, columns=16)``: two layers and what is between them, on disk."""

    def write(between: str = RELU, *, columns: int = 16, dtype: str = "f32", bias: float = 0.1) -> Path:
        lines = 4 if columns < 1000 else 1
        graph = Graph.parse(NETWORK.format(between=between, columns=columns, dtype=dtype, lines=lines))
        generator = torch.Generator().manual_seed(0)
        weights: dict[str, Tensor] = {
            param.name: torch.randn(param.type.shape, generator=generator) / 4  # type: ignore[union-attr]
            for param in graph.params
        }
        weights["up.w"][2] = 0.0
        weights["up.b"][:] = bias
        if dtype == "bf16":
            weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
        path = Path("network.graph")
        path.write_text(str(graph))
        save_weights(weights, path.with_suffix(".safetensors"))
        return path

    return write


@pytest.fixture
def data() -> Path:
    """Eight samples for 16 columns."""
    np.save("data.npy", np.random.default_rng(0).standard_normal((8, 16)).astype("f4"))
    return Path("data.npy")


def planned(path: Path, ranges: dict[str, str], chosen: dict[str, str]) -> Path:
    """A plan that makes integers of these ranges, as a person may write it."""
    steps = (Step("calibrate", ranges), Step("quantize-integer", chosen), Step("lower-integer"))
    plan = Plan(Graph.parse(path.read_text()).fingerprint, "null", (Phase(steps),))
    Path("plan.json").write_text(plan.to_json())
    return Path("plan.json")


def ranges(**others: str) -> dict[str, str]:
    one = "range(low=-2.0, high=2.0)"
    return {"x": one, "between": "range(low=0.0, high=2.0)", "down": one, **others}


def export(path: Path, plan: Path) -> list[object]:
    return ["export", path, "--plan", plan, "--target", "null", "--backend", "null", "-o", "out"]


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        ("empty", None, "--data empty: holds no .npy, .npz, .png"),
        ("absent.npy", None, "--data absent.npy: there is no such file or folder"),
        ("absent", None, "--data absent: there is no such file or folder"),
        ("x.npy", np.nan, "x.npy, sample 5: x holds NaN; leave that sample out, or mend it"),
        ("x.npy", np.inf, "x.npy, sample 5: x holds infinity; leave that sample out, or mend it"),
        ("x.npy", -np.inf, "x.npy, sample 5: x holds infinity; leave that sample out, or mend it"),
    ],
)
def test_calibration_without_data_or_with_numbers_that_are_none_writes_no_plan(
    name: str, numbers: float | None, said: str, network: Network, intarsia: Run
) -> None:
    path = network()
    Path("empty").mkdir()
    if numbers is not None:
        found = np.zeros((8, 16), "f4")
        found[0, 0], found[5, 3] = 1.0, numbers
        np.save(name, found)
    failed(intarsia("calibrate", path, "--data", name, "-o", "plan.json"), 2, said)
    assert not Path("plan.json").exists()
    with pytest.raises(UsageError) as caught:
        calibrated(path, name)
    assert said in str(caught.value)


def test_integers_in_the_data_are_no_network_input(network: Network, intarsia: Run) -> None:
    np.save("x.npy", np.ones((8, 16), "i1"))
    said = "x.npy, sample 0: x holds int8; the graph takes f32[4, 16], as the network reads it"
    failed(intarsia("calibrate", network(), "--data", "x.npy", "-o", "plan.json"), 2, said)


def test_numbers_that_overflow_inside_the_network_are_told_with_the_value(network: Network, intarsia: Run) -> None:
    np.save("x.npy", np.linspace(1e37, 3e38, 128, dtype="f4").reshape(8, 16))
    said = "calibration data, batch 1: %between holds infinity; leave that sample out, or mend it"
    failed(intarsia("calibrate", network(), "--data", "x.npy", "-o", "plan.json"), 2, said)


def test_a_channel_without_weights_is_warned_of_and_becomes_integers(
    network: Network, data: Path, intarsia: Run
) -> None:
    path = network()
    told = intarsia("calibrate", path, "--data", data, "-o", "ranges.json", "--json")
    assert "warning: %up: the weights of 1 of 8 channels are all zero: dead channels 2" in told.stderr
    found = {name: f"range(low={low}, high={high})" for name, (low, high) in json.loads(told.stdout)["ranges"].items()}
    result = intarsia(*export(path, planned(path, found, CHOSEN)))
    assert result.exit_code == 0, result.stderr
    assert "integers   only, from where inputs are rounded" in result.stdout


def test_an_activation_that_was_zero_is_warned_of_and_refused_as_an_integer(
    network: Network, data: Path, intarsia: Run
) -> None:
    path = network(bias=-1000.0)
    told = intarsia("calibrate", path, "--data", data, "-o", "ranges.json", "--json")
    said = "%between was zero on all calibration data; a range of 0 has no scale, calibrate on data that reaches it"
    assert f"warning: {said}" in told.stderr
    found = {name: f"range(low={low}, high={high})" for name, (low, high) in json.loads(told.stdout)["ranges"].items()}
    failed(intarsia(*export(path, planned(path, found, CHOSEN))), 2, f"nothing to choose at %down: {said}")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("edited", "chosen", "said"),
    [
        ({"between": "range(low=0.0, high=1e-38)"}, CHOSEN, "calibrated to 0.0 to 1e-38; its scale underflows f32"),
        ({"between": "range(low=0.0, high=0.0)"}, CHOSEN, "a range of 0 has no scale"),
        ({"between": "range(low=2.0, high=1.0)"}, CHOSEN, "calibrate: %between offers keep; the plan asks for"),
        ({"between": "range(low=0.0, high=nan)"}, CHOSEN, "calibrate: %between offers keep; the plan asks for"),
        ({"between": "span(0, 1)"}, CHOSEN, "calibrate: %between offers keep; the plan asks for span(0, 1)"),
        ({"between": "keep"}, CHOSEN, "%between has no calibrated range; run calibrate first"),
        ({"betwen": "range(low=0.0, high=1.0)"}, CHOSEN, "calibrate: nothing to choose at %betwen"),
        ({}, {"up": "w3a8"}, "quantize-integer: %up offers keep, w8a8; the plan asks for w3a8"),
        ({}, {"down": "w4a4"}, "the last layer stays in 8 bits (HAWQ-V3, bit_config.py)"),
        ({}, {"between": "w8a8"}, "quantize-integer: nothing to choose at %between"),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_told_by_every_verb(
    edited: dict[str, str], chosen: dict[str, str], said: str, network: Network, intarsia: Run
) -> None:
    path = network()
    plan = planned(path, ranges(**edited), chosen)
    failed(intarsia(*export(path, plan)), 2, said)
    failed(intarsia("explain", path, "--plan", plan), 2, said)
    assert not Path("out").exists()


def test_a_range_that_no_multiplier_reaches_is_told_when_weights_are_rounded(network: Network, intarsia: Run) -> None:
    path = network()
    plan = planned(path, ranges(down="range(low=-1e-30, high=1e-30)"), CHOSEN)
    failed(intarsia(*export(path, plan)), 2, "a multiplier and a shift stand for numbers from 0 to 2**30, found 1.18")


def test_a_plan_for_another_graph_is_told_by_every_verb(network: Network, intarsia: Run) -> None:
    plan = planned(network(SOFTMAX), ranges(), CHOSEN)
    path = network()
    for words in (export(path, plan), ["explain", path, "--plan", plan]):
        failed(intarsia(*words), 2, "graph network: its fingerprint is", "the plan was made for")


def test_a_sum_that_int32_may_not_hold_is_refused(network: Network, intarsia: Run) -> None:
    path = network(columns=131_072)
    said = "a sum of 131,072 products of 8-bit weights and codes up to 128"
    failed(intarsia(*export(path, planned(path, ranges(), CHOSEN))), 2, f"at %up: {said}", "int32", "fit")
    kept = intarsia("explain", path, "--plan", planned(path, ranges(), {"down": "w8a8"}), "--place", "up")
    assert said in " ".join(kept.stdout.split())


def test_weights_of_sixteen_bits_are_refused_with_what_integers_are_made_of(network: Network, intarsia: Run) -> None:
    path = network(dtype="bf16")
    plan = planned(path, ranges(), CHOSEN)
    failed(intarsia(*export(path, plan)), 2, "weight is bf16[4, 8]; integer layers are made of f32")


def test_what_has_no_integer_form_is_listed_wherever_a_user_looks(network: Network, intarsia: Run) -> None:
    path = network(SOFTMAX)
    plan = planned(path, ranges(up="range(low=-4.0, high=4.0)"), CHOSEN)
    explained = intarsia("explain", path, "--plan", plan)
    made = intarsia(*export(path, plan))
    looked = intarsia("inspect", "out")
    for result in (explained, made, looked):
        assert result.exit_code == 0, result.stderr
        assert (
            "integers   not only, 1 operator left in float\n           %between: aten.softmax.int is" in result.stdout
        )
    (line,) = json.loads(intarsia("inspect", "out", "--json").stdout)["in_float"]
    assert json.loads(intarsia("explain", path, "--plan", plan, "--json").stdout)["in_float"] == [line]
    page = Path("out/report.html").read_text()
    assert "1 operator in float" in page
    assert line.split(":")[1].strip().split()[0] in page


def test_explain_asks_later_passes_about_calibrated_values(network: Network, intarsia: Run) -> None:
    path = network()
    rows = json.loads(intarsia("explain", path, "--plan", planned(path, ranges(), CHOSEN), "--json").stdout)["rows"]
    by_pass = {
        run: {row["place"]: row for row in rows if row["run"] == run} for run in ("calibrate", "quantize-integer")
    }
    assert by_pass["calibrate"]["x"]["chosen"] == "range(low=-2.0, high=2.0)"
    assert by_pass["calibrate"]["x"]["why"] == "later passes read it; it costs nothing itself"
    assert [option["option"] for option in by_pass["quantize-integer"]["up"]["options"]] == ["keep", "w8a8"]
    assert by_pass["quantize-integer"]["up"]["chosen"] == "w8a8"
    assert by_pass["quantize-integer"]["up"]["options"][1]["bytes"] < 0


def test_a_network_in_float_says_nothing_about_integers(network: Network, intarsia: Run) -> None:
    path = network()
    told = intarsia("export", path, "--target", "null", "--backend", "null", "-o", "out", "--json")
    assert "in_float" not in json.loads(told.stdout)


def test_python_raises_what_the_command_line_says(network: Network) -> None:
    from intarsia import flow

    path = network()
    plan = Plan.load(planned(path, ranges(between="range(low=0.0, high=1e-38)"), CHOSEN))
    with pytest.raises(PlanError, match="its scale underflows f32"):
        flow.export(path, plan, backends=["null"], target="null", output=Path("out"))
    with pytest.raises(PlanError, match="its scale underflows f32"):
        flow.explain(path, plan)
