"""The TVM backend: one shared library with kernels of our own schedules, and the weights in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from intarsia.backends.base import Backend, Built, require_support
from intarsia.backends.elf import check_library
from intarsia.backends.tvm_engine import TvmEngine
from intarsia.backends.tvm_integers import CONSTANTS
from intarsia.backends.tvm_sizes import TvmSizes, call_at, graph_at, sets_of_sizes
from intarsia.backends.tvm_tuning import RECORDS, Tuning
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported
from intarsia.ir.exported import export_program
from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.operators import resolve
from intarsia.ir.program import Program
from intarsia.ir.sizes import names
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType

LIBRARY = "model.so"
FACTS = "model.json"
DTYPES = ("f32", "f64", "i64", "i32", "i16", "i8", "u8", "b1")
"""Element types of values; narrower floats would be computed one element at a time."""

ARCHITECTURES = ("x86-64-v3", "x86-64-v4")
"""What LLVM is told of a CPU."""

_NORM = ("weight", "bias", "running_mean", "running_var")
_CONSTANTS = {**CONSTANTS, "aten.batch_norm": _NORM, "aten._native_batch_norm_legit_no_training": _NORM}


@dataclass(frozen=True)
class TvmBackend(Backend):
    """Writes ``model.so`` and ``model.json``, which says what goes in and out.

    Attributes:
        trials: Measurements for each kernel in search of a faster schedule; 0 takes the one that suits the shape.
        database: Folder of schedules that were measured before; they are applied again, and what ``trials`` adds is
            stored there.
        sizes: For how many values of its one named size a graph is compiled, evenly spread up to the largest, a library
            each (``model.16.so``); 0 refuses named sizes.
    """

    name: ClassVar[str] = "tvm"
    passes: ClassVar[tuple[str, ...]] = ("fuse-kernels(everywhere=True)", "blend-means")
    trials: int = 0
    database: str = ""
    sizes: int = 0

    def __post_init__(self) -> None:
        if self.sizes < 0:
            raise ValueError(f"sizes is {self.sizes}; it is how many values of a named size there are, or 0 for none")

    def why_not_target(self, target: Target) -> str | None:
        """None for x86-64 CPUs and NVIDIA GPUs."""
        if target.kind == "cuda" or (target.kind == "cpu" and target.architecture in ARCHITECTURES):
            return None
        return (
            f"it compiles for cuda, and for cpu with architecture {' or '.join(ARCHITECTURES)}; "
            f"{target.name} is {target.kind} with {target.architecture}"
        )

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """None, or that an operator has no lowering, an element type no kernels, or a size no number."""
        node, graph = call_at(node, graph, sets_of_sizes(graph, self.sizes)[-1])
        if reason := _type_refusal(node, graph):
            return reason
        if reason := _argument_refusal(node, graph):
            return reason
        if node.op == "intarsia.integers":
            return None  # needs no input, so it has run before anything is built
        if node.op in {"intarsia.block_sparse_attention", "aten.index_copy"} and target.kind != "cpu":
            return "its kernel is for CPUs; for a GPU use backend triton or tensorrt"
        try:
            inputs = tuple((name, graph.type(name)) for name in dict.fromkeys(node.inputs))
            left = _not_lowered(node, inputs, target.kind)
        except Unsupported as error:
            return str(error)
        reason = f"TVM's importer has no {' and no '.join(left)}; keep it out of the graph, or use backend onnx"
        return reason if left else None

    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Compile and link the library; equal programs give equal bytes."""
        _require_tvm()
        require_support(self, program.graph, target)
        import tvm

        tuning = self._tuning(target)
        files: list[str] = []
        for sizes in sets_of_sizes(program.graph, self.sizes):
            fixed = Program(graph_at(program.graph, sizes), program.weights)
            names = [_named(name, sizes) for name in (LIBRARY, FACTS)]
            self._build(fixed, target, folder / names[0], tuning)
            facts = {
                "kind": target.kind,
                "architecture": target.architecture,
                "inputs": [[value.name, str(value.type)] for value in fixed.graph.inputs],
            }
            (folder / names[1]).write_text(json.dumps(facts, indent=2) + "\n")
            files += names
        if tuning:
            tuning.save(folder)
        files += [name for name in RECORDS if (folder / name).exists()]
        return Built(tuple(files), {"architecture": target.architecture, "tvm": tvm.__version__})

    def _tuning(self, target: Target) -> Tuning | None:
        """What gives a CPU's kernels their loops."""
        if target.kind == "cuda":
            return None
        from intarsia.backends.tvm_library import find_compiler

        find_compiler()
        return Tuning(_machine(target), self.trials, Path(self.database) if self.database else None)

    def _build(self, program: Program, target: Target, path: Path, tuning: Tuning | None) -> None:
        """Compile and link one library; as CUDA's where there is no tuning."""
        from intarsia.backends.tvm_cuda import build_library
        from intarsia.backends.tvm_library import compiled, link
        from intarsia.backends.tvm_lowering import relax_module

        if tuning is None:
            build_library(program, target.architecture, path)
            return
        link(compiled(relax_module(program), _machine(target), tuning.schedule), path)

    def load(self, folder: Path, files: Sequence[str]) -> TvmEngine | TvmSizes:
        """The library in this process, its machine code ready to run, or one for each of several sizes.

        Raises:
            MissingEnvironment: TVM is not installed, or this CPU lacks instructions that the library uses.
            QualityError: The file is no library of ours.
        """
        _require_tvm()
        self.check(folder, files)
        engines = [TvmEngine(path, _facts(path)) for path in _libraries(folder, files)]
        return engines[0] if len(engines) == 1 else TvmSizes(engines)

    def check(self, folder: Path, files: Sequence[str]) -> str:
        """That each library is whole, for x86-64, and has TVM's entry points."""
        return "; ".join(self._check(path) for path in _libraries(folder, files))

    def _check(self, path: Path) -> str:
        facts = _facts(path)
        symbols = check_library(path)
        kernels = sum(name.startswith("__tvm_ffi_") for name in symbols)
        if not kernels:
            raise QualityError(f"{path} holds no kernel of TVM's; build the engine again")
        if facts["kind"] == "cuda":
            from intarsia.backends.tvm_cuda import check_code

            pieces = check_code(path, str(facts["architecture"]))
            return f"ELF library with {kernels} entry points and {pieces} cubin for {facts['architecture']}"
        return f"ELF library for {facts['architecture']} with {kernels} entry points"


