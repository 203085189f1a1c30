"""Factors are found where channels differ, they make rounding cost less, and whoever asks twice gets the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target, load_target
from intarsia.passes.calibrate import Calibrate
from intarsia.passes.integer_only import integer_only
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.smooth_linear import SmoothLinear
from intarsia.passes.smooth_linear_maps import Factors, map_of
from intarsia.search.calibration import calibrate, find_method
from intarsia.search.smoothing import smooth

FEED_FORWARD = """graph feed_forward {
  input %x: f32[64, 32]
  param %gain: f32[32]
  param %offset: f32[32]
  param %first: f32[32, 32]
  param %up: f32[64, 32]
  param %up.bias: f32[64]
  param %down: f32[32, 64]
  param %last: f32[8, 32]
  %a: f32[64, 32] = aten.linear(input=%x, weight=%first, bias=None)
  %n: f32[64, 32] = aten.layer_norm(input=%a, normalized_shape=[32], weight=%gain, bias=%offset, eps=1e-06, cudnn_enable=False)
  %u: f32[64, 64] = aten.linear(input=%n, weight=%up, bias=%up.bias)
  %g: f32[64, 64] = aten.gelu(self=%u)
  %d: f32[64, 32] = aten.linear(input=%g, weight=%down, bias=None)
  %y: f32[64, 8] = aten.linear(input=%d, weight=%last, bias=None)
  return %y
}
"""  # noqa: E501

METHOD = find_method("minmax(widest=True)")


@pytest.fixture(scope="module")
def feed_forward() -> Program:
    """The end of a transformer's block: three channels of its norm are thirty times as large, their weights small."""
    graph, generator = Graph.parse(FEED_FORWARD), torch.Generator().manual_seed(0)
    weights = {
        param.name: torch.randn(param.type.shape, generator=generator) / 6  # type: ignore[union-attr]
        for param in graph.params
    }
    large = torch.arange(32) % 11 == 0
    weights["gain"], weights["offset"] = torch.where(large, 30.0, 1.0), torch.zeros(32)
    weights["up"] = torch.where(large, weights["up"] / 30, weights["up"])
    return Program(graph, weights)


def _batches() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]


def _integers(program: Program, target: Target, chosen: dict[str, str], option: str) -> Program:
    """The program in integers, after the smoothing that is asked for."""
    graph = SmoothLinear().run(program.graph, target, chosen)
    graph = Calibrate().run(graph, target, calibrate(Program(graph, program.weights), _batches(), METHOD))
    offered = QuantizeInteger().choices(graph, target)
    bits = {layer: option if option in options else "w8a8" for layer, options in offered.items()}
    graph = LowerInteger().run(QuantizeInteger().run(graph, target, bits), target, {})
    return materialize(Program(graph, program.weights))


def _error(program: Program, changed: Program) -> float:
    (batch,) = _batches()[:1]
    (expected,), (found,) = program.module()(*batch), changed.module()(*batch)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("option", "share"), [("w8a8", 0.2), ("w4a8", 0.5), ("w4a4", 0.5)])
def test_smoothed_layers_in_integers_are_nearer_to_float(feed_forward: Program, option: str, share: float) -> None:
    target = load_target("null")
    found = smooth(feed_forward, _batches(), bits=option, method=METHOD)
    plain = _error(feed_forward, _integers(feed_forward, target, {}, option))
    assert _error(feed_forward, _integers(feed_forward, target, dict(found.chosen), option)) < share * plain


def test_large_channels_are_divided(feed_forward: Program) -> None:
    found = smooth(feed_forward, _batches(), method=METHOD)
    norm = map_of(found.chosen["n"])
    assert isinstance(norm, Factors)
    large = [exponent for number, exponent in enumerate(norm.exponents) if number % 11 == 0]
    assert min(large) >= 2 + max(set(norm.exponents) - set(large))
    tried = found.errors["n"]
    assert tried[found.best["n"]] < 0.01 * tried["keep"]


def test_a_value_on_one_side_of_zero_is_shifted(feed_forward: Program) -> None:
    batches = [(batch + 4,) for (batch,) in _batches()]
    found = smooth(feed_forward, batches, method=METHOD)
    shifted = map_of(found.chosen["x"])
    assert isinstance(shifted, Factors)
    assert min(shifted.offsets) > 0
    assert found.best["x"].endswith("shifted")


def test_the_same_data_gives_the_same_answer(feed_forward: Program) -> None:
    assert smooth(feed_forward, _batches(), method=METHOD) == smooth(feed_forward, _batches(), method=METHOD)


def test_a_rotation_is_taken_where_it_does_better(feed_forward: Program) -> None:
    found = smooth(feed_forward, _batches(), bits="w4a4", method=METHOD, alphas=(), blocks=(32, 48))
    assert found.chosen["g"] == "rotate(block=32)"
    assert all("48" not in name for tried in found.errors.values() for name in tried)


def test_every_integer_layer_behind_smoothing_is_exact_in_onnx_runtime(feed_forward: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from dataclasses import replace

    from intarsia.backends.onnx import OnnxBackend
    from intarsia.ir.execute import call

    target = load_target("null")
    found = smooth(feed_forward, _batches(), bits="w4a8", method=METHOD)
    ready = _integers(feed_forward, target, dict(found.chosen), "w4a8")
    layers = list(ready.graph.find("intarsia.linear_i8i8"))
    names = tuple(dict.fromkeys(name for layer in layers for name in (layer.ref("input"), layer.name)))
    shown = Program(replace(ready.graph, outputs=names), ready.weights)
    built = OnnxBackend().build(shown, target, tmp_path)
    engine = OnnxBackend().load(tmp_path, built.files)
    codes = dict(zip(names, engine(*_batches()[0]), strict=True))
    assert len(layers) == 4
    for layer in layers:
        (expected,) = call(layer, {**ready.weights, layer.ref("input"): codes[layer.ref("input")]})
        assert torch.equal(codes[layer.name], expected)


def test_what_stays_in_float_is_listed_with_its_reason(feed_forward: Program) -> None:
    target = load_target("null")
    found = smooth(feed_forward, _batches(), method=METHOD)
    lines = integer_only(_integers(feed_forward, target, dict(found.chosen), "w8a8").graph)
    assert any(line.startswith("%n: aten.layer_norm ") for line in lines)
    assert any(line.startswith("%g: aten.gelu ") for line in lines)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "calibration data: there is none; give at least one batch"),
        ([(torch.full((64, 32), torch.nan),)], "calibration data, batch 0: %x is not finite; leave that sample out"),
    ],
)
def test_data_that_is_none_is_refused(feed_forward: Program, batches: list[tuple[Tensor, ...]], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        smooth(feed_forward, batches)
    assert str(refused.value) == said


def test_a_network_without_linear_layers_is_refused(with_conv: Callable[[], Program]) -> None:
    with pytest.raises(UsageError, match="graph conv: nothing to smooth; it has no linear layer"):
        smooth(with_conv(), _batches())


@pytest.fixture
def with_conv() -> Callable[[], Program]:
    text = """graph conv {
  input %x: f32[1, 2, 4, 4]
  param %w: f32[2, 2, 1, 1]
  %y: f32[1, 2, 4, 4] = aten.conv2d(input=%x, weight=%w, bias=None)
  return %y
}"""
    return lambda: Program(Graph.parse(text), {"w": torch.ones(2, 2, 1, 1)})
