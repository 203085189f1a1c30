"""A program: a graph with its weights, on disk a ``.graph`` text beside a ``.safetensors`` file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from .errors import InvalidGraph, UsageError
from .execute import evaluate_nodes, to_module
from .graph import Arg, Graph, Node, Ref, Value
from .operators import DTYPE_NAMES
from .types import TensorType


@dataclass(frozen=True)
class Program:
    """A graph and a tensor for each of its parameters; tensors on the meta device stand for weights not loaded."""

    graph: Graph
    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for param in self.graph.params:
            if param.name not in self.weights:
                raise InvalidGraph(f"graph {self.graph.name}: there is no weight for parameter %{param.name}")

    @property
    def is_meta(self) -> bool:
        """Whether any weight is a stand-in without data."""
        return any(self.weights[param.name].is_meta for param in self.graph.params)

    def module(self) -> torch.fx.GraphModule:
        """A module that runs the graph eagerly, inputs in the graph's order."""
        return to_module(self.graph, self.weights)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over the bytes of the weights that the graph uses; UsageError for meta weights."""
        if self.is_meta:
            raise UsageError(f"graph {self.graph.name}: weights are on the meta device and have no bytes")
        digest = sha256()
        for param in sorted(self.graph.params, key=lambda value: value.name):
            tensor = self.weights[param.name].detach().cpu().contiguous()
            digest.update(f"{param.name}:{param.type};".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]


def materialize(program: Program) -> Program:
    """Run once, at build time, every node that needs no input, and keep what it gives as parameters.

    A number that such a node gives is written where it is used.

        param %w: f32[4, 4]
        %w8: i8[4, 4], %s: f32[4] = intarsia.quantize_rows(weight=%w)      param %w8: i8[4, 4]
        %y: f32[N, 4] = intarsia.linear_i8(input=%x, weight=%w8, ...)  ->  param %s: f32[4]
    """
    constant, dynamic = split_constant(program.graph)
    needed = {name for node in dynamic for name in node.inputs} | set(program.graph.outputs)
    values = evaluate_nodes(constant, program.weights)
    made = tuple(
        Value(value.name, _type(values[value.name]))
        for node in constant
        for value in node.outputs
        if value.name in needed and isinstance(values[value.name], Tensor)
    )
    kept = tuple(param for param in program.graph.params if param.name in needed)
    numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    nodes = tuple(_with_numbers(node, numbers) if numbers else node for node in dynamic)
    graph = Graph(
        program.graph.name,
        program.graph.inputs,
        kept + made,
        nodes,
        program.graph.outputs,
        program.graph.sizes,
    )
    weights = {param.name: values[param.name].contiguous() for param in graph.params}
    return Program(graph, weights)


def _with_numbers(node: Node, numbers: Mapping[str, int | float | bool]) -> Node:
    return replace(node, args={key: _with_number(arg, numbers) for key, arg in node.args.items()})


def _with_number(arg: Arg, numbers: Mapping[str, int | float | bool]) -> Arg:
    if isinstance(arg, Ref):
        return numbers.get(arg.name, arg)
    return tuple(_with_number(item, numbers) for item in arg) if isinstance(arg, tuple) else arg


def split_constant(graph: Graph) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The nodes that depend on parameters alone, and the rest; both in execution order."""
    known = {param.name for param in graph.params}
    constant: list[Node] = []
    dynamic: list[Node] = []
    for node in graph.nodes:
        if all(name in known for name in node.inputs) and not _is_random(node):
            known.update(value.name for value in node.outputs)
            constant.append(node)
        else:
            dynamic.append(node)
    return tuple(constant), tuple(dynamic)


def _is_random(node: Node) -> bool:
    return any(part in node.op for part in ("rand", "normal", "bernoulli", "multinomial", "dropout"))


def _type(tensor: Tensor) -> TensorType:
    return TensorType(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def example_inputs(
    graph: Graph, sizes: Mapping[str, int] | None = None, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Random tensors of the inputs' types, in order: normal for floats, small integers otherwise.

    A named size that ``sizes`` leaves out takes a small value inside its range.
    """
    from .operators import DTYPES
    from .sizes import evaluate

    chosen = {size.name: max(size.minimum, min(4, size.maximum or 4)) for size in graph.sizes} | dict(sizes or {})
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for value in graph.inputs:
        assert isinstance(value.type, TensorType)
        shape = [evaluate(dim, chosen) for dim in value.type.shape]
        dtype = DTYPES[value.type.dtype]
        if dtype.is_floating_point or dtype.is_complex:
            made.append(torch.randn(shape, generator=generator).to(dtype).to(device))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(dtype).to(device))
    return tuple(made)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors as safetensors, sorted by name, so that equal weights give equal bytes.

    Tensors that share memory, such as tied weights, are written each in full.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    save_file(tensors, path)


def load_program(path: Path, *, weights: Path | None = None) -> Program:
    """The program whose text is ``path``; weights from the safetensors beside it, or on the meta device without.

    Raises:
        ParseError: The text is not a graph.
        UsageError: The file is not there, or the weights do not fit the graph.
    """
    try:
        graph = Graph.parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"{path}: cannot be read as a graph: {reason}") from error
    beside = path.with_suffix(".safetensors")
    if weights is None and not beside.exists():
        return Program(graph, meta_weights(graph.params))
    return Program(graph, load_weights(weights or beside, graph.params))


def load_weights(path: Path, params: Sequence[Value]) -> Mapping[str, Tensor]:
    """The tensors of ``params`` from a safetensors file; UsageError names what is missing or of another type."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read as safetensors: {error}") from error
    for param in params:
        if param.name not in found:
            raise UsageError(f"{path}: no tensor for parameter %{param.name}")
        if _type(found[param.name]) != param.type:
            raise UsageError(f"{path}: {param.name} is {_type(found[param.name])}, the graph asks for {param.type}")
    return {param.name: found[param.name] for param in params}


def meta_weights(params: Sequence[Value]) -> Mapping[str, Tensor]:
    """Stand-ins without data of the parameters' types."""
    from .operators import DTYPES

    return {
        param.name: torch.empty(param.type.shape, dtype=DTYPES[param.type.dtype], device="meta")  # type: ignore[arg-type,union-attr]
        for param in params
    }
