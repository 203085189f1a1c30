from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.backends.bundle import Bundle
from intarsia.backends.null import NullBackend
from intarsia.backends.packing import Build, Evidence, add_report, write_bundle
from intarsia.ir.execute import call
from intarsia.ir.graph import Graph, Ref
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.kernels.integers import golden as definition

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

SHIFTS = {"c1": 37, "c2": 31, "c3": 29, "c4": 37, "fc": 31, "one": 32, "other": 31, "pool": 32, "mean": 38}
"""For multipliers around 2**30.5: results fill their range, and some saturate."""


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
        evidence=lambda _: Evidence({"psnr": float("inf")}, {"seconds": 0.25}, {"frames.png": b"a picture"}),
    )
    return add_report(made, "<html>what was decided</html>")


@pytest.fixture(scope="session")
def integer_network() -> Program:
    """Every integer operator: a 16-bit trunk, pools, a concatenation, a depthwise and a dilated convolution."""
    kernels.register()
    generator = torch.Generator().manual_seed(5)
    graph = Graph.parse((Path(__file__).parent.parent / "golden" / "integers.graph").read_text())
    weights: dict[str, Tensor] = {}
    for param in graph.params:
        layer, _, kind = param.name.partition(".")
        low, high = {"w": (-128, 128), "b": (-9000, 9000), "m": (1 << 30, 1 << 31), "s": (0, 2)}[kind]
        values = torch.randint(low, high, param.type.shape, generator=generator)
        weights[param.name] = (values + SHIFTS[layer] * (kind == "s")).to(torch.int8 if kind == "w" else torch.int32)
    return Program(graph, weights)


@pytest.fixture(scope="session")
def picture() -> Tensor:
    """An input for ``integer_network``, beyond the ends of its grid here and there."""
    return 1.5 * torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="session")
def exact() -> Callable[..., tuple[Tensor, ...]]:
    """What a program of integers answers by the definition of its operators, in numpy's int64."""
    return _exact


def _exact(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    table: dict[str, Tensor] = dict(program.weights)
    table.update(zip((value.name for value in program.graph.inputs), inputs, strict=True))
    for node in program.graph.nodes:
        domain, _, name = node.op.partition(".")
        if domain != "intarsia":
            table.update(zip((value.name for value in node.outputs), call(node, table), strict=True))
            continue
        args = {key: table[arg.name].numpy() if isinstance(arg, Ref) else arg for key, arg in node.args.items()}
        args.pop("dtype", None)
        table[node.name] = torch.from_numpy(getattr(definition, name)(**args))
    return tuple(table[name] for name in program.graph.outputs)
