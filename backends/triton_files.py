"""What a Triton engine holds on disk, and what can be proven of it without a GPU.

engine.json               launches, kernels and what they take, which call of the graph is which launch
kernels/<id>.<arch>.cubin machine code (.hsaco on AMD)
kernels/<id>.<arch>.ptx   its assembly (.amdgcn on AMD)
model.graph               the graph, our operators in it
model.safetensors         its weights
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from intarsia.ir.errors import IntarsiaError, QualityError
from intarsia.ir.graph import Graph
from intarsia.ir.types import TensorType, parse_type
from intarsia.kernels.launch import Launch

ENGINE = "engine.json"
SCHEMA = 1

_MACHINES = {"cubin": 190, "hsaco": 224}
"""``e_machine`` of the code in the ELF header: EM_CUDA and EM_AMDGPU."""

SHARED_BYTES: Mapping[str, int] = {
    "sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10,
}  # fmt: skip
"""Shared memory of one block at most. Sources: CUDA C++ programming guide, compute capabilities; AMD CDNA 3 ISA."""

REGISTERS = 65_536
"""Registers of a multiprocessor, of 32 bits. Source: CUDA C++ programming guide, compute capabilities."""


@dataclass(frozen=True)
class Kernel:
    """Compiled code for one architecture.

    Attributes:
        file: Machine code, below the engine's folder.
        text: Assembly, below the engine's folder.
        symbol: Name of the kernel in both.
        sha256: Of the machine code.
        threads: Of one block.
        shared_bytes: Shared memory of one block.
        registers: Of one thread.
        spills: Bytes or registers that a thread keeps in memory because registers ran out.
    """

    file: str
    text: str
    symbol: str
    sha256: str
    threads: int
    shared_bytes: int
    registers: int
    spills: int


@dataclass(frozen=True)
class Manual:
    """What ``engine.json`` says: how each call of the graph that has a kernel is launched.

    Attributes:
        triton: Version that compiled.
        calls: Launch identity by the call's name in the graph, by architecture.
        launches: Launches by identity.
        kernels: Identity of the kernel of a launch, by the launch's identity.
        compiled: Compiled code by kernel identity.
    """

    triton: str
    calls: Mapping[str, Mapping[str, str]]
    launches: Mapping[str, Launch]
    kernels: Mapping[str, str]
    compiled: Mapping[str, Kernel]

    @property
    def architectures(self) -> tuple[str, ...]:
        """What the engine was compiled for."""
        return tuple(self.calls)

    def to_json(self) -> str:
        """Text with sorted keys; equal engines give equal bytes."""
        data = {
            "schema": SCHEMA,
            "triton": self.triton,
            "calls": self.calls,
            "launches": {name: _launch_to_json(launch) for name, launch in self.launches.items()},
            "kernels": self.kernels,
            "compiled": {name: asdict(kernel) for name, kernel in self.compiled.items()},
        }
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


def read_manual(folder: Path) -> Manual:
    """What ``engine.json`` says; QualityError if it is not what ``to_json`` writes."""
    try:
        data = json.loads((folder / ENGINE).read_text())
        if data["schema"] != SCHEMA:
            raise QualityError(f"{folder / ENGINE}: schema {data['schema']!r}; this Intarsia reads {SCHEMA}")
        return Manual(
            data["triton"],
            data["calls"],
            {name: _launch_from_json(launch) for name, launch in data["launches"].items()},
            data["kernels"],
            {name: Kernel(**kernel) for name, kernel in data["compiled"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QualityError(f"{folder / ENGINE} is not what a Triton engine holds: {error!r}") from error


def identity(launch: Launch) -> str:
    """What tells a launch from others: the kernel's name and twelve hexadecimal digits."""
    return _digest(launch, _launch_to_json(launch))


def kernel_identity(launch: Launch, architecture: str) -> str:
    """What tells its compiled code from others: launches that differ in grid and arguments alone share it."""
    compiled = {key: _launch_to_json(launch)[key] for key in ("kernel", "types", "constants", "warps", "stages")}
    aligned = [argument in launch.aligned for argument in launch.arguments]
    return f"{_digest(launch, {**compiled, 'aligned': aligned})}.{architecture}"


