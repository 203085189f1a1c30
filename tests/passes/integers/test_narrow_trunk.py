"""A trunk of eight bits: its grids, what they may clip, and engines that add on it by one exact operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from intarsia.backends.base import find_backend
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.passes.conformance import check_pass
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger

Filled = Callable[[Graph], Program]
Calibrated = Callable[[Program], Program]
Ranges = Mapping[str, tuple[float, float]]

NARROW = QuantizeInteger(trunk=8)

RANGES = {
    "x": (-2.0, 2.0), "stem.relu": (0.0, 3.0), "pool": (0.0, 3.0), "one.relu": (0.0, 5.0), "two": (-9.0, 6.0),
    "sum.relu": (0.0, 7.0), "three": (-15.0, 4.0), "down": (-2.0, 11.0), "join.relu": (0.0, 8.0), "mean": (0.0, 8.0),
    "fc": (-1.0, 1.0),
}  # fmt: skip


def on_grids(graph: Graph, target: Target, option: str = "w8a8") -> Graph:
    choices = NARROW.choices(graph, target)
    return NARROW.run(
        graph, target, {place: option if option in offered else "w8a8" for place, offered in choices.items()}
    )


def steps(graph: Graph) -> dict[str, float]:
    return {node.name: float(str(node.args["scale"])) for node in graph.find("intarsia.fake_quantize")}


@pytest.fixture
def integer(residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target) -> Program:
    """The residual network of two pictures in integers, every sum of eight bits."""
    fixed = Graph.parse(str(residual).replace("  size N in [1, inf]\n", "").replace("[N,", "[2,"))
    program = calibrated(with_weights(fixed))
    graph = LowerInteger().run(on_grids(program.graph, target), target, {})
    return materialize(Program(graph, program.weights))


def test_layers_read_an_eight_bit_sum_as_it_is(
    residual: Graph, with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    found = on_grids(with_ranges(residual, RANGES), target)
    ends = {node.name: (node.args["low"], node.args["high"]) for node in found.find("intarsia.fake_quantize")}
    assert ends.pop("fc.i16") == (-32_768, 32_767)
    assert set(ends.values()) == {(-128, 127)}
    assert list(ends) == [
        f"{name}.i8" for name in ("x", "stem.relu", "one.relu", "two", "sum.relu", "three", "down", "join.relu", "mean")
    ]
    producers = found.producers
    assert producers["sum"].inputs == ("two.i8", "pool")
    assert producers["one"].ref("input") == "pool"
    assert producers["three"].ref("input") == producers["down"].ref("input") == "sum.relu.i8"


def test_what_is_made_for_a_sum_has_its_step_and_what_is_there_an_odd_part_of_it(
    residual: Graph, with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    found = steps(on_grids(with_ranges(residual, RANGES), target))
    assert found["two.i8"] == found["sum.relu.i8"]
    assert found["three.i8"] == found["down.i8"] == found["join.relu.i8"]
    part = found["stem.relu.i8"] / found["sum.relu.i8"] * 2**12
    assert part == pytest.approx(round(part), abs=1e-9)
    assert round(part) % 2 == 1
    assert found["stem.relu.i8"] == 3 / 127


def test_nothing_is_clipped_that_the_other_operand_could_bring_back(
    residual: Graph, with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    found = steps(on_grids(with_ranges(residual, RANGES), target))
    assert found["sum.relu.i8"] == pytest.approx(7 / 127, rel=1e-3)  # -9 stays below zero beside what is 0 to 3
    assert found["join.relu.i8"] == 15 / 127  # -15 beside 11 would not
    wider = steps(on_grids(with_ranges(residual, {**RANGES, "pool": (0.0, 8.5), "stem.relu": (0.0, 8.5)}), target))
    assert wider["sum.relu.i8"] == pytest.approx(8.5 / 127, rel=1e-3)


def test_four_bit_layers_requantize_an_eight_bit_trunk(
    residual: Graph, with_ranges: Callable[[Graph, Ranges], Graph], target: Target
) -> None:
    found = on_grids(with_ranges(residual, RANGES), target, "w4a4")
    assert found.producers["three"].ref("input") == "sum.relu.u4"
    assert found.producers["sum.relu.u4"].ref("input") == "sum.relu.i8"


def test_both_passes_keep_their_promises(
    residual: Graph, with_weights: Filled, calibrated: Calibrated, target: Target
) -> None:
    program = calibrated(with_weights(residual))
    check_pass(NARROW, program, target)
    check_pass(LowerInteger(), Program(on_grids(program.graph, target), program.weights), target, error=1e-2)
    assert str(NARROW) == "quantize-integer(trunk=8)"


def test_onnx_runtime_adds_by_one_operator_and_gives_what_is_defined(integer: Program, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    _check_engine("onnx", integer, tmp_path)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert found["QLinearAdd"] == len(list(integer.graph.find("intarsia.add_requantized"))) == 2
    assert found["QLinearConv"] == len(list(integer.graph.find("intarsia.conv2d_i8i8"))) == 5


def test_tvm_gives_what_is_defined(integer: Program, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    _check_engine("tvm", integer, tmp_path)


def test_a_trunk_has_sixteen_or_eight_bits() -> None:
    with pytest.raises(ValueError, match="trunk is 12; residual sums have 16 or 8 bits"):
        QuantizeInteger(trunk=12)


def _check_engine(name: str, program: Program, folder: Path) -> None:
    """Codes of all values lie close to both ends here and there, so that sums saturate."""
    backend, target = find_backend(name), load_target("cpu-avx2")
    engine = backend.load(folder, backend.build(program, target, folder).files)
    (x,) = example_inputs(program.graph, seed=11)
    (found,), (expected,) = engine(3 * x), program.module()(3 * x)
    assert torch.equal(found, expected)
    assert expected.unique().numel() > 10
