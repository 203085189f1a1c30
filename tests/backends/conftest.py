from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.backends.bundle import Bundle
from intarsia.backends.null import NullBackend
from intarsia.backends.packing import Build, Evidence, add_report, write_bundle
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.target import Target

TWO_LAYERS = """graph two_layers {
  input %x: f32[2, 8]
  param %first.weight: f32[16, 8]
  param %first.bias: f32[16]
  param %second.weight: f32[4, 16]
  %first: f32[2, 16] = aten.linear(input=%x, weight=%first.weight, bias=%first.bias)  # model.py:3
  %hidden: f32[2, 16] = aten.gelu(self=%first)  # model.py:4
  %second: f32[2, 4] = aten.linear(input=%hidden, weight=%second.weight)  # model.py:5
  return %second
}
"""


@pytest.fixture
def target() -> Target:
    return Target("null", "a machine for tests", "null", "none", {"f32": 1e12}, 1e11, 2**30, 1e-6)


@pytest.fixture
def program() -> Program:
    graph = Graph.parse(TWO_LAYERS)
    generator = torch.Generator().manual_seed(0)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) for p in graph.params})


@pytest.fixture
def plan(program: Program) -> Plan:
    return Plan(program.graph.fingerprint, "null", (Phase((Step("quantize-linear", {"first": "keep"}),)),))


@pytest.fixture
def bundle(tmp_path: Path, program: Program, plan: Plan, target: Target) -> Bundle:
    """A bundle with every part that a bundle may have."""
    made = write_bundle(
        tmp_path / "out",
        program=program,
        plan=plan,
        builds=[Build(NullBackend(), program)],
        target=target,
        sampler='{"steps": 4}',
        predicted={"seconds": 0.5},
        command="intarsia optimize two_layers -o out",
        config={"seed": 0},
        evidence=lambda _: Evidence({"psnr": float("inf")}, {"seconds": 0.25}, b"a picture"),
    )
    return add_report(made, "<html>what was decided</html>")