def _digest(launch: Launch, data: Mapping[str, object]) -> str:
    name = launch.kernel.rpartition(":")[2].strip("_")
    return f"{name}-{hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]}"


def _launch_to_json(launch: Launch) -> dict[str, Any]:
    data = {field.name: getattr(launch, field.name) for field in fields(launch)}
    results = {name: str(type_) for name, type_ in launch.results.items()}
    return {**data, "constants": dict(launch.constants), "layouts": dict(launch.layouts), "results": results}


def _launch_from_json(data: Mapping[str, Any]) -> Launch:
    results: dict[str, TensorType] = {}
    for name, text in data["results"].items():
        type_ = parse_type(text)
        assert isinstance(type_, TensorType)
        results[name] = type_
    lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    layouts = {name: tuple(order) for name, order in data["layouts"].items()}
    return Launch(**{**data, **lists, "results": results, "layouts": layouts})


def check_engine(folder: Path) -> str:
    """Prove what can be proven without a GPU, and say it in one line; QualityError names the file and the fault."""
    manual = read_manual(folder)
    graph = _graph(folder)
    for architecture, calls in manual.calls.items():
        for call, launch in calls.items():
            if call not in graph.producers:
                raise QualityError(f"{folder / ENGINE}: launches %{call} for {architecture}, which the graph has not")
            if launch not in manual.launches:
                raise QualityError(f"{folder / ENGINE}: %{call} is launch {launch}, which is not described")
            if manual.kernels.get(f"{launch}.{architecture}") not in manual.compiled:
                raise QualityError(f"{folder / ENGINE}: launch {launch} has no compiled kernel for {architecture}")
    for name, kernel in manual.compiled.items():
        if fault := _fault(folder, kernel, architecture=name.rpartition(".")[2]):
            raise QualityError(f"{folder / kernel.file}: {fault}")
    spilling = sum(kernel.spills > 0 for kernel in manual.compiled.values())
    most = max((len(calls) for calls in manual.calls.values()), default=0)
    return (
        f"{len(manual.compiled)} kernels for {', '.join(manual.architectures)}, {spilling} spilling; "
        f"they take {most} of {len(graph.nodes)} calls"
    )


def _graph(folder: Path) -> Graph:
    try:
        return Graph.parse((folder / "model.graph").read_text())
    except (OSError, UnicodeDecodeError, IntarsiaError) as error:
        raise QualityError(f"{folder / 'model.graph'}: {error}") from error


def _fault(folder: Path, kernel: Kernel, *, architecture: str) -> str | None:
    """Why compiled code cannot be what it is said to be; None if nothing speaks against it."""
    try:
        binary, text = (folder / kernel.file).read_bytes(), (folder / kernel.text).read_text()
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}"
    if hashlib.sha256(binary).hexdigest() != kernel.sha256:
        return "its bytes are not those that were compiled"
    return _symbol_fault(kernel, binary, text, architecture) or _resource_fault(kernel, architecture)


def _symbol_fault(kernel: Kernel, binary: bytes, text: str, architecture: str) -> str | None:
    suffix = kernel.file.rpartition(".")[2]
    header = binary[:4] == b"\x7fELF" and len(binary) >= 20
    if not header or struct.unpack_from("<H", binary, 18)[0] != _MACHINES.get(suffix):
        return f"is no {suffix}: its ELF header says otherwise"
    if kernel.symbol.encode() not in binary:
        return f"holds no symbol {kernel.symbol}"
    if not re.search(rf"\b{re.escape(architecture)}a?\b", text) or kernel.symbol not in text:
        return f"its assembly is not of {kernel.symbol} for {architecture}"
    return None


def _resource_fault(kernel: Kernel, architecture: str) -> str | None:
    limit = SHARED_BYTES.get(architecture)
    if limit is None:
        return f"is for {architecture}, of which nothing is known; {', '.join(SHARED_BYTES)} are"
    if kernel.shared_bytes > limit:
        return f"needs {kernel.shared_bytes:,} bytes of shared memory; {architecture} has {limit:,}"
    if kernel.file.endswith(".cubin") and kernel.registers * kernel.threads > REGISTERS:
        return f"needs {kernel.registers} registers for each of {kernel.threads} threads; there are {REGISTERS:,}"
    return None
