from __future__ import annotations

import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.conformance import check_backend
from intarsia.backends.onnx import OnnxBackend, OnnxEngine
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported, UsageError
from intarsia.ir.execute import type_of
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.operators import DTYPES, resolve
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target

onnx = pytest.importorskip("onnx")

NARROW = """graph narrow {
  size N in [2, 64]
  input %x: f32[N, 3, 64]
  param %w1: f32[64, 64]
  param %b1: f32[64]
  param %w2: f32[16, 64]
  param %w3: f32[8, 16]
  %i8: i8[64, 64], %s8: f32[64] = intarsia.quantize_rows(weight=%w1)
  %fc1: f32[N, 3, 64] = intarsia.linear_i8(input=%x, weight=%i8, scale=%s8, bias=%b1)
  %act: f32[N, 3, 64] = aten.gelu(self=%fc1)
  %i4: u8[16, 32], %s4: f32[16, 2] = intarsia.quantize_groups(weight=%w2, group=32)
  %fc2: f32[N, 3, 16] = intarsia.linear_i4(input=%act, packed=%i4, scale=%s4, bias=None, group=32)
  %fc3: f32[N, 3, 8] = aten.linear(input=%fc2, weight=%w3)
  return %fc3
}
"""


TARGET = Target("null", "a machine for tests", "null", "none", {"f32": 1e12}, 1e11, 2**30, 1e-6)


def program_of(text: str) -> Program:
    graph = Graph.parse(text)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for param in graph.params:
        dtype = DTYPES[graph.type(param.name).dtype]
        weights[param.name] = torch.randn(graph.type(param.name).shape, generator=generator).to(dtype)  # type: ignore[arg-type]
    return materialize(Program(graph, weights))


def build(program: Program, target: Target, folder: Path, backend: OnnxBackend | None = None) -> OnnxEngine:
    backend = backend or OnnxBackend()
    folder.mkdir(exist_ok=True)
    return backend.load(folder, backend.build(program, target, folder).files)


