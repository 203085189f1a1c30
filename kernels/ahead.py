"""Compile a launch ahead of time, for a GPU that need not be there, and say what the code uses."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.ir.errors import MissingEnvironment, Unsupported
from intarsia.kernels.launch import ALIGNMENT, Launch, imported, runtime_parameters


@dataclass(frozen=True)
class Architecture:
    """What Triton is told about a GPU.

    Attributes:
        backend: ``cuda`` or ``hip``.
        number: Triton's name of the architecture inside the backend.
        threads_per_warp: 32 on NVIDIA's, 64 on AMD's.
        ptx: PTX version to emit, times ten: as old as the architecture allows, so that older drivers take it; None on
            AMD's.
        matrix: The instruction that multiplies matrices, as assembly spells it.
    """

    backend: str
    number: int | str
    threads_per_warp: int
    ptx: int | None
    matrix: str


ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_80": Architecture("cuda", 80, 32, 83, "mma.sync"),
    "sm_89": Architecture("cuda", 89, 32, 83, "mma.sync"),
    "sm_90": Architecture("cuda", 90, 32, 83, "wgmma.mma_async"),
    "sm_100": Architecture("cuda", 100, 32, 86, "tcgen05.mma"),
    "gfx942": Architecture("hip", "gfx942", 64, None, "v_mfma"),
}
"""GPUs that kernels are compiled for: A100, RTX 40 and L40, H100 and H200, B200, MI300. Code for sm_90 and sm_100 runs
on no later one."""

MATRIX = tuple(dict.fromkeys(one.matrix for one in ARCHITECTURES.values()))


@dataclass(frozen=True)
class Compiled:
    """Code for one launch on one architecture.

    A launcher passes the launch's arguments and after them two null pointers, to scratch memory that the code does not
    use, starts ``warps`` x ``threads_per_warp`` threads a program and gives them ``shared_bytes``.

    Attributes:
        binary: The cubin or AMD's code object.
        assembly: PTX or AMD's assembly.
        name: The function in them.
        shared_bytes: Memory that a program's threads share.
        warps: Warps of one program.
        threads_per_warp: Threads of one warp.
        registers: 32-bit registers of one thread.
        spills: Bytes (NVIDIA) or registers (AMD) that a thread had to put into memory; 0 in good code.
        instructions: How often the code says each instruction that multiplies matrices.
    """

    binary: bytes
    assembly: str
    name: str
    shared_bytes: int
    warps: int
    threads_per_warp: int
    registers: int
    spills: int
    instructions: Mapping[str, int]


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """The launch's kernel for ``architecture``; Triton's cache, ``TRITON_CACHE_DIR``, is asked first.

    Raises:
        Unsupported: The architecture is none of ``ARCHITECTURES``.
        MissingEnvironment: Triton is not installed, or its interpreter stands in its compiler's place.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise Unsupported(f"architecture {architecture} is none that kernels are compiled for; those are {known}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise MissingEnvironment("TRITON_INTERPRET is set, so that Triton compiles nothing; unset it")
    machine = ARCHITECTURES[architecture]
    made = _compile(launch, machine)
    assembly = made.asm["ptx" if machine.backend == "cuda" else "amdgcn"]
    binary = made.asm["cubin" if machine.backend == "cuda" else "hsaco"]
    usage = _nvidia_usage(binary, assembly) if machine.backend == "cuda" else _amd_usage(assembly)
    return Compiled(
        binary=binary,
        assembly=assembly,
        name=made.metadata.name,
        shared_bytes=made.metadata.shared,
        warps=made.metadata.num_warps,
        threads_per_warp=machine.threads_per_warp,
        registers=usage[0],
        spills=usage[1],
        instructions={name: assembly.count(name) for name in MATRIX if name in assembly},
    )


def _compile(launch: Launch, machine: Architecture) -> Any:
    kernel = imported(launch.kernel)
    from triton import compile as compile_kernel
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    runtime = dict(zip(runtime_parameters(launch), zip(launch.arguments, launch.types, strict=True), strict=True))
    names = kernel.arg_names
    aligned = [name for name, (text, type_) in runtime.items() if type_.startswith("*") or text in launch.aligned]
    source = ASTSource(
        fn=kernel,
        signature={name: runtime[name][1] if name in runtime else "constexpr" for name in names},
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in aligned},
    )
    options: dict[str, object] = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    if machine.ptx:
        options["ptx_version"] = machine.ptx
    target = GPUTarget(machine.backend, machine.number, machine.threads_per_warp)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # lines carry this machine's paths into the code
        made = compile_kernel(source, target=target, options=options)
    scratch = getattr(made.metadata, "global_scratch_size", 0) or getattr(made.metadata, "profile_scratch_size", 0)
    if scratch:
        raise Unsupported(f"{launch.kernel}: the code wants {scratch} bytes of scratch memory, which no launcher gives")
    return made


def _nvidia_usage(cubin: bytes, ptx: str) -> tuple[int, int]:
    """Registers from the cubin itself; bytes spilled from ptxas, because the cubin's stack is not spills."""
    target = _first(r"\.target (\w+)", ptx)
    assembler = "ptxas_blackwell" if int(re.sub(r"\D", "", target)) >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        binary, text = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(cubin)
        text.write_text(ptx)
        resources = _tool("cuobjdump", "--dump-resource-usage", str(binary))
        log = _tool(assembler, "-v", f"--gpu-name={target}", str(text), "-o", str(Path(folder, "again.cubin")))
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(_first(r"REG:(\d+)", resources)), max(int(count) for pair in spilled for count in pair)


def _amd_usage(assembly: str) -> tuple[int, int]:
    spilled = [int(_first(rf"\.{kind}_spill_count:\s*(\d+)", assembly)) for kind in ("vgpr", "sgpr")]
    return int(_first(r"\.vgpr_count:\s*(\d+)", assembly)), sum(spilled)


def _tool(name: str, *arguments: str) -> str:
    """What one of the tools that come with Triton prints."""
    from triton import knobs

    done = subprocess.run([getattr(knobs.nvidia, name).path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise Unsupported(f"compiled code says nothing of the form {pattern}; this version of Triton is not known")
    return found[1]
