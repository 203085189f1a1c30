"""Real engines of real networks: built by NVIDIA's builder, their typed ONNX compared with eager PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import Tensor

import intarsia
from intarsia.backends import agreement
from intarsia.backends.base import Built
from intarsia.backends.null import NullEngine
from intarsia.backends.tensorrt import TensorrtBackend
from intarsia.ir.execute import evaluate_nodes
from intarsia.ir.graph import Graph, Node, Ref, Symbol, Value
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.rewrite import rewrite
from intarsia.ir.target import load_target
from intarsia.ir.types import TensorType
from intarsia.passes.cast_floats import CastFloats

pytest.importorskip("tensorrt_rtx_bindings")

TARGET = load_target("rtx4090")


@pytest.fixture(scope="session")
def wan() -> Program:
    """wan-mini with its trained weights, f32."""
    return intarsia.trace("wan-mini")


def half(program: Program, dtype: str) -> Program:
    return materialize(Program(CastFloats(dtype=dtype).run(program.graph, TARGET, {}), program.weights))


def steps(program: Program) -> Mapping[str, float]:
    """The step of eight bits for the input of every linear layer, from one calibration pass."""
    given = dict(zip((value.name for value in program.graph.inputs), example_inputs(program.graph), strict=True))
    values = evaluate_nodes(program.graph.nodes, {**program.weights, **given})
    read = {node.ref("input") for node in program.graph.find("aten.linear")}
    return {name: float(values[name].abs().max()) / 127 for name in read}


def eight_bits(graph: Graph, steps: Mapping[str, float]) -> Graph:
    """Weights and activations of every linear layer in int8."""

    def rule(node: Node) -> Sequence[Node] | None:
        if node.op != "aten.linear":
            return None
        input, weight = node.ref("input"), node.ref("weight")
        type_, rows = graph.type(input), graph.type(weight).shape[0]
        narrow = Value(f"{node.name}.q", replace(type_, dtype="i8"))
        wide = Value(f"{node.name}.d", type_)
        codes = Value(f"{node.name}.w", replace(graph.type(weight), dtype="i8"))
        scale = Value(f"{node.name}.s", TensorType("f32", (rows,)))
        dtype = {"f32": "torch.float32", "f16": "torch.float16"}[type_.dtype]
        step = {"input": Ref(narrow.name), "scale": steps[input], "dtype": Symbol(dtype)}
        product = {"input": Ref(wide.name), "weight": Ref(codes.name), "scale": Ref(scale.name)}
        return [
            Node("intarsia.quantize_static", {"input": Ref(input), "scale": steps[input]}, (narrow,)),
            Node("intarsia.dequantize_static", step, (wide,)),
            Node("intarsia.quantize_rows", {"weight": Ref(weight)}, (codes, scale)),
            Node("intarsia.linear_i8", {**product, "bias": node.args.get("bias")}, node.outputs),
        ]

    return rewrite(graph, rule)


def four_bits(graph: Graph) -> Graph:
    """Weights of every linear layer whose columns are a multiple of 32 in int4."""

    def rule(node: Node) -> Sequence[Node] | None:
        rows, columns = graph.type(node.ref("weight")).shape if node.op == "aten.linear" else (0, 1)
        if columns % 32:
            return None
        packed = Value(f"{node.name}.p", TensorType("u8", (rows, columns // 2)))
        scale = Value(f"{node.name}.s", TensorType("f32", (rows, columns // 32)))
        product = {"input": node.args["input"], "packed": Ref(packed.name), "scale": Ref(scale.name)}
        return [
            Node("intarsia.quantize_groups", {"weight": node.args["weight"], "group": 32}, (packed, scale)),
            Node("intarsia.linear_i4", {**product, "bias": node.args.get("bias"), "group": 32}, node.outputs),
        ]

    return rewrite(graph, rule)


@dataclass(frozen=True)
class Made:
    """An engine's facts, what its typed ONNX answers, and what eager PyTorch does."""

    built: Built
    answer: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def make_engine(program: Program, folder: Path) -> Made:
    """Build for an RTX 4090, check the files, run the typed ONNX and the graph on the same inputs."""
    backend = TensorrtBackend()
    built = backend.build(program, TARGET, folder)
    assert "engine.tensorrt_rtx.plan, " in backend.check(folder, built.files)
    inputs = example_inputs(program.graph, seed=1)
    return Made(built, backend.load_reference(folder, built.files)(*inputs), NullEngine(program)(*inputs))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_wan_mini_in_sixteen_bits_becomes_an_engine_with_whole_attention(
    wan: Program, dtype: str, tmp_path: Path
) -> None:
    import onnx

    program = half(wan, dtype)
    made = make_engine(program, tmp_path)
    assert agreement.error(made.answer, made.expected) < agreement.tolerance(program.graph)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("Attention") == len(list(wan.graph.find("aten.scaled_dot_product_attention")))


def stored(folder: Path, element: str) -> int:
    """Number of weight matrices of this element type in the file."""
    import onnx

    dtype = onnx.TensorProto.DataType.Value(element)
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    return sum(tensor.data_type == dtype and len(tensor.dims) == 2 for tensor in tensors)


def test_wan_mini_with_weights_in_four_bits_becomes_an_engine(wan: Program, tmp_path: Path) -> None:
    sixteen = half(wan, "f16")
    program = materialize(Program(four_bits(sixteen.graph), sixteen.weights))
    made = make_engine(program, tmp_path)
    assert agreement.error(made.answer, made.expected) < agreement.tolerance(program.graph)
    assert stored(tmp_path, "INT4") == len(list(program.graph.find("intarsia.linear_i4"))) > 50


def test_wan_mini_with_eight_bits_in_and_out_of_every_layer_becomes_an_engine(wan: Program, tmp_path: Path) -> None:
    """As close to the layers in f16 as the eager graph is; the two differ like eager from itself.

    Inputs moved by 1e-7 flip codes here and there and move the eager answer by 1e-2.
    """
    sixteen = half(wan, "f16")
    program = materialize(Program(eight_bits(sixteen.graph, steps(sixteen)), sixteen.weights))
    made = make_engine(program, tmp_path)
    unquantized = NullEngine(sixteen)(*example_inputs(program.graph, seed=1))
    own = agreement.error(made.expected, unquantized)
    assert agreement.error(made.answer, unquantized) < 1.1 * own < 0.02
    assert agreement.error(made.answer, made.expected) < 1.5 * own
    assert stored(tmp_path, "INT8") == len(list(program.graph.find("intarsia.linear_i8"))) > 50


def test_resnet_becomes_an_engine(tmp_path: Path) -> None:
    program = materialize(intarsia.trace("resnet18"))
    made = make_engine(program, tmp_path)
    assert agreement.error(made.answer, made.expected) < agreement.tolerance(program.graph)
    facts = json.loads((tmp_path / "build.json").read_text())["engine"]
    assert facts == made.built.info["engine"]
    assert facts["layers"] > 40
