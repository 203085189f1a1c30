"""Integer layers through ONNX Runtime give the reference's integers, all of them, on data that leaves nothing out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.execute import call, type_of
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.program import Program
from intarsia.ir.target import Target

onnx = pytest.importorskip("onnx")

GENERATOR = torch.Generator().manual_seed(3)


def codes(*shape: int) -> Tensor:
    """The full range of int8, extremes included."""
    return torch.randint(-128, 128, shape, generator=GENERATOR).to(torch.int8)


def numbers(low: int, high: int, count: int) -> Tensor:
    return torch.randint(low, high, (count,), generator=GENERATOR).to(torch.int32)


def dyadic(rows: int, terms: int) -> dict[str, Tensor]:
    """Multipliers of 31 bits, and shifts that leave the sums of ``terms`` products in and out of int8's range."""
    spread = 38 + int(math.log2(terms) / 2)
    return {
        "bias": numbers(-(100 << (spread - 31)), 100 << (spread - 31), rows),
        "multiplier": numbers(2**30, 2**31 - 1, rows),
        "shift": numbers(spread - 2, spread + 2, rows),
    }


@dataclass(frozen=True)
class Case:
    """A call of ``op`` on ``input``, and what else it is given."""

    op: str
    input: Tensor
    args: Mapping[str, Tensor | Arg]

    def expected(self) -> Tensor:
        """What the reference gives."""
        given = {key: Ref(key) if isinstance(arg, Tensor) else arg for key, arg in self.args.items()}
        tensors = {key: arg for key, arg in self.args.items() if isinstance(arg, Tensor)}
        (result,) = call(Node(self.op, {"input": Ref("x"), **given}, ()), {"x": self.input, **tensors})
        assert isinstance(result, Tensor)
        return result


def differing(cases: Mapping[str, Case], folder: Path, target: Target) -> dict[str, int]:
    """How many numbers of each case one engine of all of them gets otherwise than the reference."""
    weights: dict[str, Tensor] = {}
    nodes: list[Node] = []
    expected = [case.expected() for case in cases.values()]
    for index, (case, result) in enumerate(zip(cases.values(), expected, strict=True)):
        tensors = {key: f"{key}{index}" for key, arg in case.args.items() if isinstance(arg, Tensor)}
        weights |= {tensors[key]: arg for key, arg in case.args.items() if isinstance(arg, Tensor)}
        given = {key: Ref(tensors[key]) if key in tensors else arg for key, arg in case.args.items()}
        nodes.append(Node(case.op, {"input": Ref(f"x{index}"), **given}, (Value(f"y{index}", type_of(result)),)))  # type: ignore[dict-item]
    inputs = tuple(Value(f"x{index}", type_of(case.input)) for index, case in enumerate(cases.values()))
    params = tuple(Value(name, type_of(tensor)) for name, tensor in weights.items())
    graph = Graph("g", inputs, params, tuple(nodes), tuple(node.name for node in nodes))
    backend = OnnxBackend()
    engine = backend.load(folder, backend.build(Program(graph, weights), target, folder).files)
    found = engine(*(case.input for case in cases.values()))
    assert all(a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    return {name: int((a != b).sum()) for name, a, b in zip(cases, found, expected, strict=True)}


def linear(rows: int, columns: int, *shape: int) -> Case:
    return Case(
        "intarsia.linear_i8i8", codes(*shape, columns), {"weight": codes(rows, columns), **dyadic(rows, columns)}
    )


def convolution(channels: int, outputs: int, taps: tuple[int, int], **window: Arg) -> Case:
    args: dict[str, Tensor | Arg] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **window}
    assert isinstance(args["groups"], int)
    inner = channels // args["groups"]
    args |= {"weight": codes(outputs, inner, *taps), **dyadic(outputs, inner * taps[0] * taps[1])}
    return Case("intarsia.conv2d_i8i8", codes(2, channels, 11, 9), args)


def requantizing(input: Tensor, multiplier: Tensor, shift: Tensor, axis: int) -> Case:
    tensors = {"multiplier": multiplier.to(torch.int32), "shift": shift.to(torch.int32)}
    return Case("intarsia.requantize", input.clamp(-(2**31), 2**31 - 1).to(torch.int32), {**tensors, "axis": axis})


