from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from intarsia.backends import agreement, tensorrt_build
from intarsia.backends.base import Built, find_backend, refusals
from intarsia.backends.null import NullEngine
from intarsia.backends.tensorrt import TensorrtBackend
from intarsia.backends.tensorrt_limits import LACKS
from intarsia.ir.errors import MissingEnvironment, QualityError, SpecError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import load_target

trt = pytest.importorskip("tensorrt_rtx_bindings")
onnx = pytest.importorskip("onnx")

RTX4090, A100, H100 = (load_target(name) for name in ("rtx4090", "a100", "h100"))

NARROW = """graph narrow {
  size N in [2, 64]
  input %x: f16[N, 3, 64]
  param %w1: f32[64, 64]
  param %b1: f16[64]
  param %w2: f32[16, 64]
  param %w3: f16[8, 16]
  %i8: i8[64, 64], %s8: f32[64] = intarsia.quantize_rows(weight=%w1)
  %q: i8[N, 3, 64] = intarsia.quantize_static(input=%x, scale=0.03)
  %d: f16[N, 3, 64] = intarsia.dequantize_static(input=%q, scale=0.03, dtype=torch.float16)
  %fc1: f16[N, 3, 64] = intarsia.linear_i8(input=%d, weight=%i8, scale=%s8, bias=%b1)
  %act: f16[N, 3, 64] = aten.gelu(self=%fc1)
  %i4: u8[16, 32], %s4: f32[16, 2] = intarsia.quantize_groups(weight=%w2, group=32)
  %fc2: f16[N, 3, 16] = intarsia.linear_i4(input=%act, packed=%i4, scale=%s4, bias=None, group=32)
  %fc3: f16[N, 3, 8] = aten.linear(input=%fc2, weight=%w3)
  return %fc3
}
"""

INTEGERS = """graph integers {
  input %x: f32[4, 16, 24, 24]
  param %c.weight: i8[32, 8, 3, 3]
  param %c.bias: i32[32]
  param %c.multiplier: i32[32]
  param %c.shift: i32[32]
  param %l.weight: i8[24, 32]
  param %l.multiplier: i32[24]
  param %l.shift: i32[24]
  %q: i8[4, 16, 24, 24] = intarsia.quantize_static(input=%x, scale=0.03)
  %c: i8[4, 32, 12, 12] = intarsia.conv2d_i8i8(input=%q, weight=%c.weight, bias=%c.bias, multiplier=%c.multiplier, shift=%c.shift, stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups=2)
  %p: i8[4, 12, 12, 32] = aten.permute(self=%c, dims=[0, 2, 3, 1])
  %l: i8[4, 12, 12, 24] = intarsia.linear_i8i8(input=%p, weight=%l.weight, bias=None, multiplier=%l.multiplier, shift=%l.shift)
  return %c, %l
}
"""  # noqa: E501

ATTENTION = """graph attention {
  size N in [2, 64]
  input %q: f32[2, 4, N, 32]
  input %k: f32[2, 4, 24, 32]
  input %v: f32[2, 4, 24, 32]
  input %m: b1[2, 1, N, 24]
  %y: f32[2, 4, N, 32] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v, attn_mask=%m)
  %z: f32[2, 4, N, 32] = aten.scaled_dot_product_attention(query=%q, key=%y, value=%y, is_causal=True, scale=0.3)
  return %z
}
"""

EIGHTS = """graph eights {
  input %x: f16[4, 64]
  param %w: f16[32, 64]
  %blocks.0.q: f8e4m3[4, 64] = aten._to_copy(self=%x, dtype=torch.float8_e4m3fn)  # model.py:7
  %blocks.0.d: f16[4, 64] = aten._to_copy(self=%blocks.0.q, dtype=torch.float16)  # model.py:8
  %y: f16[4, 32] = aten.linear(input=%blocks.0.d, weight=%w)
  return %y
}
"""


def program_of(text: str) -> Program:
    """With random weights; dyadic numbers between 2**-10 and 2**-9."""
    graph, generator = Graph.parse(text), torch.Generator().manual_seed(0)
    weights = {}
    for param in graph.params:
        type_ = graph.type(param.name)
        low, high = {"multiplier": (2**30, 2**31 - 1), "shift": (40, 41), "bias": (-2000, 2000)}.get(
            param.name.split(".")[-1], (-127, 128)
        )
        floating = DTYPES[type_.dtype].is_floating_point
        shape: Sequence[int] = type_.shape  # type: ignore[assignment]
        made = (
            torch.randn(shape, generator=generator)
            if floating
            else torch.randint(low, high, shape, generator=generator)
        )
        weights[param.name] = made.to(DTYPES[type_.dtype])
    return materialize(Program(graph, weights))


