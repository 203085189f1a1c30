"""A machine, a small graph and random weights, which the tests of passes share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType

MLP = """graph mlp {
  size N in [2, 64]
  input %x: f32[N, 64]
  param %up.weight: f32[128, 64]
  param %up.bias: f32[128]
  param %down.weight: f32[40, 128]
  param %head.weight: f32[8, 40]
  %up: f32[N, 128] = aten.linear(input=%x, weight=%up.weight, bias=%up.bias)
  %relu: f32[N, 128] = aten.relu(self=%up)
  %down: f32[N, 40] = aten.linear(input=%relu, weight=%down.weight, bias=None)
  %head: f32[N, 8] = aten.linear(input=%down, weight=%head.weight, bias=None)
  return %head
}
"""


@pytest.fixture
def target() -> Target:
    return Target(
        name="null",
        summary="a machine for tests",
        kind="null",
        architecture="none",
        flops={"f32": 1e9},
        bandwidth=1e9,
        memory=10**9,
        launch=0.0,
    )


@pytest.fixture
def mlp() -> Graph:
    return Graph.parse(MLP)


@pytest.fixture(scope="session")
def wan_mini() -> Program:
    """The trained wan-mini, traced once for all tests that look at it."""
    from intarsia.flow import trace

    return trace("wan-mini")


@pytest.fixture
def with_weights() -> Callable[[Graph], Program]:
    """The graph with random weights."""

    def fill(graph: Graph) -> Program:
        generator = torch.Generator().manual_seed(1)
        weights = {}
        for param in graph.params:
            assert isinstance(param.type, TensorType)
            shape = [int(extent) for extent in param.type.shape]
            weights[param.name] = (torch.randn(shape, generator=generator) / 4).to(DTYPES[param.type.dtype])
        return Program(graph, weights)

    return fill
