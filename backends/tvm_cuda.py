"""Libraries for NVIDIA GPUs, compiled by nvcc in a process of their own, on a machine with or without a GPU.

TVM writes the CUDA source into the library, silently, where its CUDA runtime cannot be loaded, and that runtime wants a
driver. So where there is none, the process is given one that holds the names TVM asks for and does nothing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from intarsia.backends.tvm_library import find_compiler, finish, link
from intarsia.ir.errors import MissingEnvironment, QualityError
from intarsia.ir.program import Program, load_program, save_weights

DRIVER = "libcuda.so.1"

CALLS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
"""What ``libtvm_runtime_cuda.so`` of TVM 0.27 takes from the driver."""

CUDA_MACHINE = 190
"""``e_machine`` of code for NVIDIA GPUs."""

SOURCE = b'extern "C" __global__'
"""What is in a library that holds source in place of code."""

SECONDS = 900
"""Longest that a build may take."""


def build_library(program: Program, architecture: str, path: Path) -> None:
    """Write the program as a library whose kernels are machine code for ``architecture``.

    Raises:
        MissingEnvironment: nvcc or the C++ compiler is missing, or nvcc does not know the architecture.
        QualityError: The library holds no code for the architecture.
    """
    nvcc, compiler = find_nvcc(), find_compiler()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.graph").write_text(str(program.graph))
        save_weights(program.weights, folder / "program.safetensors")
        environment = {
            **os.environ,
            "PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}",
            "CUDA_PATH": str(nvcc.parent.parent),
            "TVM_CUDA_COMPILE_MODE": "nvcc",
        }
        if not _has_driver():
            _write_driver(compiler, folder)
            environment["LD_LIBRARY_PATH"] = f"{folder}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"
        command = [sys.executable, "-c", f"from {__name__} import main; main()", str(folder), architecture]
        made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        if made.returncode != 0:
            said = (made.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise MissingEnvironment(f"backend tvm: nvcc gave no code for {architecture}: {said}")
        shutil.copy(folder / "library.so", path)
    check_code(path, architecture)


def check_code(path: Path, architecture: str) -> int:
    """How many pieces of machine code for ``architecture`` the library holds; QualityError if none, or if source."""
    content = path.read_bytes()
    if SOURCE in content:
        raise QualityError(f"{path} holds CUDA source in place of code; build the engine again with nvcc")
    wanted = int(architecture.removeprefix("sm_").rstrip("af"))
    found, at = 0, content.find(b"\x7fELF", 1)
    while at >= 0:
        machine, flags = struct.unpack_from("<H", content, at + 18)[0], struct.unpack_from("<I", content, at + 48)[0]
        found += machine == CUDA_MACHINE and wanted in (flags & 0xFF, flags >> 8 & 0xFF)
        at = content.find(b"\x7fELF", at + 1)
    if not found:
        raise QualityError(f"{path} holds no machine code for {architecture}; build the engine again")
    return found


def find_nvcc() -> Path:
    """CUDA's compiler: below ``$CUDA_PATH`` or ``$CUDA_HOME``, or on the path."""
    homes = [Path(os.environ[key]) / "bin" / "nvcc" for key in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(key)]
    found = next((path for path in homes if path.is_file()), None) or shutil.which("nvcc")
    if found is None:
        raise MissingEnvironment(
            "backend tvm compiles for NVIDIA GPUs with nvcc, which is missing; install the CUDA toolkit, set CUDA_PATH"
        )
    asked = subprocess.run(
        [str(found), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    )
    top = next((line.partition("_HERE_=")[2].split()[0] for line in asked.stderr.splitlines() if "_HERE_=" in line), "")
    return Path(top, "nvcc") if top else Path(found).resolve()


def _has_driver() -> bool:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def _write_driver(compiler: str, folder: Path) -> None:
    source = folder / "driver.cc"
    source.write_text("".join(f'extern "C" int {name}() {{ return 100; }}\n' for name in CALLS))
    options = ["-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(folder / DRIVER), str(source)]
    subprocess.run([compiler, *options], check=True, capture_output=True)


def main() -> None:
    """Build the program in the folder and for the architecture that the command line names."""
    folder, architecture = Path(sys.argv[1]), sys.argv[2]
    link(_compiled(load_program(folder / "program.graph"), architecture), folder / "library.so")
    sys.stdout.flush()
    os._exit(0)  # A driver that does nothing is not to be unloaded in order.


def _compiled(program: Program, architecture: str) -> Any:
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    from intarsia.backends.tvm_lowering import relax_module

    host = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
    target = tvm.target.Target({"kind": "cuda", "arch": architecture, **limits}, host=host)
    gpu = dlight.gpu
    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
    with target:
        module = tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                dlight.ApplyDefaultSchedule(*rules),
            ]
        )(relax_module(program, kind="cuda"))
        return relax.build(module, target, relax_pipeline=finish())