def build(text: str, folder: Path, backend: TensorrtBackend | None = None) -> Built:
    folder.mkdir(exist_ok=True)
    return (backend or TensorrtBackend()).build(program_of(text), RTX4090, folder)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """The engine of the first graph above."""
    folder = tmp_path_factory.mktemp("narrow")
    return folder, build(NARROW, folder)


def test_narrow_weights_are_dequantized_to_the_activations_type_at_once(narrow: tuple[Path, Built]) -> None:
    nodes = onnx.load(narrow[0] / "model.onnx").graph.node
    assert [node.name for node in nodes] == [
        "q/QuantizeLinear",
        "d/DequantizeLinear",
        "fc1/DequantizeLinear",
        "fc1/MatMul",
        "fc1/Add",
        "act/Gelu",
        "fc2/DequantizeLinear",
        "fc2/MatMul",
        "fc3/MatMul",
    ]
    types = [
        a.i for node in nodes if node.op_type == "DequantizeLinear" for a in node.attribute if a.name == "output_dtype"
    ]
    assert types == [onnx.TensorProto.FLOAT16] * 3


@pytest.mark.parametrize("extent", [2, 17])
def test_the_typed_onnx_answers_like_eager_for_every_size(narrow: tuple[Path, Built], extent: int) -> None:
    program = program_of(NARROW)
    inputs = example_inputs(program.graph, {"N": extent})
    answer = TensorrtBackend().load_reference(narrow[0], narrow[1].files)(*inputs)
    assert agreement.error(answer, NullEngine(program)(*inputs)) < 2e-3


def test_named_sizes_become_an_optimization_profile(narrow: tuple[Path, Built]) -> None:
    settings = json.loads((narrow[0] / "build.json").read_text())
    assert settings["profile"] == {"x": {"min": [2, 3, 64], "opt": [64, 3, 64], "max": [64, 3, 64]}}


def test_the_same_program_gives_the_same_plan_in_another_place(narrow: tuple[Path, Built], tmp_path: Path) -> None:
    build(NARROW, tmp_path / ("long" * 20))
    for name in narrow[1].files:
        assert (narrow[0] / name).read_bytes() == (tmp_path / ("long" * 20) / name).read_bytes(), name


def test_the_script_in_the_bundle_builds_the_engine_again_by_itself(narrow: tuple[Path, Built], tmp_path: Path) -> None:
    for name in ("model.onnx", "build.json", "build.py"):
        (tmp_path / name).write_bytes((narrow[0] / name).read_bytes())
    command = [sys.executable, "-I", str(tmp_path / "build.py")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.startswith("tensorrt_rtx ")
    assert len((tmp_path / "engine.tensorrt_rtx.plan").read_bytes()) == narrow[1].info["engine"]["bytes"]  # type: ignore[index]


def test_integer_products_differ_from_the_exact_ones_at_ties_only(tmp_path: Path) -> None:
    backend, program = TensorrtBackend(), program_of(INTEGERS)
    built = backend.build(program, RTX4090, tmp_path)
    inputs = example_inputs(program.graph)
    answer = backend.load_reference(tmp_path, built.files)(*inputs)
    assert agreement.error(answer, NullEngine(program)(*inputs)) < 1e-4
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("QuantizeLinear") == 3
    assert not {"ConvInteger", "MatMulInteger", "BitShift"} & set(operators)


def test_attention_in_f32_is_built_from_pieces(tmp_path: Path) -> None:
    backend, program = TensorrtBackend(typical="N=16"), program_of(ATTENTION)
    built = backend.build(program, RTX4090, tmp_path)
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Softmax" in operators
    assert "Attention" not in operators
    *tensors, mask = example_inputs(program.graph, {"N": 17})
    mask[..., 0] = True
    expected = NullEngine(program)(*tensors, mask)
    assert agreement.error(backend.load_reference(tmp_path, built.files)(*tensors, mask), expected) < 1e-5


def test_f8_is_quantization_with_scale_one(tmp_path: Path) -> None:
    backend, program = TensorrtBackend(), program_of(EIGHTS)
    built = backend.build(program, RTX4090, tmp_path)
    inputs = example_inputs(program.graph)
    assert agreement.error(backend.load_reference(tmp_path, built.files)(*inputs), NullEngine(program)(*inputs)) < 1e-2


def test_f8_on_a_machine_without_it_is_one_line_with_the_nodes_name() -> None:
    with pytest.raises(Unsupported) as caught:
        TensorrtBackend().build(program_of(EIGHTS), A100, Path("nowhere"))
    (reason,) = caught.value.reasons
    assert reason.startswith("aten._to_copy: 2 calls, first %blocks.0.q (model.py:7): f8e4m3 needs sm_89 or later, and")


REFUSED = """graph refused {
  input %x: f64[4, 8]
  input %i: i32[4, 8]
  input %b: b1[4, 8]
  %double: f64[4, 8] = aten.relu(self=%x)
  %and: i32[4, 8] = aten.bitwise_and.Tensor(self=%i, other=%i)
  %both: b1[4, 8] = aten.bitwise_and.Tensor(self=%b, other=%b)
  %shift: i32[4, 8] = aten.bitwise_right_shift.Tensor_Scalar(self=%and, other=2)
  return %double, %shift, %both
}
"""


def test_everything_that_tensorrt_lacks_is_listed_before_anything_is_built() -> None:
    found = {one.place: one.reason for one in refusals(TensorrtBackend(), Graph.parse(REFUSED), RTX4090)}
    assert found == {
        "double": "TensorRT has no f64, only f32, f16, bf16, f8e4m3, i64, i32, i8, u8, b1; cast before, such as with "
        "pass cast-floats",
        "and": "TensorRT has no BitwiseAnd; compute it before, where its inputs are constant, or use backend onnx",
        "shift": "TensorRT has no BitShift; compute it before, where its inputs are constant, or use backend onnx",
    }


def test_the_parser_itself_lacks_what_we_say_that_it_lacks() -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    parser = trt.OnnxParser(builder.create_network(0), trt.Logger(trt.Logger.ERROR))
    assert [name for name in set(LACKS.values()) if parser.supports_operator(name)] == []


def onnx_file(path: Path, nodes: Sequence[object], types: Sequence[int]) -> Path:
    """A model on inputs a, b of shape (4) and these element types, with output y in the first of them."""
    values = [onnx.helper.make_tensor_value_info(name, dtype, [4]) for name, dtype in zip("ab", types, strict=True)]
    output = onnx.helper.make_tensor_value_info("y", types[0], [4])
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("acme", 1)]
    graph = onnx.helper.make_graph(list(nodes), "g", values, [output])
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=11), path)
    return path


