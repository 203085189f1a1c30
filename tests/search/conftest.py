"""Networks small enough to search in a second, with what judges them: three linear layers, and two of attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.search.workload import Loop, Workload

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


class Attention(nn.Module):
    """Two heads of four channels over the tokens of a video; what they look at is far from even."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        heads = (layer(normed).view(*x.shape[:2], 2, 4).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        found = scaled_dot_product_attention(*heads)
        return x + self.to_out(found.transpose(1, 2).reshape(x.shape))


class Denoiser(nn.Module):
    """Two layers of attention over 4 x 4 x 4 tokens, told the time."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(2, 8, 1)
        self.place = nn.Parameter(torch.randn(1, 64, 8))
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.out = nn.Linear(8, 2)

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2) + self.place
        x = x * (0.5 + timestep)[:, None, None]
        for block in self.blocks:
            x = block(x)
        return self.out(x).transpose(1, 2).unflatten(2, (4, 4, 4))


@pytest.fixture(scope="session")
def denoiser() -> Program:
    """``Denoiser`` with fixed weights, traced for one video: four heads."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = Denoiser()
        with torch.no_grad():
            for block in module.blocks:
                block.to_q.weight *= 4
                block.to_k.weight *= 4
                block.to_v.weight *= 3
    return trace(module, {"video": torch.zeros(1, 2, 4, 4, 4), "timestep": torch.ones(1)}, name="denoiser")


@pytest.fixture(scope="session")
def denoising(denoiser: Program) -> Callable[..., Workload]:
    """``denoising(asked=[])``: Euler's method in five steps with ``denoiser``; ``asked`` gets every call's split."""
    return lambda **options: make_denoising(denoiser, **options)


STEPS = 5


def make_denoising(program: Program, *, asked: list[str] | None = None, samples: int = 2) -> Workload:
    """A loop over videos (1, 2, 4, 4, 4), ``samples`` of each split."""
    told = [] if asked is None else asked

    def start(split: str) -> list[Tensor]:
        first = {"calibration": 0, "validation": 100, "held-out": 200}[split]
        seeds = range(first, first + samples)
        return [torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]

    def together(step, split, progress):
        videos = start(split)
        for number in range(STEPS):
            told.append(f"together {split}")
            inputs = [(video, torch.tensor([1 - number / STEPS])) for video in videos]
            videos = [video - found / STEPS for video, found in zip(videos, step(inputs), strict=True)]
        return torch.cat(videos)

    def outputs(run, split, progress):
        def step(calls):
            told[-1] = f"outputs {split}"
            return [run(*inputs)[0] for inputs in calls]

        return together(step, split, progress)

    def record(split, steps, progress):
        seen = []

        def run(*inputs):
            seen.append(inputs)
            return module(*inputs)

        module = program.module()
        with torch.no_grad():
            outputs(run, split, progress)
        told[-STEPS:] = [f"record {split}"] * STEPS
        return [seen[step * samples : (step + 1) * samples] for step in steps]

    def by_step(served):
        def run(*inputs):
            number = round((1 - float(inputs[1])) * STEPS)
            (found,) = [run for first, last, run in served if first <= number <= last]
            return found(*inputs)

        return run

    loop = Loop(STEPS, record, together, by_step, lambda rows: rows)
    return Workload((), outputs, {"kind": "denoising"}, loop)
