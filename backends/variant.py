"""One program of a bundle: its graph and weights, and what its engines answered to its sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from intarsia.backends.parts import Parts, PhaseParts
from intarsia.ir.errors import QualityError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, load_weights

if TYPE_CHECKING:
    from intarsia.backends.bundle import Bundle

GRAPH = "model.graph"
WEIGHTS = "weights.safetensors"
SAMPLE = "sample.safetensors"


@dataclass(frozen=True)
class Sample:
    """Inputs in the graph's order, and what engines and the eager reference answered when the bundle was made.

    ``engines`` lacks an engine that could run neither itself nor on its reference.
    """

    inputs: tuple[Tensor, ...]
    engines: Mapping[str, tuple[Tensor, ...]]
    reference: tuple[Tensor, ...]


@dataclass(frozen=True)
class Variant:
    """A program of a bundle; its parts are read, and checked against the manifest, when asked for.

    Attributes:
        number: Of the first phase that runs it, or of the segment that it is; 0 in a bundle without either.
        parts: What it and its like are to the model.
    """

    bundle: Bundle
    number: int
    parts: Parts

    @property
    def phase(self) -> int:
        """Number of the first phase that runs it; 0 in a bundle without phases."""
        return self.number if isinstance(self.parts, PhaseParts) else 0

    @property
    def suffix(self) -> str:
        """What tells it from the others in messages, ``, phase 1 (steps 4 to 39)``; empty where it is the only."""
        return self.parts.suffix(self.number)

    @cached_property
    def graph(self) -> Graph:
        """The graph that the engines were built from."""
        return Graph.parse(self._checked(GRAPH).read_text())

    @cached_property
    def program(self) -> Program:
        """The reference: the graph with its weights."""
        return Program(self.graph, load_weights(self.bundle.checked(WEIGHTS), self.graph.params))

    @cached_property
    def sample(self) -> Sample:
        """The stored inputs and answers."""
        from safetensors.torch import load_file

        tensors = load_file(self._checked(SAMPLE))
        count = len(self.graph.outputs)
        engines = {
            name: tuple(tensors[f"engine.{name}.{index}"] for index in range(count))
            for name in self.bundle.engines
            if f"engine.{name}.0" in tensors
        }
        return Sample(
            tuple(tensors[f"input.{value.name}"] for value in self.graph.inputs),
            engines,
            tuple(tensors[f"reference.{index}"] for index in range(count)),
        )

    def check(self, name: str) -> str:
        """What the backend can prove of the engine ``name`` without running it; QualityError if it is corrupt."""
        return self.bundle.backend(self.bundle.known(name)).check(*self.engine_files(name))

    def engine_files(self, name: str) -> tuple[Path, list[str]]:
        """Folder and files of the engine ``name``; QualityError if one is not what the manifest says."""
        claims: dict[str, Any] = self.bundle.manifest["engines"][name]
        if self._folder:
            claims = claims.get(self.parts.key, {}).get(str(self.number), {})
        if "files" not in claims:
            raise QualityError(f"{self.bundle.folder}: the manifest lists no engine of {name}{self.suffix}")
        files: list[str] = claims["files"]
        folder = Path("engine", name, self._folder)
        for file in files:
            self.bundle.checked((folder / file).as_posix())
        return self.bundle.folder / folder, files

    def _checked(self, name: str) -> Path:
        return self.bundle.checked(Path(self._folder, name).as_posix())

    @property
    def _folder(self) -> str:
        return self.parts.folder(self.number)