def _type_refusal(node: Node, graph: Graph) -> str | None:
    types = [graph.values[name].type for name in node.inputs] + [value.type for value in node.outputs]
    for type_ in types:
        if not isinstance(type_, TensorType):
            return f"it computes with a number of type {type_}; fold sizes first, or use backend onnx"
        if type_.dtype not in DTYPES:
            return f"element type {type_.dtype} has no fast kernel on a CPU; use f32"
        if type_.dtype == "f64" and (node.op.startswith("intarsia.") or node.op == "aten.rms_norm"):
            return "its kernel computes in f32, not in f64; use f32"
        if free := sorted({name for dim in type_.shape if isinstance(dim, str) for name in names(dim)}):
            what = f"size {', '.join(free)} is not fixed, and kernels are tiled for one size"
            return f"{what}; trace without --dynamic, or have tvm(sizes=4) compile four values of a single size"
    return None


def _argument_refusal(node: Node, graph: Graph) -> str | None:
    params = {param.name for param in graph.params}
    for key in _CONSTANTS.get(node.op, ()):
        value = node.args.get(key)
        if isinstance(value, Ref) and value.name not in params:
            return f"{key} is computed at run time; materialize the program first"
    if node.op.startswith("intarsia.linear_") and len(graph.type(node.ref("input")).shape) < 2:
        return "its input has one axis, the kernel multiplies matrices; unsqueeze it"
    if node.args.get("training") is True:
        return "it normalizes by statistics of the batch; trace the model in eval mode"
    shape = node.args.get("normalized_shape")
    if node.op == "aten.rms_norm" and isinstance(shape, tuple) and len(shape) != 1:
        return f"it normalizes over {len(shape)} axes, the kernel over the last; reshape before it"
    return None


def _machine(target: Target) -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": target.architecture})


def _named(file: str, sizes: Mapping[str, int]) -> str:
    """The file's name for a set of sizes: ``model.16.so``."""
    stem, _, suffix = file.partition(".")
    return ".".join([stem, *map(str, sizes.values()), suffix])


def _libraries(folder: Path, files: Sequence[str]) -> list[Path]:
    """The libraries among an engine's files, smallest sizes first."""
    found = [folder / name for name in files if name.endswith(".so")]
    return sorted(found, key=lambda path: (len(path.name), path.name)) or [folder / LIBRARY]


def _facts(library: Path) -> dict[str, object]:
    """What is written beside a library: its machine and its inputs."""
    path = library.with_suffix(".json")
    try:
        facts: dict[str, object] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise QualityError(f"{path} cannot be read: {error}; build the engine again") from error
    if not isinstance(facts, dict) or not {"kind", "architecture", "inputs"} <= facts.keys():
        raise QualityError(f"{path} does not say kind, architecture and inputs; build the engine again")
    return facts


def _require_tvm() -> None:
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise MissingEnvironment("backend tvm needs TVM; pip install 'intarsia[tvm]'") from error


@lru_cache(maxsize=4096)
def _not_lowered(node: Node, inputs: tuple[tuple[str, TensorType], ...], kind: str) -> tuple[str, ...]:
    """Operators that are left of ``node`` once it is decomposed and that nothing lowers.

    Raises:
        Unsupported: PyTorch does not know the operator.
    """
    call = resolve(node.op)
    _require_tvm()
    from intarsia.backends.tvm_lowering import decompositions, is_lowered

    if is_lowered(call, kind):
        return ()
    values = tuple(Value(name, type_) for name, type_ in inputs)
    graph = Graph("one", values, (), (node,), tuple(value.name for value in node.outputs))
    exported = export_program(Program(graph, {})).run_decompositions(decompositions(kind))
    calls = [one.target for one in exported.graph.nodes if one.op == "call_function"]
    return tuple(sorted({str(one) for one in calls if not is_lowered(one, kind)}))
