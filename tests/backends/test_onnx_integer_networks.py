"""Networks of integers through ONNX Runtime give what is defined, from the first code to the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.kernels.integers import golden

onnx = pytest.importorskip("onnx")

RESIDUAL = """graph residual {
  size N in [1, 16]
  input %x: f32[N, 3, 12, 12]
  param %stem.w: i8[32, 3, 3, 3]
  param %stem.b: i32[32]
  param %stem.m: i32[32]
  param %stem.s: i32[32]
  param %conv.w: i8[32, 32, 3, 3]
  param %conv.b: i32[32]
  param %conv.m: i32[32]
  param %conv.s: i32[32]
  param %fc.w: i8[10, 32]
  param %fc.b: i32[10]
  param %fc.m: i32[10]
  param %fc.s: i32[10]
  param %one.m: i32[1]
  param %one.s: i32[1]
  param %two.m: i32[1]
  param %two.s: i32[1]
  param %narrow.m: i32[1]
  param %narrow.s: i32[1]
  param %mean.m: i32[1]
  param %mean.s: i32[1]
  %q: i8[N, 3, 12, 12] = intarsia.quantize_static(input=%x, scale=0.02)
  %stem: i16[N, 32, 12, 12] = intarsia.conv2d_i8i8(input=%q, weight=%stem.w, bias=%stem.b, multiplier=%stem.m, shift=%stem.s, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1, low=0, high=32767)
  %pool: i16[N, 32, 6, 6] = aten.max_pool2d(self=%stem, kernel_size=[3, 3], stride=[2, 2], padding=[1, 1])
  %narrow: i8[N, 32, 6, 6] = intarsia.requantize(input=%pool, multiplier=%narrow.m, shift=%narrow.s, axis=0, low=0, high=127)
  %conv: i16[N, 32, 6, 6] = intarsia.conv2d_i8i8(input=%narrow, weight=%conv.w, bias=%conv.b, multiplier=%conv.m, shift=%conv.s, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1, low=-32768, high=32767)
  %sum: i16[N, 32, 6, 6] = intarsia.add_requantized(input=%conv, other=%pool, multiplier=%one.m, shift=%one.s, other_multiplier=%two.m, other_shift=%two.s, low=0, high=32767)
  %again: i8[N, 32, 6, 6] = intarsia.requantize(input=%sum, multiplier=%narrow.m, shift=%narrow.s, axis=0, low=0, high=127)
  %last: i16[N, 32, 6, 6] = intarsia.conv2d_i8i8(input=%again, weight=%conv.w, bias=%conv.b, multiplier=%conv.m, shift=%conv.s, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1, low=-32768, high=32767)
  %end: i16[N, 32, 6, 6] = intarsia.add_requantized(input=%last, other=%sum, multiplier=%one.m, shift=%one.s, other_multiplier=%two.m, other_shift=%two.s, low=-32768, high=32767)
  %relu: i16[N, 32, 6, 6] = aten.relu(self=%end)
  %mean: i8[N, 32, 1, 1] = intarsia.avg_pool2d_i8(input=%relu, kernel_size=[6, 6], stride=[6, 6], padding=[0, 0], multiplier=%mean.m, shift=%mean.s)
  %flat: i8[N, 32] = aten.flatten.using_ints(self=%mean, start_dim=1)
  %fc: i16[N, 10] = intarsia.linear_i8i8(input=%flat, weight=%fc.w, bias=%fc.b, multiplier=%fc.m, shift=%fc.s, low=-32768, high=32767)
  %y: f32[N, 10] = intarsia.dequantize_static(input=%fc, scale=0.001, dtype=torch.float32)
  return %y, %stem, %conv, %sum, %again, %mean, %fc
}
"""  # noqa: E501

SMALL = """graph small {
  input %x: i8[2, 16, 9, 9]
  param %w: i8[24, 16, 3, 3]
  param %b: i32[24]
  param %m: i32[24]
  param %s: i32[24]
  param %narrow.m: i32[1]
  param %narrow.s: i32[1]
  %q: i8[2, 16, 9, 9] = intarsia.requantize(input=%x, multiplier=%narrow.m, shift=%narrow.s, axis=0, low=0, high=15)
  %y: i8[2, 24, 9, 9] = intarsia.conv2d_i8i8(input=%q, weight=%w, bias=%b, multiplier=%m, shift=%s, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1, low=LOW, high=HIGH)
  return %y
}
"""  # noqa: E501

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _start_over() -> None:
    GENERATOR.manual_seed(5)


def codes(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=GENERATOR).to(torch.int8)


def dyadic(name: str, real: Tensor) -> dict[str, Tensor]:
    """What stands for the real numbers."""
    multiplier, shift = golden.dyadic(real.float().numpy(), 1.0)
    return {f"{name}m": torch.from_numpy(multiplier.copy()), f"{name}s": torch.from_numpy(shift.copy())}


def layer(name: str, rows: int, *shape: int, ratio: float, largest: int = 128) -> dict[str, Tensor]:
    weight = codes(rows, *shape, low=-largest, high=largest - 1)
    bias = torch.randint(-(2**12), 2**12, (rows,), generator=GENERATOR).int()
    reals = ratio * (0.5 + torch.rand(rows, generator=GENERATOR))
    return {f"{name}w": weight, f"{name}b": bias, **dyadic(name, reals)}


def defined(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """What every value of the graph is: ours by their definition, PyTorch's own by PyTorch."""
    table: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
    for node in graph.nodes:
        args = {key: table[arg.name] if isinstance(arg, Ref) else arg for key, arg in node.args.items()}
        if node.op == "intarsia.dequantize_static":
            args.pop("dtype")
        ours = golden.OPERATORS.get(node.op)
        table[node.name] = ours(**args) if ours else _by_torch(node, args)
    return table