def test_linear_is_the_reference_to_the_bit(target: Target, tmp_path: Path) -> None:
    shapes = [(32, 64, 3, 19), (17, 129, 5), (5, 1, 40, 1, 2), (1, 7, 1)]
    cases = {str(shape): linear(*shape) for shape in shapes}
    assert differing(cases, tmp_path, target) == dict.fromkeys(cases, 0)
    assert cases[str(shapes[0])].expected().unique().numel() > 200


def test_the_largest_sums_saturate_nowhere(target: Target, tmp_path: Path) -> None:
    """Products of 128 and 128, which a machine without VNNI gets wrong in the obvious form."""
    weight = torch.tensor([[-128], [127], [-128], [127]]).repeat(1, 4096).to(torch.int8)
    input = torch.tensor([[-128], [127]]).repeat(1, 4096).to(torch.int8)
    shift = torch.tensor([50, 51, 49, 48], dtype=torch.int32)
    case = Case(
        "intarsia.linear_i8i8",
        input,
        {"weight": weight, "bias": None, "multiplier": numbers(2**30, 2**31 - 1, 4), "shift": shift},
    )
    assert differing({"largest": case}, tmp_path, target) == {"largest": 0}
    assert case.expected().unique().numel() > 4


def test_convolution_is_the_reference_to_the_bit(target: Target, tmp_path: Path) -> None:
    cases = {
        "3x3": convolution(40, 12, (3, 3), padding=(1, 1)),
        "3x3 without padding": convolution(3, 5, (3, 3)),
        "7x7, stride 2": convolution(3, 8, (7, 7), stride=(2, 2), padding=(3, 3)),
        "1x1": convolution(48, 8, (1, 1)),
        "1x1, stride 2": convolution(32, 8, (1, 1), stride=(2, 2)),
        "ragged, many channels": convolution(37, 7, (2, 3), stride=(3, 2), padding=(0, 2), dilation=(2, 1)),
        "ragged": convolution(5, 7, (2, 3), stride=(3, 2), padding=(0, 2), dilation=(2, 1)),
        "groups": convolution(12, 6, (3, 3), padding=(1, 1), groups=3),
        "each channel alone": convolution(9, 9, (3, 3), stride=(2, 1), padding=(2, 1), groups=9),
    }
    assert differing(cases, tmp_path, target) == dict.fromkeys(cases, 0)
    assert all(case.expected().unique().numel() > 60 for case in cases.values())


def test_requantizing_is_exact_over_all_of_int32(target: Target, tmp_path: Path) -> None:
    """Small numbers and the extremes of int32, times the extremes of int32, by shifts of f64 and of int64."""
    cases = {}
    for axis, shape in ((0, (6, 4, 9)), (1, (6, 6, 6)), (-1, (6, 6, 6))):
        for shifts in ((1, 40), (40, 46), (46, 63)):
            input = torch.randint(-(2**31), 2**31, shape, generator=GENERATOR)
            input.view(-1)[:60] = torch.arange(-30, 30)
            input.view(-1)[60:64] = torch.tensor([-(2**31), 2**31 - 1, 0, -1])
            multiplier = torch.randint(-(2**31), 2**31, (6,), generator=GENERATOR)
            multiplier[:2] = torch.tensor([-(2**31), 2**31 - 1])
            cases[f"axis {axis}, shifts {shifts}"] = requantizing(input, multiplier, numbers(*shifts, 6), axis)
    assert differing(cases, tmp_path, target) == dict.fromkeys(cases, 0)


def test_ties_are_rounded_up(target: Target, tmp_path: Path) -> None:
    """x * 2**k / 2**shift for all halves in reach, one above and one below each."""
    cases = {}
    for shift in (4, 31, 45, 46, 62):
        power = min(shift - 1, 30)
        halves = torch.arange(-270, 271) << (shift - 1 - power)
        input = torch.stack([halves - 1, halves, halves + 1])[..., None]
        cases[f"shift {shift}"] = requantizing(input, torch.tensor([1 << power]), torch.tensor([shift]), 2)
    assert differing(cases, tmp_path, target) == dict.fromkeys(cases, 0)
    assert cases["shift 4"].expected()[1, 265:275, 0].tolist() == [-2, -2, -1, -1, 0, 0, 1, 1, 2, 2]


