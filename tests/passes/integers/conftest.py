"""Small networks with the shapes that integers meet, and their calibrated forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from intarsia.ir.execute import evaluate_nodes
from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.program import Program, example_inputs, split_constant
from intarsia.ir.rewrite import renamed
from intarsia.ir.types import TensorType

RESIDUAL = """graph residual {
  size N in [1, inf]
  input %x: f32[N, 3, 12, 12]
  param %stem.w: f32[8, 3, 3, 3]
  param %stem.b: f32[8]
  param %one.w: f32[8, 8, 3, 3]
  param %one.b: f32[8]
  param %two.w: f32[8, 8, 3, 3]
  param %three.w: f32[16, 8, 3, 3]
  param %three.b: f32[16]
  param %down.w: f32[16, 8, 1, 1]
  param %down.b: f32[16]
  param %fc.w: f32[10, 16]
  param %fc.b: f32[10]
  %stem: f32[N, 8, 12, 12] = aten.conv2d(input=%x, weight=%stem.w, bias=%stem.b, stride=[1, 1], padding=[1, 1])
  %stem.relu: f32[N, 8, 12, 12] = aten.relu(self=%stem)
  %pool: f32[N, 8, 6, 6] = aten.max_pool2d(self=%stem.relu, kernel_size=[3, 3], stride=[2, 2], padding=[1, 1])
  %one: f32[N, 8, 6, 6] = aten.conv2d(input=%pool, weight=%one.w, bias=%one.b, stride=[1, 1], padding=[1, 1])
  %one.relu: f32[N, 8, 6, 6] = aten.relu(self=%one)
  %two: f32[N, 8, 6, 6] = aten.conv2d(input=%one.relu, weight=%two.w, bias=None, stride=[1, 1], padding=[1, 1])
  %sum: f32[N, 8, 6, 6] = aten.add.Tensor(self=%two, other=%pool)
  %sum.relu: f32[N, 8, 6, 6] = aten.relu(self=%sum)
  %three: f32[N, 16, 3, 3] = aten.conv2d(input=%sum.relu, weight=%three.w, bias=%three.b, stride=[2, 2], padding=[1, 1])
  %down: f32[N, 16, 3, 3] = aten.conv2d(input=%sum.relu, weight=%down.w, bias=%down.b, stride=[2, 2])
  %join: f32[N, 16, 3, 3] = aten.add.Tensor(self=%three, other=%down)
  %join.relu: f32[N, 16, 3, 3] = aten.relu(self=%join)
  %mean: f32[N, 16, 1, 1] = aten.adaptive_avg_pool2d(self=%join.relu, output_size=[1, 1])
  %flat: f32[N, 16] = aten.flatten.using_ints(self=%mean, start_dim=1)
  %fc: f32[N, 10] = aten.linear(input=%flat, weight=%fc.w, bias=%fc.b)
  return %fc
}
"""

BRANCHES = """graph branches {
  size N in [1, inf]
  input %x: f32[N, 3, 8, 8]
  param %stem.w: f32[8, 3, 3, 3]
  param %left.w: f32[4, 8, 1, 1]
  param %right.w: f32[6, 8, 3, 3]
  param %right.b: f32[6]
  param %fc.w: f32[5, 18]
  %stem: f32[N, 8, 8, 8] = aten.conv2d(input=%x, weight=%stem.w, bias=None, stride=[1, 1], padding=[1, 1])
  %stem.relu: f32[N, 8, 8, 8] = aten.relu(self=%stem)
  %left: f32[N, 4, 8, 8] = aten.conv2d(input=%stem.relu, weight=%left.w, bias=None)
  %left.relu: f32[N, 4, 8, 8] = aten.relu(self=%left)
  %right: f32[N, 6, 8, 8] = aten.conv2d(input=%stem.relu, weight=%right.w, bias=%right.b, stride=[1, 1], padding=[1, 1])
  %right.relu: f32[N, 6, 8, 8] = aten.relu(self=%right)
  %pool: f32[N, 8, 8, 8] = aten.avg_pool2d(self=%stem.relu, kernel_size=[3, 3], stride=[1, 1], padding=[1, 1])
  %cat: f32[N, 18, 8, 8] = aten.cat(tensors=[%left.relu, %right.relu, %pool], dim=1)
  %mean: f32[N, 18] = aten.mean.dim(self=%cat, dim=[-1, -2])
  %fc: f32[N, 5] = aten.linear(input=%mean, weight=%fc.w, bias=None)
  return %fc
}
"""

DEPTHWISE = """graph depthwise {
  size N in [1, inf]
  input %x: f32[N, 3, 8, 8]
  param %stem.w: f32[8, 3, 1, 1]
  param %stem.b: f32[8]
  param %depth.w: f32[8, 1, 3, 3]
  param %depth.b: f32[8]
  param %out.w: f32[8, 8, 1, 1]
  param %head.w: f32[4, 8, 1, 1]
  %stem: f32[N, 8, 8, 8] = aten.conv2d(input=%x, weight=%stem.w, bias=%stem.b)
  %stem.clip: f32[N, 8, 8, 8] = aten.relu6(self=%stem)
  %pad: f32[N, 8, 9, 9] = aten.pad(self=%stem.clip, pad=[0, 1, 0, 1])
  %depth: f32[N, 8, 4, 4] = aten.conv2d(input=%pad, weight=%depth.w, bias=%depth.b, stride=[2, 2], groups=8)
  %depth.clip: f32[N, 8, 4, 4] = aten.hardtanh(self=%depth, min_val=0.0, max_val=6.0)
  %out: f32[N, 8, 4, 4] = aten.conv2d(input=%depth.clip, weight=%out.w, bias=None)
  %head: f32[N, 4, 4, 4] = aten.conv2d(input=%out, weight=%head.w, bias=None)
  return %head
}
"""

ISLANDS = """graph islands {
  size N in [1, inf]
  input %x: f32[N, 16]
  param %up.w: f32[32, 16]
  param %up.b: f32[32]
  param %mid.w: f32[16, 32]
  param %down.w: f32[4, 16]
  %up: f32[N, 32] = aten.linear(input=%x, weight=%up.w, bias=%up.b)
  %gelu: f32[N, 32] = aten.gelu(self=%up)
  %mid: f32[N, 16] = aten.linear(input=%gelu, weight=%mid.w, bias=None)
  %softmax: f32[N, 16] = aten.softmax.int(self=%mid, dim=-1)
  %down: f32[N, 4] = aten.linear(input=%softmax, weight=%down.w, bias=None)
  return %down
}
"""


@pytest.fixture
def residual() -> Graph:
    return Graph.parse(RESIDUAL)


@pytest.fixture
def branches() -> Graph:
    return Graph.parse(BRANCHES)


@pytest.fixture
def depthwise() -> Graph:
    return Graph.parse(DEPTHWISE)


@pytest.fixture
def islands() -> Graph:
    return Graph.parse(ISLANDS)


def _with_ranges(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> Graph:
    """The graph with ``intarsia.calibrated`` behind each value that has a range."""
    names: dict[str, str] = {}
    nodes: list[Node] = []

    def calibrate(name: str) -> None:
        if name in ranges:
            made = Value(f"{name}.calibrated", graph.type(name))
            low, high = ranges[name]
            nodes.append(Node("intarsia.calibrated", {"input": Ref(name), "low": low, "high": high}, (made,)))
            names[name] = made.name

    for value in graph.inputs:
        calibrate(value.name)
    for node in graph.nodes:
        nodes.append(replace(node, args={key: renamed(arg, names) for key, arg in node.args.items()}))
        for value in node.outputs:
            calibrate(value.name)
    return replace(graph, nodes=tuple(nodes), outputs=tuple(names.get(name, name) for name in graph.outputs))


@pytest.fixture
def with_ranges() -> Callable[[Graph, Mapping[str, tuple[float, float]]], Graph]:
    """The graph with ``intarsia.calibrated`` behind each value that has a range."""
    return _with_ranges


@pytest.fixture
def calibrated() -> Callable[[Program], Program]:
    """The program with the range of every activation, as two random batches show them."""

    def calibrate(program: Program) -> Program:
        graph = program.graph
        constant = {value.name for node in split_constant(graph)[0] for value in node.outputs}
        ranges: dict[str, tuple[float, float]] = {}
        for seed in (1, 2):
            inputs = {
                value.name: tensor for value, tensor in zip(graph.inputs, example_inputs(graph, seed=seed), strict=True)
            }
            values = evaluate_nodes(graph.nodes, {**program.weights, **inputs})
            for name, value in values.items():
                is_activation = name not in program.weights and name not in constant
                if is_activation and isinstance(value, Tensor) and value.is_floating_point():
                    low, high = ranges.get(name, (torch.inf, -torch.inf))
                    ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
        assert all(isinstance(graph.values[name].type, TensorType) for name in ranges)
        return Program(_with_ranges(graph, ranges), program.weights)

    return calibrate