def _by_torch(node: Node, args: Mapping[str, Any]) -> Any:
    given = torch.from_numpy(args["self"])
    match node.op:
        case "aten.max_pool2d":
            return torch.max_pool2d(given, args["kernel_size"], args["stride"], args["padding"]).numpy()
        case "aten.relu":
            return given.relu().numpy()
        case _:
            return given.flatten(1).numpy()


def run(program: Program, inputs: tuple[Tensor, ...], folder: Path, target: Target) -> tuple[Tensor, ...]:
    backend = OnnxBackend()
    return backend.load(folder, backend.build(program, target, folder).files)(*inputs)


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)


@pytest.fixture
def residual() -> Program:
    weights = {
        **layer("stem.", 32, 3, 3, 3, ratio=0.5),
        **layer("conv.", 32, 32, 3, 3, ratio=0.05),
        **layer("fc.", 10, 32, ratio=0.3),
    }
    for name, real in (("one.", 0.6543), ("two.", 0.7321), ("narrow.", 0.0051), ("mean.", 0.01 / 36)):
        weights |= dyadic(name, torch.tensor([real]))
    return Program(Graph.parse(RESIDUAL), weights)


def test_a_residual_network_gives_what_is_defined(residual: Program, target: Target, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 12, 12, generator=GENERATOR)
    found = run(residual, (x,), tmp_path, target)
    expected = defined(residual.graph, {**residual.weights, "x": x})
    for name, tensor in zip(residual.graph.outputs, found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name, strict=True)
        assert len(np.unique(expected[name])) > 20, name
    again = run(residual, (x[:1],), tmp_path, target)
    assert all(torch.equal(one[:1], two) for one, two in zip(found, again, strict=True))


def test_a_trunk_on_one_grid_is_summed_in_f32_without_a_product(
    residual: Program, target: Target, tmp_path: Path
) -> None:
    one = torch.tensor([1.0])
    steps = torch.randint(3, 11, (32,), generator=GENERATOR) / 128
    weights = {**residual.weights, **dyadic("one.", one), **dyadic("two.", one), **dyadic("conv.", steps)}
    program = Program(residual.graph, weights)
    x = torch.randn(3, 3, 12, 12, generator=GENERATOR)
    found = run(program, (x,), tmp_path, target)
    expected = defined(program.graph, {**weights, "x": x})
    for name, tensor in zip(program.graph.outputs, found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name, strict=True)
    assert len(np.unique(expected["sum"])) > 200
    assert operators(tmp_path)["MatMulIntegerToFloat"] == 2
    assert operators(tmp_path)["QLinearConv"] == 0