SETTINGS = {"name": "g", "level": 3, "tf32": False, "version_compatible": False, "profile": {}}


def test_mixed_element_types_are_refused_with_the_nodes_name(tmp_path: Path) -> None:
    add = onnx.helper.make_node("Add", ["a", "b"], ["y"], name="blocks.0.add/Add")
    path = onnx_file(tmp_path / "model.onnx", [add], [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16])
    with pytest.raises(tensorrt_build.Refused) as caught:
        tensorrt_build.build_plan(trt, path, {**SETTINGS, "architecture": "sm_89"})
    (reason,) = caught.value.reasons
    assert reason.startswith("%blocks.0.add/Add (Add): ")
    assert "must have same input types. But they are of types Float and Half" in reason


def test_an_unknown_operator_is_refused_with_the_nodes_name(tmp_path: Path) -> None:
    sparkle = onnx.helper.make_node("Sparkle", ["a", "b"], ["y"], name="blocks.0.sparkle/Sparkle", domain="acme")
    path = onnx_file(tmp_path / "model.onnx", [sparkle], [onnx.TensorProto.FLOAT] * 2)
    with pytest.raises(tensorrt_build.Refused, match=r"^%blocks.0.sparkle/Sparkle \(Sparkle\): .*Plugin not found"):
        tensorrt_build.build_plan(trt, path, {**SETTINGS, "architecture": "sm_89"})


