"""A network of three linear layers, small enough to search in a second, with what judges it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.search.workload import Workload

THREE_LAYERS = """graph three {
  input %x: f32[16, 64]
  param %w1: f32[64, 64]
  param %w2: f32[64, 64]
  param %w3: f32[64, 64]
  %first: f32[16, 64] = aten.linear(input=%x, weight=%w1)
  %a: f32[16, 64] = aten.relu(self=%first)
  %second: f32[16, 64] = aten.linear(input=%a, weight=%w2)
  %b: f32[16, 64] = aten.relu(self=%second)
  %third: f32[16, 64] = aten.linear(input=%b, weight=%w3)
  return %third
}"""


@pytest.fixture
def program() -> Program:
    generator = torch.Generator().manual_seed(0)
    graph = Graph.parse(THREE_LAYERS)
    return Program(graph, {param.name: torch.randn(64, 64, generator=generator) / 8 for param in graph.params})


@pytest.fixture
def workload() -> Workload:
    return make_workload()


@pytest.fixture
def workload_of() -> Callable[..., Workload]:
    return make_workload


def make_workload(asked: list[str] | None = None) -> Workload:
    """Random inputs; every split that answers are asked for is appended to ``asked``."""

    def inputs(seed: int) -> Tensor:
        return torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))

    def outputs(run, split, progress):
        if asked is not None:
            asked.append(split)
        first = {"calibration": 0, "validation": 100, "held-out": 200}[split]
        return torch.stack([run(inputs(first + number))[0] for number in range(4)])

    return Workload(tuple((inputs(seed),) for seed in range(3)), outputs, {"kind": "toy"})
