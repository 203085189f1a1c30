"""Factors and rotations move between what linear layers read and their weights, and the network answers as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from intarsia import flow
from intarsia.ir.errors import PlanError, SpecError
from intarsia.ir.execute import check_types
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.passes.base import check_chosen
from intarsia.passes.calibrate import Calibrate
from intarsia.passes.calibrate import places as calibrated_places
from intarsia.passes.conformance import check_pass
from intarsia.passes.integer_only import integer_only
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.smooth_linear import SmoothLinear, places
from intarsia.passes.smooth_linear_maps import Factors, Rotation, map_of


class Block(nn.Module):
    """A block of a video transformer: modulated norm, attention, a norm with weights, attention to text, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, 32)
        self.text = nn.Linear(6, 16)
        self.plain, self.affine = nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm(16)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, None].chunk(2, -1)
        normed = self.plain(x) * (1 + scale) + shift
        x = x + self.to_out(_attention(self.to_q(normed), self.to_k(normed), self.to_v(normed)))
        words, normed = self.text(text), self.affine(x)
        x = x + self.cross_out(_attention(self.cross_q(normed), self.cross_k(words), self.cross_v(words)))
        return x + self.down(gelu(self.up(x)))


def _attention(*operands: Tensor) -> Tensor:
    query, key, value = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in operands)
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


INPUTS = {"x": (2, 64, 16), "time": (2, 8), "text": (2, 3, 6)}


@pytest.fixture(scope="module")
def block() -> Program:
    """The block in f64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Block().double().eval()
        inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in INPUTS.items()}
    return trace(module, inputs, name="block")


def _inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in INPUTS.values())


def _ready(program: Program, target: Target, chosen: Mapping[str, str]) -> Program:
    return materialize(Program(SmoothLinear().run(program.graph, target, chosen), program.weights))


def _factors(graph: Graph, *, shifted: bool = False) -> dict[str, str]:
    """Random factors, and shifts, for every place."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, str] = {}
    for place in places(graph):
        exponents, offsets = (torch.randn(2, place.channels, generator=generator) * 3).tolist()
        found[place.value] = str(Factors.nearest(exponents, offsets if shifted else ()))
    return found


def _added(before: Program, after: Program) -> list[str]:
    return [node.op for node in after.graph.nodes if node.name not in before.graph.producers]


@pytest.mark.parametrize("shifted", [False, True])
def test_factors_leave_the_answer_as_it_was(block: Program, target: Target, shifted: bool) -> None:
    after = _ready(block, target, _factors(block.graph, shifted=shifted))
    (expected,), (found,) = block.module()(*_inputs()), after.module()(*_inputs())
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("size", [2, 8])
def test_rotations_leave_the_answer_as_it_was(block: Program, target: Target, size: int) -> None:
    chosen = {place.value: f"rotate(block={size})" for place in places(block.graph) if place.channels % size == 0}
    after = _ready(block, target, chosen)
    (expected,), (found,) = block.module()(*_inputs()), after.module()(*_inputs())
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert len(chosen) == (9 if size == 2 else 8)


def _place(program: Program, layer: str) -> str:
    return program.graph.producers[f"{layer}.linear"].ref("input")


@pytest.mark.parametrize("layer", ["to_out", "cross_q", "cross_k", "cross_out"])
def test_factors_cost_nothing_behind_norms_with_weights_layers_and_attention(
    block: Program, target: Target, layer: str
) -> None:
    place = _place(block, layer)
    after = _ready(block, target, {place: _factors(block.graph)[place]})
    assert _added(block, after) == []


@pytest.mark.parametrize(("layer", "size", "free"), [("to_out", 8, True), ("to_out", 16, False), ("cross_k", 16, True)])
def test_a_rotation_goes_through_attention_where_it_stays_inside_a_head(
    block: Program, target: Target, layer: str, size: int, free: bool
) -> None:
    after = _ready(block, target, {_place(block, layer): f"rotate(block={size})"})
    assert ("aten.matmul" in _added(block, after)) is not free


def test_behind_a_modulated_norm_the_scale_and_the_shift_are_multiplied_which_are_few_numbers(
    block: Program, target: Target
) -> None:
    place = _place(block, "to_q")
    after = _ready(block, target, {place: _factors(block.graph)[place]})
    added = [node for node in after.graph.nodes if node.name not in block.graph.producers]
    assert [node.op for node in added] == ["aten.mul.Tensor"] * 2
    assert all(node.type.shape == (2, 1, 16) for node in added)


def test_behind_a_gelu_the_input_is_multiplied(block: Program, target: Target) -> None:
    place = _place(block, "down")
    after = _ready(block, target, {place: _factors(block.graph, shifted=True)[place]})
    assert _added(block, after) == ["aten.mul.Tensor", "aten.sub.Tensor"]
    assert after.graph.producers["down.linear"].args["bias"] is not None


def test_layers_that_read_one_value_share_its_factors(block: Program) -> None:
    groups = {place.layers for place in places(block.graph)}
    assert ("to_q.linear", "to_k.linear", "to_v.linear") in groups
    assert ("cross_k.linear", "cross_v.linear") in groups


