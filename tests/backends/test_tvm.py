from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.base import Engine, find_backend, refusals, require_support
from intarsia.backends.conformance import check_backend
from intarsia.backends.tvm import TvmBackend
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, save_weights
from intarsia.ir.target import Target, load_target

pytest.importorskip("tvm")

BLOCK = """graph block {
  input %x: f32[2, 37, 48]
  input %scale: f32[2, 1, 48]
  input %shift: f32[2, 1, 48]
  param %to_q: f32[48, 48]
  param %to_k: f32[48, 48]
  param %to_v: f32[48, 48]
  param %cos: f32[37, 12]
  param %sin: f32[37, 12]
  param %norm: f32[48]
  param %up: f32[100, 48]
  param %up.bias: f32[100]
  param %down: f32[48, 100]
  %m: f32[2, 37, 48] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%scale, shift=%shift, eps=1e-06)
  %q: f32[2, 37, 48] = aten.linear(input=%m, weight=%to_q)
  %k: f32[2, 37, 48] = aten.linear(input=%m, weight=%to_k)
  %v: f32[2, 37, 48] = aten.linear(input=%m, weight=%to_v)
  %qr: f32[2, 37, 2, 24] = intarsia.norm_rope(input=%q, weight=%norm, cos=%cos, sin=%sin, heads=2, eps=1e-06)
  %kr: f32[2, 37, 2, 24] = intarsia.norm_rope(input=%k, weight=None, cos=%cos, sin=%sin, heads=2, eps=1e-06)
  %vr: f32[2, 37, 2, 24] = aten.view(self=%v, size=[2, 37, 2, 24])
  %qh: f32[2, 2, 37, 24] = aten.permute(self=%qr, dims=[0, 2, 1, 3])
  %kh: f32[2, 2, 37, 24] = aten.permute(self=%kr, dims=[0, 2, 1, 3])
  %vh: f32[2, 2, 37, 24] = aten.permute(self=%vr, dims=[0, 2, 1, 3])
  %a: f32[2, 2, 37, 24] = intarsia.attention(query=%qh, key=%kh, value=%vh, lengths=None, scale=None)
  %ah: f32[2, 37, 2, 24] = aten.permute(self=%a, dims=[0, 2, 1, 3])
  %af: f32[2, 37, 48] = aten.reshape(self=%ah, shape=[2, 37, 48])
  %r: f32[2, 37, 48] = intarsia.gated_residual(residual=%x, input=%af, gate=%scale)
  %u: f32[2, 37, 100] = aten.linear(input=%r, weight=%up, bias=%up.bias)
  %g: f32[2, 37, 100] = aten.gelu(self=%u)
  %d: f32[2, 37, 48] = aten.linear(input=%g, weight=%down)
  %y: f32[2, 37, 48] = aten.add.Tensor(self=%d, other=%r)
  return %y, %a
}
"""

PICTURE = """graph picture {
  input %x: f32[2, 3, 17, 17]
  param %first: f32[20, 3, 3, 3]
  param %first.bias: f32[20]
  param %second: f32[20, 20, 3, 3]
  param %weight: f32[20]
  param %bias: f32[20]
  param %mean: f32[20]
  param %variance: f32[20]
  param %last: f32[10, 20]
  %c: f32[2, 20, 9, 9] = aten.conv2d(input=%x, weight=%first, bias=%first.bias, stride=[2, 2], padding=[1, 1])
  %r: f32[2, 20, 9, 9] = aten.relu(self=%c)
  %d: f32[2, 20, 9, 9] = aten.conv2d(input=%r, weight=%second, bias=None, padding=[1, 1])
  %n: f32[2, 20, 9, 9] = aten.batch_norm(input=%d, weight=%weight, bias=%bias, running_mean=%mean, running_var=%variance, training=False, momentum=0.1, eps=1e-05, cudnn_enabled=False)
  %s: f32[2, 20, 9, 9] = aten.add.Tensor(self=%n, other=%r)
  %p: f32[2, 20, 5, 5] = aten.max_pool2d(self=%s, kernel_size=[3, 3], stride=[2, 2], padding=[1, 1])
  %m: f32[2, 20, 1, 1] = aten.adaptive_avg_pool2d(self=%p, output_size=[1, 1])
  %f: f32[2, 20] = aten.flatten.using_ints(self=%m, start_dim=1)
  %y: f32[2, 10] = aten.linear(input=%f, weight=%last)
  return %y, %s
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def cpu() -> Target:
    return load_target("cpu-avx2")


def random_program(text: str) -> Program:
    graph = Graph.parse(text)
    generator = torch.Generator().manual_seed(0)
    weights = {p.name: torch.rand(p.type.shape, generator=generator) + 0.1 for p in graph.params}
    return Program(graph, weights)


def built(program: Program, target: Target, folder: Path, backend: TvmBackend | None = None) -> Engine:
    backend = backend or TvmBackend()
    made = backend.build(program, target, folder)
    return backend.load(folder, made.files)


def answers(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(program.module()(*inputs))


@pytest.mark.parametrize("text", [BLOCK, PICTURE], ids=["transformer", "convolutions"])
def test_a_network_keeps_the_contract_of_backends(text: str, cpu: Target, tmp_path: Path) -> None:
    check_backend(TvmBackend(), random_program(text), cpu, tmp_path)


def test_wan_mini_runs_in_a_fresh_process_as_eagerly(cpu: Target, tmp_path: Path) -> None:
    intarsia = pytest.importorskip("intarsia")
    pytest.importorskip("diffusers")
    from intarsia.ir.program import materialize
    from intarsia.passes.apply import run_passes

    program = intarsia.trace("wan-mini")
    fused = materialize(Program(run_passes(TvmBackend.passes, program.graph, cpu), program.weights))
    files = TvmBackend().build(fused, cpu, tmp_path).files
    inputs = example_inputs(fused.graph)
    save_weights({str(index): tensor for index, tensor in enumerate(inputs)}, tmp_path / "inputs")
    script = f"""
