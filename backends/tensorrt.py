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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from intarsia.backends import agreement
from intarsia.backends import tensorrt_build as script
from intarsia.backends import tensorrt_limits as limits
from intarsia.backends.base import Backend, Built, Engine, require_support
from intarsia.backends.onnx import DATA, MODEL
from intarsia.backends.tensorrt_integers import PRODUCTS
from intarsia.backends.tensorrt_process import SCRIPT, installed, is_rtx_plan, run_script
from intarsia.ir.errors import MissingEnvironment, QualityError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.target import Target


@dataclass(frozen=True)
class TensorrtBackend(Backend):
    """Writes typed ONNX and builds it with ``tensorrt`` or ``tensorrt_rtx``, whichever is installed.

    Attributes:
        engine: Whether to build; without it the files above are written but the engine, for any NVIDIA GPU.
        level: How much the builder tries, 0 to 5; its own default is 3.
        tf32: Whether products in f32 may be rounded to TF32, 10 bits of mantissa.
        version_compatible: Whether later versions of TensorRT can run the engine; ``tensorrt_rtx`` refuses it.
        timing_cache: A file in which the builder keeps what it timed; made if it is not there.
        typical: Sizes for which the engine is to be fastest, ``"N=8, H=32"``; the largest otherwise.
        external_bytes: Weights beyond this size go into a file beside the model.
    """

    name: ClassVar[str] = "tensorrt"
    passes: ClassVar[tuple[str, ...]] = ("complex-to-real", "blend-means")
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
        limits.sizes_of(self.typical)

    def why_not_target(self, target: Target) -> str | None:
        """That it is no NVIDIA GPU, or that the builder installed here builds for others."""
        if target.kind != "cuda":
            return f"TensorRT runs on NVIDIA GPUs, and this is a target of kind {target.kind}; use backend onnx or tvm"
        trt = installed() if self.engine else None
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
        return limits.why_not(node, graph, target)

    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Write the files; equal programs and targets give equal bytes with the same builder.

        Raises:
            Unsupported: What ``why_not`` finds, or what NVIDIA's parser or builder refuses.
            MissingEnvironment: An engine is asked for and no builder is installed.
        """
        require_support(self, program.graph, target)
        trt = installed()
        if trt is None and self.engine:
            raise MissingEnvironment(
                "backend tensorrt needs NVIDIA's builder; pip install 'intarsia[tensorrt]', or use "
                f"tensorrt(engine=False), which writes the typed ONNX and {SCRIPT}"
            )
        settings = json.dumps({**self._settings(program.graph, target), "engine": None}, indent=2, sort_keys=True)
        files, info = self._write_model(program, folder)
        (folder / script.SETTINGS).write_text(settings + "\n")
        shutil.copyfile(script.__file__, folder / SCRIPT)
        if trt is not None:
            cache = ["--timing-cache", str(Path(self.timing_cache).absolute())] if self.timing_cache else []
            run_script(folder, program.graph.name, cache if self.engine else ["--check"])
        engine = json.loads((folder / script.SETTINGS).read_text())["engine"]
        plan = [engine["file"]] if engine else []
        info |= _difference(program, folder)
        return Built((*files, *plan, SCRIPT, script.SETTINGS), {**info, "engine": engine})

    def load(self, folder: Path, files: Sequence[str]) -> Engine:
        """The engine on this machine's GPU.

        Raises:
            MissingEnvironment: No TensorRT, no GPU, an engine for another one, or none built yet.
        """
        from intarsia.backends.tensorrt_engine import TensorrtEngine

        trt = installed()
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
        try:
            facts = settings["engine"]
            if facts is None:
                return f"typed ONNX is sound; no engine, build it on the target with {SCRIPT}"
            path = folder / facts["file"]
            plan = path.read_bytes()
        except (OSError, KeyError, TypeError) as error:
            raise QualityError(f"{folder}: {script.SETTINGS} tells of no engine that is here: {error!r}") from error
        if facts["builder"].startswith("tensorrt_rtx") and not is_rtx_plan(plan):
            raise QualityError(f"{path} is no TensorRT-RTX engine, or not all of one; make it again with {SCRIPT}")
        if hashlib.sha256(plan).hexdigest() != facts["sha256"]:
            raise QualityError(f"{path} is not the engine that {script.SETTINGS} tells of; make it again with {SCRIPT}")
        return f"typed ONNX is sound; {path.name}, {len(plan):,} bytes by {facts['builder']}, is the one built"

    def tolerance(self, graph: Graph) -> float:
        """Integers through Q/DQ are computed in floats: at ties, and there alone, they may be one step off.

        Measured: at most 0.5 % of the integers, with multipliers that make ties common (docs/decisions/005).
        """
        integers = any(graph.find(*PRODUCTS))
        step = agreement.QUANTIZED if any(graph.find("intarsia.quantize_static")) else 1e-2
        return max(super().tolerance(graph), step) if integers else super().tolerance(graph)

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
            "profile": limits.profile(graph, limits.sizes_of(self.typical)),
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


def _difference(program: Program, folder: Path) -> dict[str, Any]:
    """How far the model is from exact integers, where it has any and ONNX Runtime is here to run it."""
    if not any(program.graph.find(*PRODUCTS)) or find_spec("onnxruntime") is None:
        return {}
    from intarsia.backends.tensorrt_difference import difference

    found = difference(program, folder / MODEL)
    return {} if found is None else {"from exact integers": found}


def _here() -> tuple[str, ...]:
    """The architecture of this machine's GPU."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
