"""Softmax, norms, functions and products of activations between grids become integers, near what floats give."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intarsia.backends.base import Backend
from intarsia.backends.onnx import OnnxBackend
from intarsia.backends.tvm import TvmBackend
from intarsia.ir.execute import check_types
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.passes.clean import Clean
from intarsia.passes.conformance import check_pass
from intarsia.passes.integer_islands import IntegerIslands
from intarsia.passes.integer_only import integer_only
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger

Calibrated = Callable[[Program], Program]
WithRanges = Callable[..., Graph]


class Block(nn.Module):
    """A transformer's block, its attention written out, between two linear layers."""

    def __init__(self, norm: Callable[[int], nn.Module], function: nn.Module) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(12, 32), nn.Linear(32, 5)
        self.before, self.between = norm(32), norm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.function, self.down = nn.Linear(32, 64), function, nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        normed = self.before(x)
        query, key, value = (
            layer(normed).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(-1, -2) / math.sqrt(8)).softmax(dim=-1)
        x = x + self.out((scores @ value).transpose(1, 2).flatten(2))
        return self.leave(x + self.down(self.function(self.up(self.between(x)))))


def block(norm: Callable[[int], nn.Module], function: nn.Module, target: Target) -> Program:
    torch.manual_seed(0)
    program = trace(Block(norm, function), {"x": torch.randn(2, 10, 12)}, name="block")
    return Program(Clean().run(program.graph, target, {}), program.weights)


def on_grids(program: Program, target: Target) -> Program:
    quantize = QuantizeInteger(islands=True)
    chosen = dict.fromkeys(quantize.choices(program.graph, target), "w8a8")
    return Program(LowerInteger().run(quantize.run(program.graph, target, chosen), target, {}), program.weights)


def answer(program: Program, inputs: tuple[Tensor, ...]) -> Tensor:
    found: Tensor = program.module()(*inputs)[0]
    return found


@pytest.mark.parametrize(
    ("norm", "function"),
    [
        (nn.LayerNorm, nn.GELU()),
        (nn.RMSNorm, nn.SiLU()),
        (lambda count: nn.LayerNorm(count, elementwise_affine=False), nn.GELU("tanh")),
    ],
    ids=["layer norm and GELU", "RMS norm and SiLU", "norm without weights and GELU by tanh"],
)
def test_a_block_of_a_transformer_is_integer_only(
    norm: Callable[[int], nn.Module], function: nn.Module, calibrated: Calibrated, target: Target
) -> None:
    program = block(norm, function, target)
    floats = on_grids(calibrated(program), target)
    integers = Program(IntegerIslands().run(floats.graph, target, {}), program.weights)
    check_types(integers.graph)

    assert len(integer_only(floats.graph)) == 7
    assert integer_only(integers.graph) == ()
    assert IntegerIslands().refusals(floats.graph, target) == {}
    inputs = example_inputs(program.graph, seed=1)
    expected, between, found = (answer(one, inputs) for one in (program, floats, integers))
    assert (between - expected).norm() < 0.03 * expected.norm()
    assert (found - between).norm() < 0.01 * expected.norm()
    assert not any(value.type.dtype.startswith("f") for value in materialize(integers).graph.params)  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [OnnxBackend(), TvmBackend()], ids=["onnx", "tvm"])
def test_a_block_gives_the_same_bits_in_every_engine(
    backend: Backend, calibrated: Calibrated, target: Target, tmp_path: Path
) -> None:
    program = on_grids(calibrated(block(nn.LayerNorm, nn.GELU(), target)), target)
    integers = materialize(Program(IntegerIslands().run(program.graph, target, {}), program.weights))
    inputs = example_inputs(program.graph, seed=1)
    pytest.importorskip(backend.name)
    files = backend.build(integers, load_target("cpu-avx2"), tmp_path).files
    (found,) = backend.load(tmp_path, files)(*inputs)
    assert torch.equal(found, answer(integers, inputs))


def test_the_pass_keeps_its_promises(calibrated: Calibrated, target: Target) -> None:
    program = on_grids(calibrated(block(nn.LayerNorm, nn.GELU(), target)), target)
    check_pass(IntegerIslands(), program, target, error=1e-3)
    check_pass(QuantizeInteger(islands=True), calibrated(block(nn.LayerNorm, nn.GELU(), target)), target)


def test_islands_stay_in_float_unless_they_are_asked_for(calibrated: Calibrated, target: Target) -> None:
    program = calibrated(block(nn.LayerNorm, nn.GELU(), target))
    chosen = dict.fromkeys(QuantizeInteger().choices(program.graph, target), "w8a8")
    graph = LowerInteger().run(QuantizeInteger().run(program.graph, target, chosen), target, {})
    lines = integer_only(graph)
    assert any("aten.softmax.int" in line for line in lines)
    assert not any("aten.linear" in line for line in lines)
    assert "%function.gelu: aten.gelu is in float; integer-islands has an integer form" in lines


