"""The null backend: the engine is the graph itself, run eagerly, so that a whole pipeline runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.backends.base import Backend, Built, Engine
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import resolve
from intarsia.ir.program import Program, load_program, save_weights
from intarsia.ir.target import Target


class NullEngine(Engine):
    """A program run by PyTorch on the CPU: the reference that other engines are compared with."""

    def __init__(self, program: Program) -> None:
        self._module = program.module()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the graph gives for ``inputs``."""
        with torch.no_grad():
            return tuple(self._module(*inputs))

    @property
    def device(self) -> str:
        """Threads and PyTorch's version."""
        return f"CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


@dataclass(frozen=True)
class NullBackend(Backend):
    """Takes every operator that PyTorch has; writes the graph's text and its weights."""

    name: ClassVar[str] = "null"

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        """None, unless PyTorch does not know the operator."""
        try:
            resolve(node.op)
        except Unsupported as error:
            return str(error)
        return None

    def build(self, program: Program, target: Target, folder: Path) -> Built:
        """Write ``model.graph`` and ``model.safetensors``."""
        (folder / "model.graph").write_text(str(program.graph))
        save_weights(program.weights, folder / "model.safetensors")
        return Built(("model.graph", "model.safetensors"))

    def load(self, folder: Path, files: Sequence[str]) -> NullEngine:
        """The program again, ready to run."""
        return NullEngine(load_program(folder / "model.graph"))
