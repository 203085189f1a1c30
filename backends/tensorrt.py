"""The TensorRT backend: typed ONNX, the engine where NVIDIA's builder is here, and the script that builds it elsewhere.

model.onnx             every element type and every quantization spelled out; weights beside it where they are large
build.json             what the builder was told, and the facts about the engine
build.py               builds the engine again, on the target machine, from these two: ``python build.py``
engine.tensorrt.plan   or engine.tensorrt_rtx.plan
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from intarsia.backends import tensorrt_build as script
from intarsia.backends.base import Backend, Built, Engine, require_support
from intarsia.backends.onnx import DATA, MODEL, OnnxBackend
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.sizes import evaluate
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType

SCRIPT = "build.py"
REFUSED = Unsupported.exit_code
TYPES = ("f32", "f16", "bf16", "f8e4m3", "i64", "i32", "i8", "u8", "b1")
"""Element types that TensorRT has."""

LACKS: Mapping[str, str] = {
    "aten.bitwise_left_shift": "BitShift",
    "aten.bitwise_right_shift": "BitShift",
    "aten.__lshift__": "BitShift",
    "aten.__rshift__": "BitShift",
    "aten.bitwise_and": "BitwiseAnd",
    "aten.bitwise_or": "BitwiseOr",
    "aten.bitwise_xor": "BitwiseXor",
    "aten.bitwise_not": "BitwiseNot",
    "aten.linalg_det": "Det",
    "aten._fft_r2c": "DFT",
    "aten._fft_c2c": "DFT",
    "aten._fft_c2r": "DFT",
    "aten.stft": "STFT",
    "aten.im2col": "Im2Col",
    "aten.col2im": "Col2Im",
    "aten.affine_grid_generator": "AffineGrid",
    "aten.multinomial": "Multinomial",
    "aten.bernoulli": "Bernoulli",
}
"""Operators of PyTorch whose ONNX operator NVIDIA's parser does not have; on booleans the bitwise ones are others."""

_ON_BOOLEANS = ("aten.bitwise_and", "aten.bitwise_or", "aten.bitwise_xor", "aten.bitwise_not")
_DYADIC = ("weight", "bias", "multiplier", "shift")


