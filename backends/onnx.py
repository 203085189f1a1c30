"""The ONNX backend: a file that ONNX Runtime runs, weights in the bits that the plan gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from intarsia import kernels
from intarsia.backends.base import Backend, Built, Engine, Stateful, cores, require_support
from intarsia.backends.onnx_states import OnnxStates, declare
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Arg, Graph, Node
from intarsia.ir.operators import resolve
from intarsia.ir.program import Program
from intarsia.ir.target import Target

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
DATA = "model.onnx.data"
_CONSTANTS = {
    "intarsia.linear_i8": ("weight", "scale"),
    "intarsia.linear_i4": ("packed", "scale"),
    "intarsia.linear_i8i8": ("weight", "multiplier", "shift"),
    "intarsia.conv2d_i8i8": ("weight", "multiplier", "shift"),
    "intarsia.requantize": ("multiplier", "shift"),
    "intarsia.add_requantized": ("multiplier", "shift", "other_multiplier", "other_shift"),
    "intarsia.avg_pool2d_i8": ("multiplier", "shift"),
}


@dataclass(frozen=True)
class OnnxBackend(Backend):
    """Writes ``model.onnx``.

    Attributes:
        external_bytes: Weights beyond this size go into a file beside the model; one protobuf holds 2 GB at most.
        unpacked_bytes: Engines up to this size are unpacked when they are loaded: their narrow weights become f32 in
            memory once, which saves 2 to 4 % of every call on wan-mini (docs/decisions/002). Larger ones stay packed.
    """

    name: ClassVar[str] = "onnx"
    passes: ClassVar[tuple[str, ...]] = ("complex-to-real", "blend-means")
    external_bytes: int = 1_500_000_000
    unpacked_bytes: int = 1 << 30

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """None, or that torch.onnx has no translation, or that a weight is not constant."""
        params = {param.name for param in graph.params}
        for key in _CONSTANTS.get(node.op, ()):
            if node.ref(key) not in params:
                return f"{key} is computed at run time; materialize the program first"
        if node.op == "aten.view.dtype":
            return "ONNX has no call that takes bits for another element type; caches are stored in i8, not f8e4m3"
        if node.op == "intarsia.avg_pool2d_i8" and (reason := _why_no_sum(node, graph)):
            return reason
        try:
            call = resolve(node.op)
        except Unsupported as error:
            return str(error)
        if node.op in _CONSTANTS or _is_translated(call):
            return None
        return "torch.onnx has no translation to ONNX for it; keep it out of the graph, or use backend null"

    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Write the model; equal programs give equal bytes."""
        import onnx_ir

        from intarsia.backends.onnx_model import onnx_model
        from intarsia.backends.onnx_operators import OPSET

        require_support(self, program.graph, target)
        model = onnx_model(program)
        declare(model)
        stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        external = DATA if stored > self.external_bytes else None
        onnx_ir.save(model, folder / MODEL, external_data=external)
        operators = sorted({node.op_type for node in model.graph})
        info = {"opset": OPSET, "nodes": len(model.graph), "weight_bytes": stored, "operators": operators}
        return Built((MODEL, DATA) if external else (MODEL,), info)

    def load(self, folder: Path, files: Sequence[str]) -> OnnxEngine:
        """An ONNX Runtime session on the CPU, all cores.

        Raises:
            MissingEnvironment: ONNX Runtime is not installed, or cannot run an operator in this element type.
            QualityError: The file is no ONNX model.
        """
        size = sum((folder / name).stat().st_size for name in files)
        return OnnxEngine(folder / MODEL, unpacked=size <= self.unpacked_bytes)


class OnnxEngine(Engine):
    """An ONNX Runtime session."""

    def __init__(self, path: Path, *, unpacked: bool = True, threads: int | None = None) -> None:
        self._threads = threads or cores()
        self._session = _session(path, unpacked, self._threads)
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the session answers; UsageError for inputs of another number, type or shape."""
        if len(inputs) != len(self._names):
            raise UsageError(f"the engine takes {', '.join(self._names)}; {len(inputs)} tensors are given")
        feed = {name: tensor.detach().numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        import onnxruntime.capi.onnxruntime_pybind11_state as errors

        try:
            answers = self._session.run(None, feed)
        except errors.InvalidArgument as error:
            raise UsageError(f"the engine does not take these inputs: {_line(error)}") from error
        return tuple(torch.from_numpy(answer) for answer in answers)

    def stateful(self, values: Sequence[Tensor], *, inputs: Sequence[int], outputs: Sequence[int]) -> Stateful:
        """The session with buffers of its own for these inputs, written in place where the model allows."""
        return OnnxStates(self._session, self.device, values, inputs=inputs, outputs=outputs)

    @property
    def device(self) -> str:
        """Threads and ONNX Runtime's version."""
        import onnxruntime

        return f"CPU, {self._threads} threads, ONNX Runtime {onnxruntime.__version__}"


def _session(path: Path, unpacked: bool, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
        import onnxruntime.capi.onnxruntime_pybind11_state as errors
    except ImportError as error:
        raise MissingEnvironment("backend onnx needs ONNX Runtime; pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    # Threads that wait for more work by spinning take the cores from the next engine: of another segment or phase.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if unpacked:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (errors.InvalidProtobuf, errors.InvalidGraph, errors.NoSuchFile) as error:
        raise QualityError(f"{path} is no model that ONNX Runtime can read: {_line(error)}") from error
    except (errors.NotImplemented, errors.Fail, errors.RuntimeException) as error:
        raise MissingEnvironment(f"{path}: ONNX Runtime cannot run it here: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _why_no_sum(node: Node, graph: Graph) -> str | None:
    """Why the sums of an average pool are not exact; those of a whole picture are in integers."""
    type_, kernel = graph.type(node.ref("input")), node.args["kernel_size"]
    assert isinstance(kernel, tuple)
    if tuple(type_.shape[2:]) == kernel and not any(map(bool, _pair(node.args["padding"]))):
        return None
    terms = prod(extent for extent in kernel if isinstance(extent, int))
    largest = terms * {"i8": 1 << 7}.get(type_.dtype, 1 << 15)
    if largest < 1 << 24:
        return None
    what = f"a window of {terms:,} numbers of {type_.dtype} may sum up to {largest:,}"
    return f"{what}; f32, in which they are summed, holds less"


def _pair(arg: Arg) -> tuple[Arg, ...]:
    assert isinstance(arg, tuple)
    return arg


def _is_translated(call: Callable[..., Any]) -> bool:
    """Whether torch.onnx has a translation for the operator, or PyTorch a decomposition into others."""
    registry, decompositions = _torch_onnx()
    if registry.is_registered(call) or call in decompositions or call in kernels.decompositions():
        return True
    return isinstance(call, torch._ops.OpOverload) and call._can_decompose()


@lru_cache(maxsize=1)
def _torch_onnx() -> tuple[Any, Any]:
    """What torch.onnx translates, and what PyTorch decomposes; neither has a public name."""
    from torch.onnx._internal.exporter import _registration

    from intarsia.backends.onnx_model import quiet
    from intarsia.backends.onnx_operators import OPSET

    kernels.register()
    with quiet():
        registry = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    return registry, {**torch.export.default_decompositions(), **torch._decomp.decomposition_table}
