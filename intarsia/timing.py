"""Seconds of a single call, measured on this machine through an engine of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from intarsia.backends.base import find_backend
from intarsia.backends.runner import bench
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target

BACKEND = "onnx"


def measured_seconds(target: Target, *, repeats: int = 7) -> Callable[[Node, Graph], float]:
    """What times a call of a graph: the median of ``repeats`` runs of an engine that holds the call alone.

    UsageError for a machine that is not a CPU, whose times this one cannot tell.
    """
    if target.kind != "cpu":
        raise UsageError(f"costs='measured' are those of this machine's CPU, and --target {target.name} is none")
    backend = find_backend(BACKEND)

    def seconds(node: Node, graph: Graph) -> float:
        inputs = tuple(graph.values[name] for name in dict.fromkeys(node.inputs))
        alone = Graph(graph.name, inputs, (), (node,), (node.name,), graph.sizes)
        with TemporaryDirectory() as folder:
            built = backend.build(Program(alone, {}), target, Path(folder))
            engine = backend.load(Path(folder), built.files)
            return bench(engine, example_inputs(alone), repeats=repeats).seconds

    return seconds
