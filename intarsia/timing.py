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
    _check_kind(target)

    def seconds(node: Node, graph: Graph) -> float:
        inputs = tuple(graph.values[name] for name in dict.fromkeys(node.inputs))
        alone = Graph(graph.name, inputs, (), (node,), (node.name,), graph.sizes)
        return _alone(Program(alone, {}), target, repeats)

    return seconds


def measured_layers(target: Target, *, repeats: int = 7) -> Callable[[Node, Program], float]:
    """What times a layer of a program whose weights are computed: alone, its weights constant, as above."""
    _check_kind(target)

    def seconds(node: Node, program: Program) -> float:
        graph = program.graph
        held = dict.fromkeys(name for name in node.inputs if name in program.weights)
        inputs = tuple(graph.values[name] for name in dict.fromkeys(node.inputs) if name not in held)
        params = tuple(graph.values[name] for name in held)
        alone = Graph(graph.name, inputs, params, (node,), (node.name,), graph.sizes)
        return _alone(Program(alone, {name: program.weights[name] for name in held}), target, repeats)

    return seconds


def _check_kind(target: Target) -> None:
    if target.kind != "cpu":
        raise UsageError(f"costs='measured' are those of this machine's CPU, and --target {target.name} is none")


def _alone(program: Program, target: Target, repeats: int) -> float:
    backend = find_backend(BACKEND)
    with TemporaryDirectory() as folder:
        built = backend.build(program, target, Path(folder))
        engine = backend.load(Path(folder), built.files)
        return bench(engine, example_inputs(program.graph), repeats=repeats).seconds