def small(ratio: float, *, bits: int, ends: tuple[int, int], largest: int) -> Program:
    """A layer of weights up to ``largest``, whose real numbers have so many bits."""
    graph = Graph.parse(SMALL.replace("LOW", str(ends[0])).replace("HIGH", str(ends[1])))
    weights = {**layer("", 24, 16, 3, 3, ratio=ratio, largest=largest), **dyadic("narrow.", torch.tensor([0.2]))}
    mantissa, exponent = torch.frexp(torch.ldexp(weights["m"].double(), -weights["s"]))
    weights |= dyadic("", torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent))
    return Program(graph, weights)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"ends": (0, 15), "bits": 24, "largest": 8}, {"QLinearConv": 1, "Mul": 1}),
        ({"ends": (0, 127), "bits": 6, "largest": 8}, {"QLinearConv": 1, "Mul": 1}),
        ({"ends": (0, 127), "bits": 31, "largest": 128}, {"QLinearConv": 1, "Mul": 1}),
        ({"ends": (-128, 127), "bits": 24, "largest": 128}, {"ConvInteger": 1, "Mul": 2}),
        ({"ends": (0, 20_000), "bits": 3, "largest": 8}, {"ConvInteger": 1, "Mul": 2, "Floor": 1}),
    ],
)
def test_every_form_of_a_layer_is_exact(
    given: dict[str, Any], steps: dict[str, int], target: Target, tmp_path: Path
) -> None:
    highest = given["ends"][1]
    program = small((highest + 1) / (500 * given["largest"]), **given)
    x = codes(2, 16, 9, 9)
    (found,) = run(program, (x,), tmp_path, target)
    expected = defined(program.graph, {**program.weights, "x": x})["y"]
    np.testing.assert_array_equal(found.numpy(), expected, strict=True)
    assert len(np.unique(expected)) > min(highest, 50)
    assert {op_type: operators(tmp_path)[op_type] for op_type in steps} == steps


def test_the_largest_products_of_an_activation_that_is_never_negative_saturate_nowhere(
    target: Target, tmp_path: Path
) -> None:
    """127 times -128, twice in a row, is what 16 bits just hold."""
    text = """graph g {
      input %x: f32[3, 2048]
      param %w: i8[4, 2048]
      param %m: i32[4]
      param %s: i32[4]
      %q: i8[3, 2048] = intarsia.quantize_static(input=%x, scale=1.0, low=0, high=127)
      %y: i32[3, 4] = intarsia.linear_i8i8(input=%q, weight=%w, bias=None, multiplier=%m, shift=%s, \
low=-2147483648, high=2147483647)
      return %y
    }"""
    weight = torch.tensor([[-128], [127], [-128], [127]]).repeat(1, 2048).to(torch.int8)
    weight[2:, ::2] = 0
    one = torch.ones(4, dtype=torch.int32)
    program = Program(Graph.parse(text), {"w": weight, "m": 2 * one, "s": one})
    x = torch.tensor([[500.0], [127.0], [-3.0]]).repeat(1, 2048)
    (found,) = run(program, (x,), tmp_path, target)
    largest = [127 * 2048 * -128, 127 * 2048 * 127, 127 * 1024 * -128, 127 * 1024 * 127]
    assert found.tolist() == [largest, largest, [0, 0, 0, 0]]
    (product,) = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "MatMulInteger"]
    assert product.input[1] == "w.i8.2048x4"


def test_four_bits_a_weight_are_stored_in_four_bits(target: Target, tmp_path: Path) -> None:
    OnnxBackend().build(small(0.01, bits=6, ends=(0, 127), largest=8), target, tmp_path)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored["w.i4.24x16x3x3"].data_type == onnx.TensorProto.INT4
    assert len(stored["w.i4.24x16x3x3"].raw_data) == 24 * 16 * 9 // 2


POOLS = """graph pools {
  input %x: f32[1, 4, 10, 8]
  param %m: i32[1]
  param %s: i32[1]
  param %c.m: i32[4]
  param %c.s: i32[4]
  %q: i16[1, 4, 10, 8] = intarsia.quantize_static(input=%x, scale=0.001, low=-32768, high=32767)
  %pad: i16[1, 4, 11, 10] = aten.pad(self=%q, pad=[1, 1, 0, 1])
  %relu: i16[1, 4, 11, 10] = aten.relu(self=%pad)
  %clip: i16[1, 4, 11, 10] = aten.clamp(self=%relu, min=5, max=2000)
  %avg: i16[1, 4, 6, 5] = intarsia.avg_pool2d_i8(input=%pad, kernel_size=[3, 2], stride=[2, 2], padding=[1, 0], multiplier=%c.m, shift=%c.s, low=-32768, high=32767)
  %wide: i32[1, 4, 10, 8] = intarsia.requantize(input=%q, multiplier=%c.m, shift=%c.s, axis=1, low=-70000, high=70000)
  %max: i32[1, 4, 5, 4] = aten.max_pool2d(self=%wide, kernel_size=[2, 2])
  %sum: i32[1, 4, 10, 8] = intarsia.add_requantized(input=%wide, other=%q, multiplier=%m, shift=%s, other_multiplier=%m, other_shift=%s, low=-90000, high=90000)
  %cat: i16[1, 8, 10, 8] = aten.cat(tensors=[%q, %q], dim=1)
  %last: i8[1, 8, 10, 8] = intarsia.requantize(input=%cat, multiplier=%m, shift=%s, axis=0, low=-8, high=7)
  %y: f32[1, 8, 10, 8] = intarsia.dequantize_static(input=%last, scale=0.5, dtype=torch.float32)
  return %y, %clip, %avg, %max, %sum
}
"""  # noqa: E501


