from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.backends import tvm_cuda
from intarsia.backends.tvm import TvmBackend
from intarsia.ir.errors import MissingEnvironment, QualityError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import load_target

tvm = pytest.importorskip("tvm")

TEXT = """graph g {
  input %x: f32[8, 32]
  param %w: f32[16, 32]
  %y: f32[8, 16] = aten.linear(input=%x, weight=%w)
  %z: f32[8, 16] = aten.gelu(self=%y)
  return %z
}"""


@pytest.fixture
def program() -> Program:
    return Program(Graph.parse(TEXT), {"w": torch.ones(16, 32)})


@pytest.mark.parametrize(("target", "architecture"), [("a100", "sm_80"), ("h100", "sm_90")])
def test_a_library_for_a_gpu_holds_its_machine_code(
    target: str, architecture: str, program: Program, tmp_path: Path
) -> None:
    try:
        tvm_cuda.find_nvcc()
    except MissingEnvironment as error:
        pytest.skip(str(error))
    backend = TvmBackend()
    files = backend.build(program, load_target(target), tmp_path).files
    assert f"1 cubin for {architecture}" in backend.check(tmp_path, files)
    other = "sm_90" if architecture == "sm_80" else "sm_80"
    with pytest.raises(QualityError, match=f"holds no machine code for {other}"):
        tvm_cuda.check_code(tmp_path / "model.so", other)
    if not tvm.cuda().exist:
        with pytest.raises(MissingEnvironment, match=f"for an NVIDIA GPU, {architecture}, and there is none here"):
            backend.load(tmp_path, files)


def test_source_in_place_of_code_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b'\x7fELF extern "C" __global__ void kernel')
    with pytest.raises(QualityError, match="holds CUDA source in place of code"):
        tvm_cuda.check_code(path, "sm_80")


def test_a_missing_nvcc_is_one_line(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingEnvironment, match="nvcc, which is missing; install the CUDA toolkit"):
        TvmBackend().build(program, load_target("a100"), tmp_path)