@dataclass(frozen=True)
class Made:
    program: Program
    folder: Path
    engine: OnnxEngine


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An engine of the graph above."""
    program, folder = program_of(NARROW), tmp_path_factory.mktemp("narrow")
    return Made(program, folder, build(program, TARGET, folder))


def error(program: Program, engine: OnnxEngine, **sizes: int) -> float:
    inputs = example_inputs(program.graph, sizes, seed=len(sizes))
    with torch.no_grad():
        return agreement.error(engine(*inputs), tuple(program.module()(*inputs)))


def read(folder: Path):  # type: ignore[no-untyped-def]
    """The model, checked by onnx."""
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    return model


def test_weights_are_stored_in_eight_and_four_bits(narrow: Made) -> None:
    stored = {tensor.name: tensor for tensor in read(narrow.folder).graph.initializer}
    eight, four = stored["i8"], stored["i4.i4"]
    assert (eight.data_type, list(eight.dims)) == (onnx.TensorProto.INT8, [64, 64])
    assert (four.data_type, list(four.dims)) == (onnx.TensorProto.INT4, [16, 64])
    assert len(eight.raw_data) == 64 * 64
    assert len(four.raw_data) == 16 * 64 // 2
    wide = {name for name, tensor in stored.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    assert wide == {"b1", "s8.column", "s4", "w3.transposed"}
    assert (narrow.folder / "model.onnx").stat().st_size < 12_000


def test_the_four_bit_codes_are_ours(narrow: Made) -> None:
    from intarsia.kernels.linear_i4.reference import unpack

    (four,) = (tensor for tensor in read(narrow.folder).graph.initializer if tensor.name == "i4.i4")
    codes = torch.from_numpy(onnx.numpy_helper.to_array(four).astype("int8"))
    assert torch.equal(codes, unpack(narrow.program.weights["i4"]))


@pytest.mark.parametrize("unpacked_bytes", [0, 1 << 30])
def test_narrow_weights_answer_like_the_reference_for_every_size(narrow: Made, unpacked_bytes: int) -> None:
    engine = OnnxBackend(unpacked_bytes=unpacked_bytes).load(narrow.folder, ("model.onnx",))
    assert error(narrow.program, engine, N=2) < 1e-6
    assert error(narrow.program, engine, N=17) < 1e-6


def test_plain_onnx_runtime_gives_the_same_answer_without_our_options(narrow: Made) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(narrow.folder / "model.onnx"))
    (inputs,) = example_inputs(narrow.program.graph, {"N": 9})
    (answer,) = session.run(None, {"x": inputs.numpy()})
    assert agreement.error((torch.from_numpy(answer),), tuple(narrow.program.module()(inputs))) < 1e-6


def test_sizes_inputs_weights_and_nodes_keep_our_names(narrow: Made) -> None:
    graph = read(narrow.folder).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"x": ["N", 3, 64], "output.0": ["N", 3, 8]}
    assert [node.name for node in graph.node] == [
        "fc1/DequantizeLinear",
        "fc1/Transpose",
        "fc1/MatMul",
        "fc1/Add",
        "act/Gelu",
        "fc2/DequantizeLinear",
        "fc2/Transpose",
        "fc2/MatMul",
        "fc3/MatMul",
    ]


def test_sizes_that_are_multiples_keep_their_names(target: Target, tmp_path: Path) -> None:
    text = """graph g {
      size H in [1, 32]
      input %x: f32[2, 4*H]
      %y: f32[2, 2, 2*H] = aten.view(self=%x, size=[2, 2, -1])
      return %y
    }"""
    program = program_of(text)
    engine = build(program, target, tmp_path)
    (value,) = read(tmp_path).graph.output
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == [2, 2, "2*H"]
    assert error(program, engine, H=1) == error(program, engine, H=5) == 0


ATTENTION = """graph block {
  size N in [2, 64]
  input %x: f32[2, N, 32]
  param %cos: f32[1, 64, 1, 4]
  param %sin: f32[1, 64, 1, 4]
  param %g: f32[32]
  %norm: f32[2, N, 32] = aten.rms_norm(input=%x, normalized_shape=[32], weight=%g, eps=1e-06)
  %n: int = aten.sym_size.int(self=%x, dim=1)
  %q: f32[2, N, 4, 8] = aten.view(self=%norm, size=[2, %n, 4, 8])
  %c: f32[1, N, 1, 4] = aten.slice.Tensor(self=%cos, dim=1, start=0, end=%n)
  %s: f32[1, N, 1, 4] = aten.slice.Tensor(self=%sin, dim=1, start=0, end=%n)
  %pairs: f32[2, N, 4, 4, 2] = aten.view(self=%norm, size=[2, %n, 4, 4, 2])
  %even: f32[2, N, 4, 4], %odd: f32[2, N, 4, 4] = aten.unbind.int(self=%pairs, dim=-1)
  %m1: f32[2, N, 4, 4] = aten.mul.Tensor(self=%even, other=%c)
  %m2: f32[2, N, 4, 4] = aten.mul.Tensor(self=%odd, other=%s)
  %left: f32[2, N, 4, 4] = aten.sub.Tensor(self=%m1, other=%m2)
  %m3: f32[2, N, 4, 4] = aten.mul.Tensor(self=%even, other=%s)
  %m4: f32[2, N, 4, 4] = aten.mul.Tensor(self=%odd, other=%c)
  %right: f32[2, N, 4, 4] = aten.add.Tensor(self=%m3, other=%m4)
  %both: f32[2, N, 4, 4, 2] = aten.stack(tensors=[%left, %right], dim=4)
  %turned: f32[2, N, 4, 8] = aten.flatten.using_ints(self=%both, start_dim=3, end_dim=4)
  %qt: f32[2, 4, N, 8] = aten.permute(self=%turned, dims=[0, 2, 1, 3])
  %kt: f32[2, 4, N, 8] = aten.permute(self=%q, dims=[0, 2, 1, 3])
  %y: f32[2, 4, N, 8] = aten.scaled_dot_product_attention(query=%qt, key=%kt, value=%kt)
  %yt: f32[2, N, 4, 8] = aten.permute(self=%y, dims=[0, 2, 1, 3])
  %flat: f32[2, N, 32] = aten.view(self=%yt, size=[2, %n, 32])
  return %flat
}
"""


def test_attention_norm_and_rotation_are_operators_of_onnx_itself(target: Target, tmp_path: Path) -> None:
    program = program_of(ATTENTION)
    engine = build(program, target, tmp_path)
    operators = {node.op_type for node in read(tmp_path).graph.node}
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= operators
    assert not {"Transpose", "Softmax", "MatMul", "Sqrt"} & operators
    assert error(program, engine, N=3) < 1e-6
    assert error(program, engine, N=50) < 1e-6


def test_half_precision_activations_meet_narrow_weights(target: Target, tmp_path: Path) -> None:
    text = NARROW.replace("%x: f32", "%x: f16").replace("%b1: f32", "%b1: f16").replace("%w3: f32", "%w3: f16")
    text = text.replace("%fc1: f32", "%fc1: f16").replace("%act: f32", "%act: f16")
    program = program_of(text.replace("%fc2: f32", "%fc2: f16").replace("%fc3: f32", "%fc3: f16"))
    assert error(program, build(program, target, tmp_path), N=5) < agreement.TOLERANCES["f16"]


def test_the_same_program_gives_the_same_bytes_in_another_process(narrow: Made, tmp_path: Path) -> None:
    script = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_onnx import NARROW, TARGET, build, program_of
build(program_of(NARROW), TARGET, pathlib.Path(sys.argv[1]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == (narrow.folder / "model.onnx").read_bytes()


def test_the_file_tells_nothing_of_the_machine_that_made_it(narrow: Made) -> None:
    content = (narrow.folder / "model.onnx").read_bytes()
    for text in ("site-packages", 'File "', "stack_trace", str(narrow.folder), sysconfig.get_paths()["purelib"]):
        assert text.encode() not in content
    assert b"intarsia" in content


def test_large_weights_go_into_a_file_beside_the_model(target: Target, tmp_path: Path) -> None:
    program = program_of(NARROW)
    backend = OnnxBackend(external_bytes=1000)
    built = backend.build(program, target, tmp_path)
    assert built.files == ("model.onnx", "model.onnx.data")
    assert (tmp_path / "model.onnx.data").stat().st_size > 5000
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert error(program, backend.load(moved, built.files), N=3) < 1e-6


def test_tied_and_computed_weights_are_products_too(target: Target, tmp_path: Path) -> None:
    text = """graph g {
      input %x: f32[5, 8]
      param %w: f32[8, 8]
      %y: f32[5, 8] = aten.linear(input=%x, weight=%w, bias=None)
      %z: f32[5, 8] = aten.linear(input=%y, weight=%w)
      %own: f32[8, 8] = aten.mm(self=%w, mat2=%w)
      %square: f32[5, 5] = aten.linear(input=%z, weight=%x)
      %q: f32[5, 8] = aten.linear(input=%z, weight=%own)
      return %q, %square
    }"""
    program = program_of(text)
    engine = build(program, target, tmp_path)
    assert error(program, engine) < 1e-6
    assert sorted(tensor.name for tensor in read(tmp_path).graph.initializer) == ["own.transposed", "w.transposed"]


def test_inputs_parameters_and_repeated_values_may_be_outputs(target: Target, tmp_path: Path) -> None:
    text = """graph g {
      input %x: f32[2, 8]
      param %w: f32[3]
      %y: f32[2, 8] = aten.relu(self=%x)
      return %x, %y, %y, %w
    }"""
    program = program_of(text)
    assert error(program, build(program, target, tmp_path)) == 0


def test_every_operator_without_a_translation_is_listed_at_once(target: Target, tmp_path: Path) -> None:
    library = torch.library.Library("intarsia_test", "FRAGMENT")
    for name in ("sparkle", "twirl"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, torch.clone, "CompositeExplicitAutograd")
    text = """graph g {
      input %x: f32[2]
      %block.a: f32[2] = intarsia_test.sparkle(x=%x)  # model.py:12
      %block.b: f32[2] = aten.relu(self=%block.a)
      %block.c: f32[2] = intarsia_test.twirl(x=%block.b)  # model.py:14
      %block.d: f32[2] = intarsia_test.sparkle(x=%block.c)  # model.py:16
      return %block.d
    }"""
    with pytest.raises(Unsupported) as caught:
        OnnxBackend().build(program_of(text), target, tmp_path)
    sparkle, twirl = caught.value.reasons
    assert sparkle.startswith("intarsia_test.sparkle: 2 calls, first %block.a (model.py:12): torch.onnx has no trans")
    assert twirl.startswith("intarsia_test.twirl: 1 call, first %block.c (model.py:14): torch.onnx has no translation")
    assert list(tmp_path.iterdir()) == []


def test_weights_computed_at_run_time_are_refused(target: Target) -> None:
    graph = Graph.parse(NARROW)
    reasons = {node.name: OnnxBackend().why_not(node, graph, target) for node in graph.nodes}
    assert reasons["fc1"] == "weight is computed at run time; materialize the program first"
    assert reasons["fc2"] == "packed is computed at run time; materialize the program first"
    assert reasons["fc3"] is None


def test_a_broken_file_is_one_line(target: Target, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(QualityError, match="no model that ONNX Runtime can read") as caught:
        OnnxBackend().load(tmp_path, ("model.onnx",))
    assert "\n" not in str(caught.value)


def test_an_element_type_that_the_runtime_lacks_is_one_line(target: Target, tmp_path: Path) -> None:
    text = """graph g {
      input %x: bf16[2, 8]
      %y: bf16[2, 8] = aten.gelu(self=%x)
      return %y
    }"""
    with pytest.raises(MissingEnvironment, match="ONNX Runtime cannot run it here") as caught:
        build(program_of(text), target, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_runtime_is_told_with_the_remedy(narrow: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingEnvironment, match="pip install onnxruntime"):
        OnnxBackend().load(narrow.folder, ("model.onnx",))


def test_an_engine_takes_the_cores_that_the_process_may_use(narrow: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert OnnxEngine(narrow.folder / "model.onnx").device.startswith("CPU, 3 threads, ONNX Runtime ")
    assert OnnxEngine(narrow.folder / "model.onnx", threads=1).device.startswith("CPU, 1 threads")


def test_wrong_inputs_are_one_line(narrow: Made) -> None:
    engine = narrow.engine
    with pytest.raises(UsageError, match="the engine takes x; 2 tensors are given"):
        engine(torch.zeros(2), torch.zeros(2))
    with pytest.raises(UsageError, match="does not take these inputs"):
        engine(torch.zeros(2, 3, 5))
    with pytest.raises(UsageError, match="does not take these inputs"):
        engine(torch.zeros(2, 3, 64, dtype=torch.float64))


def _random_nodes(rng: random.Random, count: int) -> Iterator[tuple[str, dict[str, Arg]]]:
    """Calls on values v0 to vN of shape (2, 6, 32)."""
    for index in range(count):
        first, second = (Ref(f"v{rng.randrange(max(0, index - 3), index + 1)}") for _ in range(2))
        four = {"packed": Ref("i4"), "scale": Ref("s4"), "group": 32}
        weight, bias = Ref(f"w{rng.randrange(2)}"), rng.choice([None, Ref("b")])
        yield rng.choice(
            [
                ("aten.linear", {"input": first, "weight": weight, "bias": bias}),
                ("aten.add.Tensor", {"self": first, "other": second}),
                ("aten.mul.Tensor", {"self": first, "other": second}),
                ("aten.tanh", {"self": first}),
                ("aten.silu", {"self": first}),
                ("aten.gelu", {"self": first, "approximate": rng.choice(["none", "tanh"])}),
                ("aten.layer_norm", {"input": first, "normalized_shape": (32,), "weight": Ref("b"), "bias": None}),
                ("aten.rms_norm", {"input": first, "normalized_shape": (32,), "weight": None, "eps": 1e-6}),
                ("aten.softmax.int", {"self": first, "dim": -1}),
                ("aten.cumsum", {"self": first, "dim": 1}),
                ("aten.flip", {"self": first, "dims": (1,)}),
                ("aten.clamp", {"self": first, "min": -1.0, "max": 1.0}),
                ("aten.where.ScalarOther", {"condition": Ref("mask"), "self": first, "other": 0.5}),
                ("intarsia.linear_i8", {"input": first, "weight": Ref("i8"), "scale": Ref("s8"), "bias": bias}),
                ("intarsia.linear_i4", {**four, "input": first, "bias": bias}),
            ]
        )  # fmt: skip


def random_program(seed: int) -> Program:
    from intarsia.kernels.linear_i4.reference import quantize_groups
    from intarsia.kernels.linear_i8.reference import quantize_rows

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {f"w{i}": torch.randn(32, 32, generator=generator) / 6 for i in range(2)}
    weights["b"] = torch.randn(32, generator=generator)
    weights["mask"] = torch.rand(6, 32, generator=generator) > 0.2
    weights["i8"], weights["s8"] = quantize_rows(weights["w0"])
    weights["i4"], weights["s4"] = quantize_groups(weights["w1"], 32)
    values = {"v0": torch.randn(2, 6, 32, generator=generator), **weights}
    nodes = []
    for index, (op, args) in enumerate(_random_nodes(random.Random(seed), 14)):
        name = f"v{index + 1}"
        given = {key: values[arg.name] if isinstance(arg, Ref) else arg for key, arg in args.items()}
        values[name] = resolve(op)(**given)
        nodes.append(Node(op, args, (Value(name, type_of(values[name])),)))
    params = tuple(Value(name, type_of(tensor)) for name, tensor in weights.items())
    graph = Graph("random", (Value("v0", type_of(values["v0"])),), params, tuple(nodes), ("v14", "v13", "v12"))
    return Program(graph, weights)


@pytest.mark.parametrize("seed", range(4))
def test_the_engine_answers_like_the_reference_on_random_graphs(seed: int, target: Target, tmp_path: Path) -> None:
    program = random_program(seed)
    found = error(program, build(program, target, tmp_path))
    assert found < agreement.tolerance(program.graph)


def test_the_contract_holds_with_named_sizes_and_narrow_weights(target: Target, tmp_path: Path) -> None:
    check_backend(OnnxBackend(), program_of(NARROW), target, tmp_path)
