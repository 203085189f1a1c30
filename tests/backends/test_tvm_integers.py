from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.tvm import TvmBackend
from intarsia.backends.tvm_dyadic import is_exact_in_f64
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import load_target

pytest.importorskip("tvm")


def integers(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Full-range random numbers, the extremes among them."""
    info = torch.iinfo(dtype)
    made = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(dtype)
    made.view(-1)[:2] = torch.tensor([info.min, info.max], dtype=dtype)
    return made


def dyadic(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    multiplier = torch.randint(1 << 28, 1 << 31, (rows,), generator=generator).to(torch.int32)
    return multiplier, torch.randint(38, 42, (rows,), generator=generator).to(torch.int32)


Exact = Callable[..., tuple[Tensor, ...]]


def agree(program: Program, folder: Path, *inputs: Tensor, exact: Exact | None = None) -> Tensor:
    """The engine's first answer; all of them are what the reference or ``exact`` answers, bit for bit."""
    backend = TvmBackend()
    engine = backend.load(folder, backend.build(program, load_target("cpu-avx2"), folder).files)
    answers = engine(*inputs)
    expected_answers = exact(program, *inputs) if exact else program.module()(*inputs)
    for name, found, expected in zip(program.graph.outputs, answers, expected_answers, strict=True):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    return answers[0]


LINEAR = """graph linear {{
  input %x: i8[{lines}, {columns}]
  param %w: i8[{rows}, {columns}]
  param %b: i32[{rows}]
  param %m: i32[{rows}]
  param %s: i32[{rows}]
  %y: i8[{lines}, {rows}] = intarsia.linear_i8i8(input=%x, weight=%w, bias={bias}, multiplier=%m, shift=%s)
  return %y
}}"""


@pytest.mark.parametrize(
    ("lines", "columns", "rows", "bias"), [(13, 96, 48, "%b"), (1, 33, 7, "None"), (2, 1, 16, "%b")]
)
def test_integer_linear_layers_are_exact(lines: int, columns: int, rows: int, bias: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(columns)
    graph = Graph.parse(LINEAR.format(lines=lines, columns=columns, rows=rows, bias=bias))
    multiplier, shift = dyadic(generator, rows)
    weights = {
        "w": integers(generator, (rows, columns), torch.int8),
        "b": integers(generator, (rows,), torch.int32),
        "m": multiplier,
        "s": shift,
    }
    weights = {param.name: weights[param.name] for param in graph.params}
    agree(Program(graph, weights), tmp_path, integers(generator, (lines, columns), torch.int8))


CONVOLUTION = """graph convolution {{
  input %x: i8[2, {channels}, {side}, {side}]
  param %w: i8[{rows}, {depth}, {window}, {window}]
  param %b: i32[{rows}]
  param %m: i32[{rows}]
  param %s: i32[{rows}]
  %y: i8[2, {rows}, {out}, {out}] = intarsia.conv2d_i8i8(input=%x, weight=%w, bias=%b, multiplier=%m, shift=%s, stride=[{stride}, {stride}], padding=[{padding}, {padding}], dilation=[1, 1], groups={groups})
  return %y
}}"""  # noqa: E501


@pytest.mark.parametrize(
    ("channels", "side", "rows", "window", "stride", "padding", "groups"),
    [(16, 14, 32, 3, 1, 1, 1), (5, 9, 7, 3, 2, 1, 1), (3, 7, 8, 1, 1, 0, 1), (8, 6, 8, 3, 1, 1, 8)],
    ids=["whole tiles", "ragged", "one place", "a group for each channel"],
)
def test_integer_convolutions_are_exact(  # noqa: PLR0917
    channels: int, side: int, rows: int, window: int, stride: int, padding: int, groups: int, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(side)
    out = (side + 2 * padding - window) // stride + 1
    graph = Graph.parse(CONVOLUTION.format(**locals(), depth=channels // groups))
    multiplier, shift = dyadic(generator, rows)
    weights = {
        "w": integers(generator, (rows, channels // groups, window, window), torch.int8),
        "b": torch.randint(-9000, 9000, (rows,), generator=generator, dtype=torch.int32),
        "m": multiplier,
        "s": shift,
    }
    found = agree(Program(graph, weights), tmp_path, integers(generator, (2, channels, side, side), torch.int8))
    assert {-128, 127} <= set(found.flatten().tolist()) or window == 1


def test_requantizing_rounds_half_up_and_saturates(tmp_path: Path) -> None:
    text = """graph g {
      input %x: i32[6, 4]
      param %m: i32[4]
      param %s: i32[4]
      %y: i8[6, 4] = intarsia.requantize(input=%x, multiplier=%m, shift=%s, axis=1)
      return %y
    }"""
    x = torch.tensor([1, -1, 3, -3, 2**31 - 1, -(2**31)], dtype=torch.int32)[:, None].expand(6, 4).contiguous()
    weights = {
        "m": torch.tensor([1, 1, 2**31 - 1, -(2**31)], dtype=torch.int32),
        "s": torch.tensor([1, 2, 62, 31], dtype=torch.int32),
    }
    found = agree(Program(Graph.parse(text), weights), tmp_path, x)
    assert found[:4, 0].tolist() == [1, 0, 2, -1]
    assert found[4:, 0].tolist() == [127, -128]


def test_a_residual_network_gives_the_integers_of_the_definition(
    integer_network: Program, picture: Tensor, exact: Exact, tmp_path: Path
) -> None:
    agree(integer_network, tmp_path, picture, exact=exact)


TIES = """graph ties {{
  input %x: {dtype}[{count}]
  input %other: {dtype}[{count}]
  param %m: i32[1]
  param %s: i32[1]
  %one: {result}[{count}] = intarsia.requantize(input=%x, multiplier=%m, shift=%s, axis=0, low={low}, high={high})
  %sum: {result}[{count}] = intarsia.add_requantized(input=%x, other=%other, multiplier=%m, shift=%s, other_multiplier=%m, other_shift=%s, low={low}, high={high})
  return %one, %sum
}}
"""  # noqa: E501


def extremes(dtype: str, low: int, high: int, multiplier: int, shift: int) -> tuple[Program, tuple[Tensor, Tensor]]:
    """Requantizing and adding where halves are common and both ends of the element type occur."""
    kind = {"i8": torch.int8, "i16": torch.int16, "i32": torch.int32}[dtype]
    info = torch.iinfo(kind)
    near = torch.arange(-40, 40)
    x = torch.cat([near, torch.tensor([info.min, info.min + 1, info.max - 1, info.max]), near * (info.max // 41)])
    other = x.roll(3)
    result = next(f"i{bits}" for bits in (8, 16, 32) if -(1 << bits - 1) <= low and high < 1 << bits - 1)
    text = TIES.format(dtype=dtype, count=len(x), result=result, low=low, high=high)
    numbers = {"m": torch.tensor([multiplier], dtype=torch.int32), "s": torch.tensor([shift], dtype=torch.int32)}
    return Program(Graph.parse(text), numbers), (x.to(kind), other.to(kind))


EXTREMES = [
    ("i8", -128, 127, 1, 1),
    ("i16", -8, 7, 3, 1),
    ("i16", -32768, 32767, -(2**31), 32),
    ("i16", 0, 127, 2**31 - 1, 62),
    ("i32", -128, 127, 2**31 - 1, 40),
    ("i32", -32768, 32767, 2**31 - 1, 46),
    ("i32", -(2**31), 2**31 - 1, 2**31 - 1, 31),
]
"""Input type, both ends, multiplier and shift."""


@pytest.mark.parametrize("extreme", EXTREMES, ids=lambda extreme: f"{extreme[0]} to {extreme[2]} by 2**-{extreme[4]}")
def test_ties_and_ends_of_every_width_are_exact(
    extreme: tuple[str, int, int, int, int], exact: Exact, tmp_path: Path
) -> None:
    program, inputs = extremes(*extreme)
    agree(program, tmp_path, *inputs, exact=exact)


@given(x=st.integers(-(2**31), 2**31 - 1), multiplier=st.integers(-(2**31), 2**31 - 1), shift=st.integers(1, 62))
@example(x=2**31 - 1, multiplier=2**31 - 1, shift=44)
@example(x=-(2**31), multiplier=1, shift=32)
def test_doubles_are_chosen_only_where_they_are_exact(x: int, multiplier: int, shift: int) -> None:
    exact = (x * multiplier + (1 << shift - 1)) >> shift
    found = math.floor(x * math.ldexp(multiplier, -shift) + 0.5)
    numbers = torch.tensor([multiplier]), torch.tensor([shift])
    if is_exact_in_f64(*numbers, largest=abs(x), ends=None):
        assert found == exact
    for low, high in ((-128, 127), (0, 15), (-32768, 32767)):
        if is_exact_in_f64(*numbers, largest=abs(x), ends=(low, high)):
            assert max(low, min(found, high)) == max(low, min(exact, high))


def test_doubles_are_refused_where_a_digit_may_be_lost() -> None:
    numbers = torch.tensor([2**31 - 1]), torch.tensor([31])
    assert is_exact_in_f64(*numbers, largest=1 << 20, ends=None)
    assert not is_exact_in_f64(*numbers, largest=1 << 31, ends=None)
    assert is_exact_in_f64(*numbers, largest=1 << 31, ends=(-32768, 32767))
    assert not is_exact_in_f64(numbers[0], numbers[1] + 14, largest=1 << 31, ends=(-32768, 32767))


def test_quantizing_rounds_half_to_even_and_saturates(tmp_path: Path) -> None:
    text = """graph g {
      input %x: f32[1006]
      %y: i8[1006] = intarsia.quantize_static(input=%x, scale=0.3)
      return %y
    }"""
    ties = torch.tensor([0.5, 1.5, -0.5, -2.5, 1e9, -1e9]) * 0.3
    agree(Program(Graph.parse(text), {}), tmp_path, torch.cat([ties, 30 * torch.randn(1000)]))


def test_dequantizing_is_exact(tmp_path: Path) -> None:
    text = """graph g {
      input %x: i8[256]
      %y: f32[256] = intarsia.dequantize_static(input=%x, scale=0.3, dtype=torch.float32)
      return %y
    }"""
    agree(Program(Graph.parse(text), {}), tmp_path, torch.arange(-128, 128).to(torch.int8))


def test_packed_numbers_of_four_bits_are_unpacked_in_the_library(tmp_path: Path) -> None:
    text = """graph g {
      input %x: u8[16, 16]
      %y: i8[16, 32] = intarsia.unpack_i4(packed=%x)
      return %y
    }"""
    found = agree(Program(Graph.parse(text), {}), tmp_path, torch.arange(256).to(torch.uint8).reshape(16, 16))
    assert set(found.flatten().tolist()) == set(range(-8, 8))


WEIGHT_ONLY = """graph g {{
  input %x: f32[9, 64]
  param %w: {weight}
  param %s: f32{scale}
  param %b: f32[24]
  %y: f32[9, 24] = {call}
  return %y
}}"""


@pytest.mark.parametrize(
    ("weight", "scale", "call"),
    [
        ("i8[24, 64]", "[24]", "intarsia.linear_i8(input=%x, weight=%w, scale=%s, bias=%b)"),
        ("u8[24, 32]", "[24, 2]", "intarsia.linear_i4(input=%x, packed=%w, scale=%s, bias=%b, group=32)"),
    ],
    ids=["eight bits", "four bits"],
)
def test_narrow_weights_stay_narrow_in_the_library(weight: str, scale: str, call: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    graph = Graph.parse(WEIGHT_ONLY.format(weight=weight, scale=scale, call=call))
    narrow, factor, bias = (param.type for param in graph.params)
    weights = {
        "w": integers(generator, narrow.shape, torch.int8 if narrow.dtype == "i8" else torch.uint8),
        "s": torch.rand(factor.shape, generator=generator),
        "b": torch.randn(bias.shape, generator=generator),
    }
    program, x = Program(graph, weights), torch.randn(9, 64, generator=generator)
    backend = TvmBackend()
    engine = backend.load(tmp_path, backend.build(program, load_target("cpu-avx2"), tmp_path).files)
    assert agreement.error(engine(x), program.module()(x)) < 1e-6


def test_integer_products_use_the_instruction_for_pairs(tmp_path: Path) -> None:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is missing")
    generator = torch.Generator().manual_seed(0)
    graph = Graph.parse(LINEAR.format(lines=12, columns=64, rows=32, bias="None"))
    multiplier, shift = dyadic(generator, 32)
    weights = {"w": integers(generator, (32, 64), torch.int8), "b": torch.zeros(32, dtype=torch.int32)}
    TvmBackend().build(Program(graph, {**weights, "m": multiplier, "s": shift}), load_target("cpu-avx2"), tmp_path)
    command = [objdump, "-d", "--no-show-raw-insn", str(tmp_path / "model.so")]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = re.findall(r"vpmaddwd\s+\S*%ymm", code)
    assert len(pairs) >= 12
    assert not re.search(r"vpmulld\s+\S*%ymm", code)