def test_wide_integers_are_pooled_padded_clipped_and_joined(target: Target, tmp_path: Path) -> None:
    weights = {**dyadic("", torch.tensor([0.003])), **dyadic("c.", torch.tensor([0.5, 0.25, 1.7, 3.1]))}
    program = Program(Graph.parse(POOLS), weights)
    x = torch.randn(1, 4, 10, 8, generator=GENERATOR) * 9
    found = run(program, (x,), tmp_path, target)
    for one, two in zip(found, program.module()(x), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


PAIRS = """graph pairs {
  input %x: i8[256, 256]
  input %y: i8[256, 256]
  param %one.m: i32[1]
  param %one.s: i32[1]
  param %two.m: i32[1]
  param %two.s: i32[1]
  %sum: i8[256, 256] = intarsia.add_requantized(input=%x, other=%y, multiplier=%one.m, shift=%one.s, other_multiplier=%two.m, other_shift=%two.s, low=LOW, high=HIGH)
  return %sum
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("parts", "ends", "whole"),
    [
        ((4096, 4096), (-128, 127), True),
        ((4096, 3001), (0, 127), True),
        ((1, 8192), (-128, 127), True),
        ((4096, 2048), (-128, 127), False),  # every other code is halfway between two of the sum
        ((3001, 2999), (0, 127), False),  # each operand is rounded on its own
    ],
)
def test_every_sum_of_two_codes_is_exact(
    parts: tuple[int, int], ends: tuple[int, int], whole: bool, target: Target, tmp_path: Path
) -> None:
    """One operator adds where what one operand is multiplied by is whole and the other has no ties."""
    graph = Graph.parse(PAIRS.replace("LOW", str(ends[0])).replace("HIGH", str(ends[1])))
    weights = {
        key: value
        for name, part in zip(("one.", "two."), parts, strict=True)
        for key, value in dyadic(name, torch.tensor([part / 4096])).items()
    }
    x, y = torch.meshgrid(*[torch.arange(-128, 128).to(torch.int8)] * 2, indexing="ij")
    program = Program(graph, weights)
    (found,) = run(program, (x.contiguous(), y.contiguous()), tmp_path, target)
    expected = defined(graph, {**weights, "x": x.contiguous(), "y": y.contiguous()})["sum"]
    np.testing.assert_array_equal(found.numpy(), expected, strict=True)
    assert {expected.min(), expected.max()} == set(ends)
    assert operators(tmp_path)["QLinearAdd"] == whole


def test_what_a_pad_fills_with_counts_among_an_activations_codes(target: Target, tmp_path: Path) -> None:
    """A clamp at zero says nothing of what is put around it later."""
    text = """graph g {
      input %x: f32[2, 32, 4, 4]
      param %w: i8[8, 32, 3, 3]
      param %m: i32[8]
      param %s: i32[8]
      %q: i8[2, 32, 4, 4] = intarsia.quantize_static(input=%x, scale=0.02, low=0, high=127)
      %pad: i8[2, 32, 6, 6] = aten.constant_pad_nd(self=%q, pad=[1, 1, 1, 1], value=-100)
      %y: i8[2, 8, 4, 4] = intarsia.conv2d_i8i8(input=%pad, weight=%w, bias=None, multiplier=%m, shift=%s, \
stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
      return %y
    }"""
    weights = {"w": codes(8, 32, 3, 3), **dyadic("", torch.linspace(0.0007, 0.001, 8))}
    program = Program(Graph.parse(text), weights)
    x = torch.randn(2, 32, 4, 4, generator=GENERATOR)
    (found,), (expected,) = run(program, (x,), tmp_path, target), program.module()(x)
    assert torch.equal(found, expected)
    assert expected.unique().numel() > 60


def test_a_window_whose_sums_f32_does_not_hold_is_refused(target: Target) -> None:
    graph = Graph.parse(
        POOLS.replace("[3, 2], stride=[2, 2], padding=[1, 0]", "[64, 8], stride=[1, 1], padding=[32, 0]")
    )
    (pool,) = graph.find("intarsia.avg_pool2d_i8")
    reason = OnnxBackend().why_not(pool, graph, target)
    assert (
        reason == "a window of 512 numbers of i16 may sum up to 16,777,216; f32, in which they are summed, holds less"
    )
