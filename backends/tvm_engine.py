"""A library of TVM's, loaded and run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.backends.base import Engine, cores
from intarsia.ir.errors import MissingEnvironment, QualityError, UsageError
from intarsia.ir.operators import DTYPE_NAMES
from intarsia.ir.types import TensorType

NEEDED = {"x86-64-v3": ("avx2", "fma"), "x86-64-v4": ("avx512f", "avx512bw", "avx512vl")}
"""What the kernel calls the instructions that an architecture has, some of them standing for all."""


class TvmEngine(Engine):
    """TVM's virtual machine with a library of ours, on all cores that the process may use unless told otherwise."""

    def __init__(self, path: Path, facts: Mapping[str, Any], *, threads: int | None = None) -> None:
        _set_threads()
        import tvm
        from tvm import relax

        self._device = tvm.cuda() if facts["kind"] == "cuda" else tvm.cpu()
        if facts["kind"] == "cpu":
            _require_instructions(str(facts["architecture"]))
        elif not self._device.exist:
            raise MissingEnvironment(
                f"the engine is for an NVIDIA GPU, {facts['architecture']}, and there is none here"
            )
        self._inputs = [(str(name), str(type_)) for name, type_ in facts["inputs"]]
        self._tensor = tvm.runtime.tensor
        self._version = tvm.__version__
        if threads is not None:
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        self._threads = int(tvm.get_global_func("runtime.NumThreads")())
        try:
            library = tvm.runtime.load_module(str(path))
            self._main = relax.VirtualMachine(library, self._device)["main"]
        except (RuntimeError, AttributeError, ValueError) as error:
            raise QualityError(f"{path} cannot be loaded: {' '.join(str(error).split())[:200]}") from error

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the library answers; UsageError for inputs of another number, type or shape."""
        if reason := self.why_not(inputs):
            raise UsageError(reason)
        given = (self._tensor(tensor.detach().contiguous().numpy(), self._device) for tensor in inputs)
        answers = self._main(*given)
        return tuple(torch.from_numpy(answer.numpy()) for answer in answers)

    def why_not(self, inputs: Sequence[Tensor]) -> str | None:
        """Which types and shapes it takes, and which these are; None if it takes them."""
        found = [str(TensorType(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))) for tensor in inputs]
        if found == [type_ for _, type_ in self._inputs]:
            return None
        takes = ", ".join(f"{name}: {type_}" for name, type_ in self._inputs)
        return f"the engine takes {takes}; found {', '.join(found) or 'nothing'}"

    @property
    def device(self) -> str:
        """Threads and TVM's version."""
        if self._device.dlpack_device_type() == 1:
            return f"CPU, {self._threads} threads, TVM {self._version}"
        return f"{self._device.device_name}, TVM {self._version}"


def _set_threads() -> None:
    """Have TVM use the cores that it may, and leave threads where they are; it looks once, when it first computes.

    Left alone it takes half of the cores for hyperthreads, and pins the calling thread to one core, and with it
    whatever the process starts from then on.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(cores()))


def _require_instructions(architecture: str) -> None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), None)
    missing = [] if flags is None else [flag for flag in NEEDED.get(architecture, ()) if flag not in flags]
    if missing:
        raise MissingEnvironment(f"the engine is for {architecture}; this CPU has no {', '.join(missing)}")