def test_what_the_builder_itself_refuses_names_the_nodes_with_that_element_type(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(EIGHTS, tmp_path, TensorrtBackend(engine=False))
    with pytest.raises(tensorrt_build.Refused) as caught:
        tensorrt_build.build_plan(trt, tmp_path / "model.onnx", {**SETTINGS, "architecture": "sm_80"})
    assert caught.value.reasons[0].startswith("%blocks.0.q/QuantizeLinear and ")
    assert "Cannot compile for target(s) sm80" in caught.value.reasons[0]


def test_a_crash_of_the_builder_ends_no_process_of_ours(tmp_path: Path) -> None:
    text = """graph crash {
      input %q: f16[2, 4, 17, 32]
      %y: f16[2, 4, 17, 32] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
      return %y
    }"""
    with pytest.raises(Unsupported) as caught:
        build(text, tmp_path)
    (reason,) = caught.value.reasons
    assert reason == "its builder ended with code -11, a fault of its own; try tensorrt(engine=False)"


def test_targets_that_the_builder_lacks_are_told_what_to_do() -> None:
    assert TensorrtBackend().why_not_target(load_target("cpu-avx2")) == (
        "TensorRT runs on NVIDIA GPUs, and this is a target of kind cpu; use backend onnx or tvm"
    )
    reason = TensorrtBackend().why_not_target(H100)
    assert reason is not None
    assert (
        "builds here for sm_75, sm_80, sm_86, sm_89, sm_120, sm_121, not for sm_90, which needs the package" in reason
    )
    assert "tensorrt(engine=False) writes the typed ONNX and build.py" in reason


def test_without_an_engine_the_typed_onnx_is_still_parsed_by_nvidia(tmp_path: Path) -> None:
    backend = find_backend("tensorrt(engine=False)")
    built = backend.build(program_of(NARROW), H100, tmp_path)
    assert built.files == ("model.onnx", "build.py", "build.json")
    assert (
        backend.check(tmp_path, built.files) == "typed ONNX is sound; no engine, build it on the target with build.py"
    )
    with pytest.raises(
        MissingEnvironment, match=r"no engine.tensorrt_rtx.plan yet; build it on the machine .*build.py"
    ):
        backend.load(tmp_path, built.files)


def test_altered_files_are_one_line(narrow: tuple[Path, Built], tmp_path: Path) -> None:
    for name in narrow[1].files:
        (tmp_path / name).write_bytes((narrow[0] / name).read_bytes())
    plan = (tmp_path / "engine.tensorrt_rtx.plan").read_bytes()
    check, files = TensorrtBackend().check, narrow[1].files
    assert check(
        tmp_path, files
    ) == f"typed ONNX is sound; engine.tensorrt_rtx.plan, {len(plan):,} bytes by tensorrt_rtx " + (
        f"{trt.__version__}, is the one built"
    )
    for altered, said in (
        (plan[:-1], "is no TensorRT-RTX engine, or not all of one"),
        (b"ELF?" + plan[4:], "is no TensorRT-RTX engine, or not all of one"),
        (plan[:5000] + bytes([plan[5000] ^ 1]) + plan[5001:], r"is not the engine that build.json tells of"),
    ):
        (tmp_path / "engine.tensorrt_rtx.plan").write_bytes(altered)
        with pytest.raises(QualityError, match=said) as caught:
            check(tmp_path, files)
        assert "\n" not in str(caught.value)
    for settings in ("{}", "[]", '{"engine": {"file": "engine.gone.plan"}}'):
        (tmp_path / "build.json").write_text(settings)
        with pytest.raises(QualityError, match=r"build.json tells of no engine that is here"):
            check(tmp_path, files)
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(QualityError, match=r"no sound model.onnx or build.json"):
        check(tmp_path, files)
    with pytest.raises(QualityError, match=r"model.onnx is no ONNX model"):
        TensorrtBackend().load_reference(tmp_path, files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_an_engine_without_a_gpu_is_one_line(narrow: tuple[Path, Built]) -> None:
    with pytest.raises(MissingEnvironment, match="runs on an NVIDIA GPU, and PyTorch sees none here"):
        TensorrtBackend().load(narrow[0], narrow[1].files)


def test_a_missing_builder_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tensorrt_build.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingEnvironment, match=r"pip install 'intarsia\[tensorrt\]'"):
        build(NARROW, tmp_path)


def test_sizes_without_an_upper_bound_and_wrong_options_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="size N has no upper bound"):
        build(NARROW.replace("[2, 64]\n", "[2, inf]\n", 1), tmp_path)
    with pytest.raises(UsageError, match="typical names H; sizes of narrow: N"):
        build(NARROW, tmp_path, TensorrtBackend(typical="H=3"))
    with pytest.raises(UsageError, match=r"typical is outside of N in \[2, 64\]"):
        build(NARROW, tmp_path, TensorrtBackend(typical="N=65"))
    with pytest.raises(SpecError, match="level is 9; the builder has 0 to 5"):
        find_backend("tensorrt(level=9)")
    with pytest.raises(SpecError, match="sizes are written 'N=8, H=32'"):
        find_backend("tensorrt(typical='large')")


def test_options_reach_the_builder(tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    build(NARROW, tmp_path / "a", TensorrtBackend(timing_cache=str(cache), tf32=True, level=0, typical="N=4"))
    assert cache.stat().st_size > 0
    settings = json.loads((tmp_path / "a" / "build.json").read_text())
    assert (settings["tf32"], settings["level"], settings["profile"]["x"]["opt"]) == (True, 0, [4, 3, 64])
    with pytest.raises(tensorrt_build.Refused, match="libnvinfer_lean"):
        tensorrt_build.build_plan(trt, tmp_path / "a" / "model.onnx", {**settings, "version_compatible": True})