def test_a_value_that_others_read_too_stays_and_the_layers_read_a_changed_copy(
    with_weights: Callable[[Graph], Program], target: Target
) -> None:
    program = with_weights(
        Graph.parse(
            """graph g {
  input %x: f32[4, 8]
  param %w: f32[8, 8]
  %a: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=None)
  %b: f32[4, 8] = aten.linear(input=%a, weight=%w, bias=None)
  %y: f32[4, 8] = aten.add.Tensor(self=%a, other=%b)
  return %y
}"""
        )
    )
    after = _ready(program, target, {"a": "smooth(factors='ghijfedc')"})
    assert _added(program, after) == ["aten.mul.Tensor"]
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.module()(x), program.module()(x))


@pytest.mark.parametrize("pass_", [SmoothLinear(), SmoothLinear(block=4)], ids=str)
def test_the_pass_keeps_its_promises(
    pass_: SmoothLinear, mlp: Graph, with_weights: Callable[[Graph], Program], target: Target
) -> None:
    check_pass(pass_, with_weights(mlp), target)


def test_options_read_back_as_they_were_written() -> None:
    for option in ("smooth(factors='AZaz09-_')", "smooth(factors='gg', shifts='fh', unit=0.25)", "rotate(block=32)"):
        assert str(map_of(option)) == option
    assert Factors.nearest([0.0, 1.0, -1.0, 0.26, 100.0, -100.0]).exponents == (0.0, 1.0, -1.0, 0.25, 7.75, -8.0)
    assert Factors.nearest([0.0, 0.0], [1.0, -3.1]).offsets == (pytest.approx(1.0), pytest.approx(-3.1))
    assert Rotation(4) == map_of("rotate(block=4)")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("smooth(factors='gg')", "2 factors are given for 64 channels"),
        ("smooth(factors='g%')", "found '%'"),
        ("smooth(factors='g', shifts='g', unit=1e999)", "unit is a finite number, found inf"),
        ("smooth(factors='gg', shifts='g', unit=1.0)", "2 factors and 1 shifts; there is one of each for a channel"),
        ("rotate(block=12)", "block is a power of two, 2 or more, found 12"),
        ("rotate(block=128)", "64 channels are no multiple of block=128"),
        ("i8", "expected 'smooth(factors=...)' or 'rotate(block=...)', found 'i8'"),
    ],
)
def test_an_option_that_is_none_is_refused(mlp: Graph, target: Target, option: str, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        check_chosen(SmoothLinear(), mlp, target, {"x": option})
    assert said in str(refused.value)
    with pytest.raises((PlanError, SpecError)) as refused:
        SmoothLinear().run(mlp, target, {"x": option})
    assert said in str(refused.value)


def test_a_weight_that_depends_on_an_input_is_refused_with_the_reason(target: Target) -> None:
    graph = Graph.parse(
        """graph g {
  input %x: f32[4, 8]
  input %w: f32[8, 8]
  %y: f32[4, 8] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}"""
    )
    reason = "the weight of %y, %w, depends on the model's inputs"
    assert SmoothLinear().refusals(graph, target) == {"x": reason}
    with pytest.raises(PlanError, match="nothing to choose at %x; the weight of %y"):
        SmoothLinear().run(graph, target, {"x": "rotate(block=8)"})
    with pytest.raises(PlanError, match="nothing to choose at %z; no linear layer reads it"):
        SmoothLinear().run(graph, target, {"z": "rotate(block=8)"})


def test_a_rotation_of_a_block_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="block is 48; it is a power of two, 2 or more"):
        SmoothLinear(block=48)


@pytest.mark.parametrize("name", ["cogvideox-mini", "hunyuanvideo-mini", "ltx-mini"])
def test_published_architectures_are_smoothed_and_offer_integers(name: str, target: Target) -> None:
    graph = flow.trace(name, meta=True).graph
    chosen = _factors(graph)
    smoothed = SmoothLinear().run(graph, target, chosen)
    check_types(smoothed)
    layers = [node.name for node in graph.find("aten.linear")]
    assert sorted(layer for place in places(graph) for layer in place.layers) == sorted(layers)
    ranges = dict.fromkeys(calibrated_places(smoothed), "range(low=-4.0, high=4.0)")
    ranged = Calibrate().run(smoothed, target, ranges)
    offered = QuantizeInteger().choices(ranged, target)
    refused = QuantizeInteger().refusals(ranged, target)
    assert not refused
    assert set(layers) <= set(offered)
    assert all("w8a8" in options for options in offered.values())
    integers = LowerInteger().run(QuantizeInteger().run(ranged, target, dict.fromkeys(offered, "w8a8")), target, {})
    assert len(list(integers.find("intarsia.linear_i8i8"))) == len(layers)
    assert any("layer_norm" in line for line in integer_only(integers))


def test_a_network_in_sixteen_bits_is_refused_by_the_rounding_with_what_to_do(mlp: Graph, target: Target) -> None:
    graph = Graph.parse(str(mlp).replace("f32[", "bf16["))
    ranged = Calibrate().run(graph, target, dict.fromkeys(calibrated_places(graph), "range(low=-4.0, high=4.0)"))
    assert set(QuantizeInteger().refusals(ranged, target).values()) == {
        "weight is bf16[128, 64]; integer layers are made of f32, so trace the model in it (module.float())",
        "weight is bf16[40, 128]; integer layers are made of f32, so trace the model in it (module.float())",
        "weight is bf16[8, 40]; integer layers are made of f32, so trace the model in it (module.float())",
    }