BETWEEN = """graph g {{
  size N in [1, inf]
  input %x: i16[N, 4, 8]
  input %y: i16[N, 8, 4]
  param %w: f32[8]
  %a: f32[N, 4, 8] = intarsia.dequantize_static(input=%x, scale=0.001, dtype=torch.float32)
  %b: f32[N, 8, 4] = intarsia.dequantize_static(input=%y, scale=0.001, dtype=torch.float32)
{body}
  return %end
}}
"""


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (
            "%f: f32[N, 4, 8] = aten.gelu(self=%a)\n"
            "  %end: i8[N, 4, 8] = intarsia.quantize_static(input=%f, scale=0.1, low=-128, high=127)",
            ["function_table", "apply_table"],
        ),
        (
            "%f: f32[N, 4, 8] = aten.mul.Tensor(self=%a, other=0.25)\n"
            "  %end: i16[N, 4, 8] = intarsia.quantize_static(input=%f, scale=0.00025, low=-32768, high=32767)",
            [],
        ),
        (
            "%f: f32[N, 4, 8] = aten.div.Tensor(self=%a, other=4)\n"
            "  %v: f32[N, 32] = aten.flatten.using_ints(self=%f, start_dim=1)\n"
            "  %end: i8[N, 32] = intarsia.quantize_static(input=%v, scale=0.1, low=-128, high=127)",
            ["flatten", "full", "dyadic", "requantize"],
        ),
    ],
    ids=["a function", "a number that only says what codes mean", "another grid behind a view"],
)
def test_floats_between_grids_become_integers(body: str, ops: list[str], target: Target) -> None:
    graph = IntegerIslands().run(Graph.parse(BETWEEN.format(body=f"  {body}")), target, {})
    assert [node.op.split(".")[1] for node in graph.nodes] == ops
    assert graph.type(graph.outputs[0]).dtype in ("i8", "i16")


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (
            "%f: f32[N, 4, 4] = aten.matmul(self=%a, other=%b)",
            "f",
            "input is i16; intarsia.matmul_i8i8 takes i8",
        ),
        (
            "%f: f32[N, 4, 4] = aten.layer_norm(input=%m, normalized_shape=[4], weight=%n, bias=None, eps=1e-05)",
            "f",
            "integer-islands: %f: weight and bias depend on the model's inputs",
        ),
        (
            "%f: f32[N, 4, 4] = aten.layer_norm(input=%m, normalized_shape=[4], eps=1e30)",
            "f",
            "epsilon is 16000000000000000678730197984287391744; intarsia.integer_norm takes 1 to 2**61",
        ),
    ],
    ids=["a product of 16 bits", "a weight that is computed", "an epsilon that no sum holds"],
)
def test_what_stays_in_float_says_why(body: str, place: str, reason: str, target: Target) -> None:
    more = (
        "  %m: f32[N, 4, 4] = aten.slice.Tensor(self=%a, dim=2, start=0, end=4)\n"
        "  %k: f32[N, 4, 8] = aten.exp(self=%a)\n"
        "  %n: f32[4] = aten.mean.dim(self=%k, dim=[0, 2])\n"
        f"  {body}\n  %end: i8[N, 4, 4] = intarsia.quantize_static(input=%f, scale=0.1, low=-128, high=127)"
    )
    graph = Graph.parse(BETWEEN.format(body=more))
    (found,) = IntegerIslands().refusals(graph, target).items()
    assert found[0] == place
    assert found[1].startswith(reason)
    assert "aten" in str(IntegerIslands().run(graph, target, {}))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            "aten.softmax.int(self=%x, dim=1)",
            "a softmax over axis 1 of 3 has no integer form; one over the last axis has",
        ),
        ("aten.layer_norm(input=%x, normalized_shape=[4, 4])", "a norm over (4, 4) has no integer form"),
        ("aten.matmul(self=%x, other=%y)", "a product of ['N', 4, 4] and [4, 4] has no integer form; equal axes"),
    ],
)
def test_an_operator_without_an_integer_form_says_which_has_one(call: str, reason: str) -> None:
    graph = Graph.parse(f"""graph g {{
  size N in [1, inf]
  input %x: f32[N, 4, 4]
  input %y: f32[4, 4]
  %f: f32[N, 4, 4] = {call}
  return %f
}}
""")
    (line,) = integer_only(graph)
    assert line.startswith(f"%f: {call.partition('(')[0]}: {reason}")
