"""Integer networks as TensorRT takes them: built by NVIDIA's builder, their difference to exact integers measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.null import NullEngine
from intarsia.backends.tensorrt import TensorrtBackend
from intarsia.backends.tensorrt_difference import difference
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import load_target

pytest.importorskip("tensorrt_rtx_bindings")
onnx = pytest.importorskip("onnx")

RTX4090 = load_target("rtx4090")


def test_a_residual_network_differs_from_exact_integers_at_ties_only(
    integer_network: Program, picture: Tensor, exact: Callable[..., tuple[Tensor, ...]], tmp_path: Path
) -> None:
    backend = TensorrtBackend()
    built = backend.build(integer_network, RTX4090, tmp_path)
    reference = backend.load_reference(tmp_path, built.files)
    expected = exact(integer_network, picture)
    for name, found, right in zip(integer_network.graph.outputs, reference(picture), expected, strict=True):
        assert found.dtype == right.dtype, name
        assert float((found != right).double().mean()) < 5e-3, name


def test_the_trunk_is_whole_numbers_in_f32_and_products_read_int8(integer_network: Program, tmp_path: Path) -> None:
    TensorrtBackend(engine=False).build(integer_network, RTX4090, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    operators = [node.op_type for node in model.graph.node]
    types = {value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert onnx.TensorProto.INT16 not in types
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert len(products) == 5
    assert all({made[name] for name in node.input[:2]} == {"DequantizeLinear"} for node in products)
    assert operators.count("QuantizeLinear") == 9
    assert not {"ConvInteger", "MatMulInteger", "BitShift", "Cast"} & set(operators)


def test_a_build_says_how_far_its_answers_are_from_exact_integers(
    integer_network: Program, picture: Tensor, tmp_path: Path
) -> None:
    told = TensorrtBackend(engine=False).build(integer_network, RTX4090, tmp_path).info["from exact integers"]
    assert isinstance(told, dict)
    assert told.keys() == {"codes_differing", "largest_step"}
    assert 0 <= told["codes_differing"] < 0.05
    assert told["largest_step"] <= 2


def test_steps_are_those_of_the_outputs_codes(tmp_path: Path) -> None:
    numbers = {"m": torch.tensor([3], dtype=torch.int32), "s": torch.tensor([1], dtype=torch.int32)}
    program, other = (Program(Graph.parse(text), numbers) for text in (WIDE, WIDE.replace("low=-300", "low=3")))
    TensorrtBackend(engine=False).build(program, RTX4090, tmp_path)
    assert difference(program, tmp_path / "model.onnx") == {"codes_differing": 0.0, "largest_step": 0.0}
    apart = difference(other, tmp_path / "model.onnx")
    assert apart is not None
    assert apart["codes_differing"] > 0.1
    assert apart["largest_step"] >= 1


WIDE = """graph wide {
  input %x: i8[64]
  input %other: i8[64]
  param %m: i32[1]
  param %s: i32[1]
  %y: i16[64] = intarsia.requantize(input=%x, multiplier=%m, shift=%s, axis=0, low=-32768, high=32767)
  %z: i16[64] = intarsia.add_requantized(input=%y, other=%other, multiplier=%m, shift=%s, other_multiplier=%m, other_shift=%s, low=-300, high=300)
  %f: f32[64] = intarsia.dequantize_static(input=%z, scale=0.5, dtype=torch.float32)
  return %f
}
"""  # noqa: E501


def test_halves_go_up_in_the_trunk_as_in_exact_integers(tmp_path: Path) -> None:
    numbers = {"m": torch.tensor([3], dtype=torch.int32), "s": torch.tensor([1], dtype=torch.int32)}
    program, backend = Program(Graph.parse(WIDE), numbers), TensorrtBackend(engine=False)
    built = backend.build(program, RTX4090, tmp_path)
    x = torch.arange(-128, 128, 4, dtype=torch.int8)
    inputs = x + 1, x
    (found,), (exact,) = backend.load_reference(tmp_path, built.files)(*inputs), NullEngine(program)(*inputs)
    assert torch.equal(found, exact)
    assert exact.abs().max() == 150


def test_integers_of_sixteen_bits_neither_go_in_nor_come_out() -> None:
    one = torch.ones(1, dtype=torch.int32)
    shown = Program(Graph.parse(WIDE.replace("return %f", "return %z")), {"m": one, "s": one})
    with pytest.raises(Unsupported) as caught:
        TensorrtBackend(engine=False).build(shown, RTX4090, Path("nowhere"))
    assert "TensorRT has no i16, only" in caught.value.reasons[0]