@dataclass(frozen=True)
class TensorrtBackend(Backend):
    """Writes typed ONNX and builds it with ``tensorrt`` or ``tensorrt_rtx``, whichever is installed.

    Attributes:
        engine: Whether to build; without it the files above are written but the engine, for any NVIDIA GPU.
        level: How much the builder tries, 0 to 5; its own default is 3.
        tf32: Whether products in f32 may be rounded to TF32, 10 bits of mantissa.
        version_compatible: Whether later versions of TensorRT can run the engine; for ``tensorrt`` only, the engines of
            ``tensorrt_rtx`` always are.
        timing_cache: A file in which the builder keeps what it timed; made if it is not there.
        typical: Sizes for which the engine is to be fastest, ``"N=8, H=32"``; the largest otherwise.
        external_bytes: Weights beyond this size go into a file beside the model.
    """

    name: ClassVar[str] = "tensorrt"
    engine: bool = True
    level: int = 3
    tf32: bool = False
    version_compatible: bool = False
    timing_cache: str = ""
    typical: str = ""
    external_bytes: int = 1_500_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise ValueError(f"level is {self.level}; the builder has 0 to 5")
        _sizes(self.typical)

    def why_not_target(self, target: Target) -> str | None:
        """That it is no NVIDIA GPU, or that the builder installed here builds for others."""
        if target.kind != "cuda":
            return f"TensorRT runs on NVIDIA GPUs, and this is a target of kind {target.kind}; use backend onnx or tvm"
        trt = _installed() if self.engine else None
        if trt is None:
            return None
        known = script.architectures(trt) or _here()
        if target.architecture in known:
            return None
        return (
            f"{script.package(trt)} {trt.__version__} builds here for {', '.join(known) or 'no GPU'}, not for "
            f"{target.architecture}, which needs the package tensorrt on such a machine; tensorrt(engine=False) writes "
            f"the typed ONNX and {SCRIPT}, which builds the engine there"
        )

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """An element type or an operator that TensorRT lacks, on this target or at all."""
        from intarsia.backends.tensorrt_model import PRODUCTS, SCALINGS

        dtypes = list(_dtypes(node, graph))
        if bad := next((dtype for dtype in dtypes if dtype not in TYPES), None):
            return f"TensorRT has no {bad}, only {', '.join(TYPES)}; cast before, such as with pass cast-floats"
        if "f8e4m3" in dtypes and _capability(target.architecture) < 89:
            return f"f8e4m3 needs sm_89 or later, and {target.name} is {target.architecture}; use i8 or f16"
        lacking = LACKS.get(node.op.removesuffix(".Tensor").removesuffix(".Scalar"))
        if lacking and not (node.op.startswith(_ON_BOOLEANS) and set(dtypes) == {"b1"}):
            return f"TensorRT has no {lacking}; compute it before, where its inputs are constant, or use backend onnx"
        if node.op in PRODUCTS:
            params = {param.name for param in graph.params}
            given = [key for key in _DYADIC if node.args.get(key) is not None]
            computed = [key for key in given if node.ref(key) not in params]
            return f"{computed[0]} is computed at run time; materialize the program first" if computed else None
        return None if node.op in SCALINGS else OnnxBackend().why_not(node, graph, target)

    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Write the files; equal programs and targets give equal bytes with the same builder.

        Raises:
            Unsupported: What ``why_not`` finds, or what NVIDIA's parser or builder refuses.
            MissingEnvironment: An engine is asked for and no builder is installed.
        """
        require_support(self, program.graph, target)
        trt = _installed()
        if trt is None and self.engine:
            raise MissingEnvironment(
                "backend tensorrt needs NVIDIA's builder; pip install 'intarsia[tensorrt]', or use "
                f"tensorrt(engine=False), which writes the typed ONNX and {SCRIPT}"
            )
        files, info = self._write_model(program, folder)
        settings = json.dumps({**self._settings(program.graph, target), "engine": None}, indent=2, sort_keys=True)
        (folder / script.SETTINGS).write_text(settings + "\n")
        shutil.copyfile(script.__file__, folder / SCRIPT)
        if trt is not None:
            _run(folder / SCRIPT, program.graph, *([] if self.engine else ["--check"]))
        engine = json.loads((folder / script.SETTINGS).read_text())["engine"]
        plan = [engine["file"]] if engine else []
        return Built((*files, *plan, SCRIPT, script.SETTINGS), {**info, "engine": engine})

    def load(self, folder: Path, files: Sequence[str]) -> Engine:
        """The engine on this machine's GPU.

        Raises:
            MissingEnvironment: No TensorRT, no GPU, an engine for another one, or none built yet.
        """
        from intarsia.backends.tensorrt_engine import TensorrtEngine

        trt = _installed()
        if trt is None:
            raise MissingEnvironment("a TensorRT engine needs TensorRT to run; pip install 'intarsia[tensorrt]'")
        plan = folder / f"engine.{script.package(trt)}.plan"
        if not plan.is_file():
            raise MissingEnvironment(
                f"there is no {plan.name} yet; build it on the machine that is to run it: python {folder / SCRIPT}"
            )
        return TensorrtEngine(trt, plan)

    def check(self, folder: Path, files: Sequence[str]) -> str:
        """The plan has the hash and the length that build.json and its own header say, and the model is sound ONNX."""
        import onnx

        try:
            settings = json.loads((folder / script.SETTINGS).read_text())
            onnx.checker.check_model(str(folder / MODEL), full_check=True)
        except (OSError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise QualityError(f"{folder}: no sound {MODEL} or {script.SETTINGS}: {_line(error)}") from error
        facts = settings["engine"]
        if facts is None:
            return f"typed ONNX is sound; no engine, build it on the target with {SCRIPT}"
        plan = (folder / facts["file"]).read_bytes()
        if hashlib.sha256(plan).hexdigest() != facts["sha256"]:
            raise QualityError(
                f"{folder / facts['file']} is not the engine that {script.SETTINGS} tells of; build again"
            )
        if facts["builder"].startswith("tensorrt_rtx") and not _is_rtx_plan(plan):
            raise QualityError(f"{folder / facts['file']} is no TensorRT-RTX engine; build again")
        return f"typed ONNX is sound; {facts['file']}, {len(plan):,} bytes by {facts['builder']}, is the one built"

    def load_reference(self, folder: Path, files: Sequence[str]) -> Engine:
        """The typed ONNX on the CPU, rounded to its element types after each node."""
        from intarsia.backends.tensorrt_reference import ReferenceEngine

        return ReferenceEngine(folder / MODEL)

    def _settings(self, graph: Graph, target: Target) -> dict[str, Any]:
        return {
            "name": graph.name,
            "architecture": target.architecture,
            "level": self.level,
            "tf32": self.tf32,
            "version_compatible": self.version_compatible,
            "timing_cache": self.timing_cache,
            "profile": _profile(graph, _sizes(self.typical)),
        }

    def _write_model(self, program: Program, folder: Path) -> tuple[list[str], dict[str, Any]]:
        import onnx_ir

        from intarsia.backends.onnx_model import onnx_model
        from intarsia.backends.onnx_operators import OPSET
        from intarsia.backends.tensorrt_model import TENSORRT

        model = onnx_model(program, TENSORRT)
        stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        external = DATA if stored > self.external_bytes else None
        onnx_ir.save(model, folder / MODEL, external_data=external)
        info = {"opset": OPSET, "nodes": len(model.graph), "weight_bytes": stored}
        return [MODEL, DATA] if external else [MODEL], info


def _installed() -> Any:
    """The builder's package; None if there is none."""
    try:
        return script.library()
    except ImportError:
        return None