def test_quantizing_and_dequantizing_are_the_reference_to_the_bit(target: Target, tmp_path: Path) -> None:
    """Ties to even, divided and multiplied in f32; a quotient's rounding shows in many of these."""
    random = torch.randn(5000, generator=GENERATOR) * 9
    input = torch.cat([torch.arange(-300, 300) * 0.05, random, torch.tensor([1e9, -1e9])])
    every = torch.arange(-128, 128).to(torch.int8)
    narrow = {"scale": 0.0123456789, "dtype": Symbol("torch.float16")}
    cases = {
        "quantize": Case("intarsia.quantize_static", input, {"scale": 0.1}),
        "quantize f16": Case("intarsia.quantize_static", random.half(), {"scale": 0.07}),
        "dequantize": Case("intarsia.dequantize_static", every, {**narrow, "dtype": Symbol("torch.float32")}),
        "dequantize f16": Case("intarsia.dequantize_static", every, narrow),
    }
    assert differing(cases, tmp_path, target) == dict.fromkeys(cases, 0)
    assert cases["quantize"].expected().unique().numel() == 256


def test_four_bits_unpack_to_the_same_codes(target: Target, tmp_path: Path) -> None:
    text = """graph g {
      input %x: u8[16, 16]
      %y: i8[16, 32] = intarsia.unpack_i4(packed=%x)
      return %y
    }"""
    program = Program(Graph.parse(text), {})
    every = torch.arange(256).to(torch.uint8).view(16, 16)
    backend = OnnxBackend()
    engine = backend.load(tmp_path, backend.build(program, target, tmp_path).files)
    assert torch.equal(engine(every)[0], program.module()(every)[0])


def test_plain_onnx_runtime_computes_a_chain_of_layers_alike_for_every_batch(target: Target, tmp_path: Path) -> None:
    """Without our session options, quantized, convolved, clipped, convolved again, dequantized."""
    import onnxruntime

    text = """graph g {
      size N in [2, 64]
      input %x: f32[N, 32, 10, 10]
      param %w1: i8[16, 32, 3, 3]
      param %w2: i8[4, 16, 1, 1]
      param %b: i32[16]
      param %m1: i32[16]
      param %s1: i32[16]
      param %m2: i32[4]
      param %s2: i32[4]
      %q: i8[N, 32, 10, 10] = intarsia.quantize_static(input=%x, scale=0.02)
      %c: i8[N, 16, 10, 10] = intarsia.conv2d_i8i8(input=%q, weight=%w1, bias=%b, multiplier=%m1, shift=%s1, \
stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
      %r: i8[N, 16, 10, 10] = aten.relu(self=%c)
      %d: i8[N, 4, 10, 10] = intarsia.conv2d_i8i8(input=%r, weight=%w2, bias=None, multiplier=%m2, shift=%s2, \
stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
      %y: f32[N, 4, 10, 10] = intarsia.dequantize_static(input=%d, scale=0.05, dtype=torch.float32)
      return %y
    }"""
    first, second = dyadic(16, 288), dyadic(4, 16)
    weights = {"w1": codes(16, 32, 3, 3), "w2": codes(4, 16, 1, 1), "b": first["bias"]}
    weights |= {"m1": first["multiplier"], "s1": first["shift"], "m2": second["multiplier"], "s2": second["shift"]}
    program = Program(Graph.parse(text), weights)
    OnnxBackend().build(program, target, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored["w1.u8.288x16"].data_type == onnx.TensorProto.UINT8
    assert not {"w1", "w2", "s1", "s2"} & stored.keys()
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    x = torch.randn(7, 32, 10, 10, generator=GENERATOR)
    (expected,) = program.module()(x)
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
    assert expected.unique().numel() > 80


def test_weights_computed_at_run_time_are_refused(target: Target) -> None:
    text = """graph g {
      input %x: i8[2, 8]
      input %w: i8[4, 8]
      param %m: i32[4]
      %y: i8[2, 4] = intarsia.linear_i8i8(input=%x, weight=%w, bias=None, multiplier=%m, shift=%m)
      return %y
    }"""
    graph = Graph.parse(text)
    reason = OnnxBackend().why_not(graph.nodes[0], graph, target)
    assert reason == "weight is computed at run time; materialize the program first"