import os
from pathlib import Path
from safetensors.torch import load_file, save_file
cores = os.sched_getaffinity(0)
from intarsia.backends.base import find_backend
folder = Path({str(tmp_path)!r})
inputs = load_file(folder / "inputs")
engine = find_backend("tvm").load(folder, {files!r})
answers = engine(*(inputs[str(index)] for index in range(len(inputs))))
save_file({{"answer": answers[0]}}, folder / "answer")
assert os.sched_getaffinity(0) == cores, "the engine has pinned the process"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "answer")["answer"]
    assert agreement.error([found], answers(materialize(program), *inputs)) < 1e-4


def test_lengths_hide_keys_and_no_key_gives_zeros(cpu: Target, tmp_path: Path) -> None:
    text = """graph masked {
      input %q: f32[3, 2, 9, 16]
      input %k: f32[3, 2, 21, 16]
      input %v: f32[3, 2, 21, 16]
      input %lengths: i64[3]
      %y: f32[3, 2, 9, 16] = intarsia.attention(query=%q, key=%k, value=%v, lengths=%lengths, scale=0.5)
      return %y
    }"""
    program = random_program(text)
    *tensors, _ = example_inputs(program.graph)
    inputs = (*tensors, torch.tensor([21, 0, 7]))
    (found,) = built(program, cpu, tmp_path)(*inputs)
    assert agreement.error([found], answers(program, *inputs)) < 1e-6
    assert found[1].abs().max() == 0


@pytest.mark.parametrize("given", ["is_causal=True", "attn_mask=%mask"])
def test_attention_with_another_mask_is_exact_too(given: str, cpu: Target, tmp_path: Path) -> None:
    text = f"""graph masked {{
      input %q: f32[2, 2, 9, 16]
      input %k: f32[2, 2, 9, 16]
      input %mask: f32[2, 1, 9, 9]
      %y: f32[2, 2, 9, 16] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%k, {given})
      return %y
    }}"""
    program = random_program(text)
    inputs = example_inputs(program.graph)
    assert agreement.error(built(program, cpu, tmp_path)(*inputs), answers(program, *inputs)) < 1e-6


def test_a_vector_and_a_matrix_are_multiplied(cpu: Target, tmp_path: Path) -> None:
    text = """graph g {
      input %x: f32[8]
      param %w: f32[5, 8]
      %y: f32[5] = aten.linear(input=%x, weight=%w)
      return %y
    }"""
    program = random_program(text)
    inputs = example_inputs(program.graph)
    assert agreement.error(built(program, cpu, tmp_path)(*inputs), answers(program, *inputs)) < 1e-6


def test_a_residual_may_be_its_own_input(cpu: Target, tmp_path: Path) -> None:
    text = """graph g {
      input %x: f32[2, 3, 8]
      input %gate: f32[2, 1, 8]
      %y: f32[2, 3, 8] = intarsia.gated_residual(residual=%x, input=%x, gate=%gate)
      return %y
    }"""
    program = random_program(text)
    inputs = example_inputs(program.graph)
    assert agreement.error(built(program, cpu, tmp_path)(*inputs), answers(program, *inputs)) < 1e-6


