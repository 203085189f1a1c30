"""The Triton backend: our kernels compiled for GPUs that need not be here, everything else through PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from intarsia import kernels
from intarsia.backends import driver
from intarsia.backends.base import Backend, Built, Engine
from intarsia.backends.null import NullEngine
from intarsia.backends.triton_files import ENGINE, Kernel, Manual, check_engine, identity, kernel_identity, read_manual
from intarsia.ir.errors import MissingEnvironment, Unsupported
from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import resolve
from intarsia.ir.program import Program, load_program, save_weights
from intarsia.ir.target import Target
from intarsia.kernels.ahead import ARCHITECTURES, compile_launch
from intarsia.kernels.launch import Launch, architecture_of, launch_of

if TYPE_CHECKING:
    from intarsia.kernels.ahead import Compiled

GRAPH = "model.graph"
WEIGHTS = "model.safetensors"

OLDEST = (3, 6)
"""The first version of Triton whose ahead-of-time compiler is called as ``kernels.ahead`` calls it."""


@dataclass(frozen=True)
class TritonBackend(Backend):
    """Writes compiled kernels, how they are launched, the graph and its weights.

    Attributes:
        architectures: What kernels are compiled for beside the target's own architecture: ``"sm_80, sm_90"``.
        graphs: Whether a call is recorded once for each set of sizes and then replayed as a CUDA graph, which saves
            launching every kernel from Python.
    """

    name: ClassVar[str] = "triton"
    passes: ClassVar[tuple[str, ...]] = (
        "drop-ranges",
        "fuse-kernels(everywhere=True)",
        "blend-means",
        "tables-of-blocks",
    )
    architectures: str = ""
    graphs: bool = True

    def why_not_target(self, target: Target) -> str | None:
        """Why no kernel can be compiled for the target, or for one of the architectures asked for."""
        known = ", ".join(ARCHITECTURES)
        for architecture in self._architectures(target):
            if architecture not in ARCHITECTURES:
                return f"{architecture} is no GPU that kernels are compiled for ({known}); take onnx or tvm there"
        return None

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """None, unless PyTorch does not know the operator or one of ours has no kernel for these operands."""
        try:
            resolve(node.op)
        except Unsupported as error:
            return str(error)
        return kernels.why_not(node, graph, target)

    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Compile every kernel that the graph's calls need; the same program and Triton give the same bytes.

        Raises:
            MissingEnvironment: Triton is not installed, or too old.
        """
        version = _triton_version()
        (folder / GRAPH).write_text(str(program.graph))
        save_weights(program.weights, folder / WEIGHTS)
        manual = compile_calls(program.graph, self._architectures(target), folder, triton=version)
        (folder / ENGINE).write_text(manual.to_json())
        written = [name for kernel in manual.compiled.values() for name in (kernel.file, kernel.text)]
        return Built((ENGINE, GRAPH, WEIGHTS, *written), _facts(manual, program.graph))

    def load(self, folder: Path, files: Sequence[str]) -> Engine:
        """The engine on the first GPU.

        Raises:
            MissingEnvironment: No GPU, no driver, or none of the engine's architectures.
        """
        if not torch.cuda.is_available():
            raise MissingEnvironment("no GPU that PyTorch can use; a Triton engine runs on one")
        from intarsia.backends.triton_engine import TritonEngine

        manual, device = read_manual(folder), torch.device("cuda", 0)
        architecture = fitting(architecture_of(device), manual.architectures)
        interface = driver.HIP if torch.version.hip else driver.CUDA
        return TritonEngine(folder, manual, architecture, device, interface, record=self.graphs)

    def check(self, folder: Path, files: Sequence[str]) -> str:
        """Structure, symbols and resources of all that was compiled."""
        return check_engine(folder)

    def load_reference(self, folder: Path, files: Sequence[str]) -> Engine:
        """The engine's graph and weights through PyTorch on the CPU, where our operators run their references."""
        kernels.register()
        return NullEngine(load_program(folder / GRAPH))

    def _architectures(self, target: Target) -> tuple[str, ...]:
        more = [name.strip() for name in self.architectures.split(",") if name.strip()]
        return tuple(dict.fromkeys([target.architecture, *more]))


def fitting(device: str, architectures: Sequence[str]) -> str:
    """Which of ``architectures`` runs on the GPU ``device``: itself, or an older one before sm_90 of its generation.

    Machine code of sm_80 runs on sm_86 and sm_89; that of sm_90 and later uses instructions that no other GPU has.
    """
    if device in architectures:
        return device
    older = [name for name in architectures if name.startswith("sm_8") and device.startswith("sm_8") and name < device]
    if older:
        return max(older)
    raise MissingEnvironment(
        f"the GPU here is {device}, the engine was compiled for {', '.join(architectures)}; export it again with "
        f"--backend \"triton(architectures='{device}')\""
    )


def compile_calls(graph: Graph, architectures: Sequence[str], folder: Path, *, triton: str) -> Manual:
    """Compile what the graph's calls launch into ``folder``, and say how it is launched; ``triton`` is the version."""
    (folder / "kernels").mkdir()
    calls: dict[str, dict[str, str]] = {}
    launches: dict[str, Launch] = {}
    used: dict[str, str] = {}
    compiled: dict[str, Kernel] = {}
    for architecture in architectures:
        calls[architecture] = {}
        for node in graph.nodes:
            launch = launch_of(node, graph, architecture)
            if launch is None:
                continue
            name, kernel = identity(launch), kernel_identity(launch, architecture)
            calls[architecture][node.name] = name
            launches[name] = launch
            used[f"{name}.{architecture}"] = kernel
            if kernel not in compiled:
                compiled[kernel] = _written(compile_launch(launch, architecture), kernel, folder)
    return Manual(triton, calls, launches, used, compiled)


def _written(made: Compiled, name: str, folder: Path) -> Kernel:
    is_nvidia = name.rpartition(".")[2].startswith("sm_")
    file, text = (f"kernels/{name}.{suffix}" for suffix in (("cubin", "ptx") if is_nvidia else ("hsaco", "amdgcn")))
    (folder / file).write_bytes(made.binary)
    (folder / text).write_text(made.assembly)
    return Kernel(
        file=file,
        text=text,
        symbol=made.name,
        sha256=hashlib.sha256(made.binary).hexdigest(),
        threads=made.warps * made.threads_per_warp,
        shared_bytes=made.shared_bytes,
        registers=made.registers,
        spills=made.spills,
    )


def _triton_version() -> str:
    """The installed version; MissingEnvironment if there is none, or one whose compiler is called otherwise."""
    from importlib.metadata import PackageNotFoundError, version

    remedy = "pip install 'intarsia[triton]'"
    try:
        found = version("triton")
    except PackageNotFoundError as error:
        raise MissingEnvironment(f"backend triton needs Triton, which is missing; {remedy}") from error
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingEnvironment(f"backend triton needs Triton {oldest} or later, {found} is installed; {remedy}")
    return found


def _facts(manual: Manual, graph: Graph) -> Mapping[str, object]:
    calls = manual.calls[manual.architectures[0]]
    by_operator: dict[str, int] = {}
    for node in graph.nodes:
        key = node.op if node.name in calls else "through PyTorch"
        by_operator[key] = by_operator.get(key, 0) + 1
    return {
        "triton": manual.triton,
        "architectures": list(manual.architectures),
        "kernels": len(manual.compiled),
        "spilling": sorted(name for name, kernel in manual.compiled.items() if kernel.spills),
        "calls": by_operator,
    }
