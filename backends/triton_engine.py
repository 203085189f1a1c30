"""Run a Triton engine on a GPU: compiled kernels through the driver, the rest through PyTorch, and replay it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia import kernels
from intarsia.backends.base import Carried, Engine, Stateful
from intarsia.backends.driver import Function, Interface
from intarsia.backends.triton_files import Manual
from intarsia.ir.errors import InvalidGraph, UsageError
from intarsia.ir.execute import call
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.program import load_program
from intarsia.ir.sizes import Dim, evaluate, solve
from intarsia.ir.types import TensorType
from intarsia.kernels.launch import Launch, allocate, prepare, values

RECORDINGS = 4
"""Sets of sizes whose recorded calls are kept; each holds the memory of one call."""

Table = dict[str, Any]
Step = Callable[[Table, Mapping[str, int]], None]
Key = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Recording:
    """One recorded call: where its inputs are read, where its outputs are written."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class TritonEngine(Engine):
    """The engine in ``folder`` on ``device``, its kernels those of ``architecture``."""

    def __init__(
        self,
        folder: Path,
        manual: Manual,
        architecture: str,
        device: torch.device,
        interface: Interface,
        *,
        record: bool,
    ) -> None:
        kernels.register()
        program = load_program(folder / "model.graph")
        torch.cuda.init()
        self._device, self._graph, self._record = device, program.graph, record
        self._triton, self._architecture, self._unrecorded = manual.triton, architecture, ""
        weights = laid_out(program.graph, manual, architecture, program.weights)
        self._weights: Table = {name: tensor.to(device) for name, tensor in weights.items()}
        with torch.cuda.device(device):
            functions = _functions(folder, manual, architecture, interface)
        self._steps = steps(program.graph, manual, architecture, functions, device)
        self._recordings: dict[Key, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run once; inputs and outputs are on the CPU. UsageError for inputs of another number, type or shape."""
        return tuple(answer.cpu() for answer in self._answers(*inputs))

    def stateful(self, values: Sequence[Tensor], *, inputs: Sequence[int], outputs: Sequence[int]) -> Stateful:
        """The engine with these inputs kept on the GPU."""
        kept = [value.to(self._device) for value in values]
        return Carried(self._answers, kept, inputs=inputs, outputs=outputs, device=self.device)

    def _answers(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs on the GPU, of inputs that lie anywhere; those of a recording change with its next replay."""
        sizes = _sizes(self._graph, inputs)
        with torch.no_grad(), torch.cuda.device(self._device):
            if not self._record or self._unrecorded:
                return self._run([x.to(self._device) for x in inputs], sizes)
            recording = self._recorded(inputs, sizes)
            if recording is None:
                return self._answers(*inputs)
            for mine, given in zip(recording.inputs, inputs, strict=True):
                mine.copy_(given)
            recording.graph.replay()
            return recording.outputs

    @property
    def device(self) -> str:
        """The GPU, the code's architecture, and whether calls are replayed from a recording."""
        replayed = f"not recorded: {self._unrecorded}" if self._unrecorded else "recorded as a CUDA graph"
        how = replayed if self._record else "launched one by one"
        name = torch.cuda.get_device_name(self._device)
        return f"{name}, kernels of Triton {self._triton} for {self._architecture}, PyTorch {torch.__version__}, {how}"

    def _run(self, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        table = dict(self._weights)
        table.update(zip((value.name for value in self._graph.inputs), inputs, strict=True))
        with torch.device(self._device):  # a graph has no device: what makes a tensor of nothing makes it here
            for step in self._steps:
                step(table, sizes)
        return tuple(table[name] for name in self._graph.outputs)

    def _recorded(self, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> _Recording | None:
        """The call for these shapes, recorded at its first use; None, and why, where a step cannot be recorded."""
        key = tuple(tuple(tensor.shape) for tensor in inputs)
        if key in self._recordings:
            self._recordings[key] = self._recordings.pop(key)
            return self._recordings[key]
        mine = tuple(tensor.to(self._device, copy=True) for tensor in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run(mine, sizes)  # what is set up at a first call must not be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._run(mine, sizes)
        except RuntimeError as error:
            self._unrecorded = str(error).strip().splitlines()[0]
            return None
        if len(self._recordings) >= RECORDINGS:
            self._recordings.pop(next(iter(self._recordings)))
        self._recordings[key] = _Recording(graph, mine, outputs)
        return self._recordings[key]


def _sizes(graph: Graph, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The named sizes that the inputs' shapes tell."""
    if len(inputs) != len(graph.inputs):
        names = ", ".join(value.name for value in graph.inputs)
        raise UsageError(f"the engine takes {names}; {len(inputs)} tensors are given")
    extents: dict[Dim, int] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        assert isinstance(value.type, TensorType)
        shape = value.type.shape
        if len(shape) != tensor.ndim:
            raise UsageError(f"%{value.name} is {value.type}; a tensor of shape {tuple(tensor.shape)} is given")
        for dim, extent in zip(shape, tensor.shape, strict=True):
            if extents.setdefault(dim, extent) != extent:
                raise UsageError(f"%{value.name} is {value.type}; {dim} is {extents[dim]} elsewhere, here {extent}")
    try:
        return solve(extents)
    except InvalidGraph as error:
        raise UsageError(f"the engine does not take these inputs: {error}") from error


def _functions(folder: Path, manual: Manual, architecture: str, interface: Interface) -> dict[str, Function]:
    """A loaded kernel for each launch of ``architecture``, by the launch's identity."""
    loaded: dict[str, Function] = {}
    found: dict[str, Function] = {}
    for name in dict.fromkeys(manual.calls[architecture].values()):
        identity, launch = manual.kernels[f"{name}.{architecture}"], manual.launches[name]
        if identity not in loaded:
            kernel = manual.compiled[identity]
            loaded[identity] = Function(
                interface,
                (folder / kernel.file).read_bytes(),
                symbol=kernel.symbol,
                types=launch.types,
                threads=kernel.threads,
                shared_bytes=kernel.shared_bytes,
            )
        found[name] = loaded[identity]
    return found


def steps(
    graph: Graph, manual: Manual, architecture: str, functions: Mapping[str, Function], device: torch.device
) -> list[Step]:
    """What runs, in the graph's order, on a table of values by name; every value is let go after its last use."""
    calls = manual.calls[architecture]
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    kept = {*graph.outputs, *(value.name for value in graph.params)}
    made: list[Step] = []
    for node in graph.nodes:
        unused = [value.name for value in node.outputs if value.name not in last]
        dying = [name for name in (*dict.fromkeys(node.inputs), *unused) if last.get(name, node.name) == node.name]
        dying = [name for name in dying if name not in kept]
        if launch := calls.get(node.name):
            made.append(_kernel_step(node, manual.launches[launch], functions[launch], device, dying))
        else:
            made.append(_eager_step(node, dying))
    return made


def laid_out(graph: Graph, manual: Manual, architecture: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights in memory as the kernels that read them want them, so that no call copies them."""
    found = dict(weights)
    for node in graph.nodes:
        identity = manual.calls[architecture].get(node.name)
        if identity is None:
            continue
        read = {key: arg.name for key, arg in node.args.items() if isinstance(arg, Ref) and arg.name in found}
        prepared = prepare(manual.launches[identity], {key: found[name] for key, name in read.items()})
        found.update({read[key]: tensor for key, tensor in prepared.items()})
    return found


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _eager_step(node: Node, dying: Sequence[str]) -> Step:
    def step(table: Table, sizes: Mapping[str, int]) -> None:
        table.update(zip((value.name for value in node.outputs), call(node, table), strict=True))
        for name in dying:
            del table[name]

    return step


def _kernel_step(node: Node, launch: Launch, function: Function, device: torch.device, dying: Sequence[str]) -> Step:
    operands = {key: arg.name for key, arg in node.args.items() if isinstance(arg, Ref)}

    def step(table: Table, sizes: Mapping[str, int]) -> None:
        prepared = prepare(launch, {key: table[name] for key, name in operands.items()})
        results = allocate(launch, sizes, device)
        grid = [evaluate(extent, sizes) for extent in launch.grid]
        if all(grid):
            passed = values(launch, {**prepared, **results}, sizes)
            addresses = [value.data_ptr() if isinstance(value, Tensor) else value for value in passed]
            function.launch(grid, addresses, stream=_stream(device))
        table.update(zip((value.name for value in node.outputs), results.values(), strict=True))
        for name in dying:
            del table[name]

    return step