def _here() -> tuple[str, ...]:
    """The architecture of this machine's GPU."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def _capability(architecture: str) -> int:
    """89 for ``sm_89``; 0 for what is no NVIDIA GPU."""
    digits = architecture.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def _dtypes(node: Node, graph: Graph) -> Iterator[str]:
    """Element types of what a call reads and gives, weights excepted: they are stored as their operator wants them."""
    params = {param.name for param in graph.params}
    values = [graph.values[name] for name in node.inputs if name not in params]
    return (value.type.dtype for value in (*values, *node.outputs) if isinstance(value.type, TensorType))


def _sizes(text: str) -> dict[str, int]:
    """Sizes by name from ``"N=8, H=32"``."""
    try:
        pairs = (part.split("=") for part in text.split(",") if part.strip())
        return {name.strip(): int(extent) for name, extent in pairs}
    except ValueError as error:
        raise ValueError(f"typical is {text!r}; sizes are written 'N=8, H=32'") from error


def _profile(graph: Graph, typical: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Least, typical and largest extents of every input with named sizes.

    Raises:
        UsageError: ``typical`` names no size of the graph, or an extent outside its range.
        Unsupported: A size has no upper bound.
    """
    sizes = {size.name: size for size in graph.sizes}
    if unknown := sorted(typical.keys() - sizes.keys()):
        raise UsageError(f"tensorrt: typical names {unknown[0]}; sizes of {graph.name}: {', '.join(sizes) or 'none'}")
    if endless := [size.name for size in graph.sizes if size.maximum is None]:
        raise Unsupported(
            f"backend tensorrt cannot take {graph.name}:",
            [f"size {name} has no upper bound, and an engine is built for a range; give it one" for name in endless],
        )
    least = {name: size.minimum for name, size in sizes.items()}
    largest = {name: size.maximum or size.minimum for name, size in sizes.items()}
    chosen = {**largest, **typical}
    if outside := [str(size) for name, size in sizes.items() if not least[name] <= chosen[name] <= largest[name]]:
        raise UsageError(f"tensorrt: typical is outside of {', '.join(outside)}")
    ranges = {"min": least, "opt": chosen, "max": largest}
    return {
        value.name: {key: [evaluate(dim, at) for dim in value.type.shape] for key, at in ranges.items()}
        for value in graph.inputs
        if isinstance(value.type, TensorType) and any(isinstance(dim, str) for dim in value.type.shape)
    }


def _run(path: Path, graph: Graph, *arguments: str) -> None:
    """Run the bundle's own script, in a process of its own: on some models NVIDIA's builder crashes.

    Raises:
        Unsupported: The parser or the builder does not take the model.
    """
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = done.stderr.strip().splitlines() if done.returncode == REFUSED else []
        crash = f"its builder ended with code {done.returncode}: a fault of its own; try tensorrt(engine=False)"
        raise Unsupported(f"TensorRT does not take {graph.name}:", reasons or [crash])


def _is_rtx_plan(plan: bytes) -> bool:
    """Whether the header is that of TensorRT-RTX 1.x: ``vtrt``, and the file's length in bytes 16 to 23."""
    return plan[:4] == b"vtrt" and int.from_bytes(plan[16:24], "little") == len(plan)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