@pytest.mark.parametrize("op", ["exp", "sigmoid", "silu", "tanh", "erf", "gelu"])
def test_functions_of_one_number_agree_over_their_range(op: str, cpu: Target, tmp_path: Path) -> None:
    text = f"graph g {{\n input %x: f32[4001]\n %y: f32[4001] = aten.{op}(self=%x)\n return %y\n}}"
    program = random_program(text)
    x = torch.linspace(-40, 40, 4001)
    (found,) = built(program, cpu, tmp_path)(x)
    (expected,) = answers(program, x)
    assert torch.allclose(found, expected, rtol=2e-6, atol=4e-7)


def test_inputs_of_another_shape_are_refused_in_one_line(cpu: Target, tmp_path: Path) -> None:
    text = "graph g {\n input %x: f32[4]\n %y: f32[4] = aten.relu(self=%x)\n return %y\n}"
    engine = built(random_program(text), cpu, tmp_path)
    with pytest.raises(UsageError, match=r"the engine takes x: f32\[4\]; found f32\[5\]"):
        engine(torch.ones(5))


def test_all_that_cannot_be_lowered_is_told_before_anything_is_built(cpu: Target) -> None:
    text = """graph g {
      input %x: f32[4]
      input %h: f16[4]
      input %n: f32[N]
      %a: f32[4] = nowhere.nothing(self=%x)  # model.py:1
      %b: f16[4] = aten.relu(self=%h)
      %c: f32[N] = aten.relu(self=%n)
      %d: f32[4] = aten.special_bessel_j0(self=%x)
      %e: f64[4] = aten.to.dtype(self=%x, dtype=torch.float64)
      %f: f64[4] = aten.rms_norm(input=%e, normalized_shape=[4])
      return %a, %b, %c, %d, %f
    }"""
    found = [str(one) for one in refusals(TvmBackend(), Graph.parse(text), cpu)]
    assert len(found) == 5
    assert any("%f: its kernel computes in f32" in one for one in found)
    assert any("%b: element type f16 has no fast kernel" in one for one in found)
    assert any("%c: size N is not fixed" in one for one in found)
    assert any("TVM's importer has no aten.special_bessel_j0.default" in one for one in found)
    assert any(one.startswith("nowhere.nothing: 1 call, first %a (model.py:1)") for one in found)


def test_another_machine_is_refused(cpu: Target) -> None:
    with pytest.raises(Unsupported, match=r"backend tvm cannot build for null: it compiles for"):
        require_support(TvmBackend(), Graph.parse(BLOCK), load_target("null"))


def test_a_missing_compiler_is_one_line(cpu: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingEnvironment, match=r"there is none; install g\+\+"):
        TvmBackend().build(random_program(PICTURE), cpu, tmp_path)


def test_a_damaged_library_is_told_and_not_loaded(cpu: Target, tmp_path: Path) -> None:
    text = "graph g {\n input %x: f32[4]\n %y: f32[4] = aten.relu(self=%x)\n return %y\n}"
    backend = TvmBackend()
    files = backend.build(random_program(text), cpu, tmp_path).files
    assert backend.check(tmp_path, files).startswith("ELF library for x86-64-v3 with ")
    library = tmp_path / "model.so"
    whole = library.read_bytes()
    for content, said in [
        (whole[: len(whole) // 2], "is cut off"),
        (b"no library", "is no 64-bit ELF library"),
        (whole[:18] + b"\xb7\x00" + whole[20:], "is a library for machine 183"),
    ]:
        library.write_bytes(content)
        with pytest.raises(QualityError, match=said):
            backend.load(tmp_path, files)
    for facts, said in [("{", "cannot be read"), ("{}", "does not say kind"), ("[]", "does not say kind")]:
        (tmp_path / "model.json").write_text(facts)
        for look in (backend.check, backend.load):
            with pytest.raises(QualityError, match=said):
                look(tmp_path, files)


def test_the_notation_gives_the_options() -> None:
    assert find_backend("tvm(trials=4)") == TvmBackend(trials=4)


def test_the_compiler_of_the_environment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from intarsia.backends.tvm_library import find_compiler

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("CXX", compiler)
    assert find_compiler() == compiler
