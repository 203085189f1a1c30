from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intarsia.backends import agreement
from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.execute import check_types
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.ir.rotation import Rotation
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.apply import run_passes
from intarsia.passes.base import find_pass
from intarsia.passes.clean import Clean
from intarsia.passes.complex_to_real import ComplexToReal

ROTATION = """graph rotation {
  input %pairs: f32[2, 16, 4, 4, 2]
  param %freqs: c64[1, 16, 1, 4]
  %z: c64[2, 16, 4, 4] = aten.view_as_complex(self=%pairs)
  %t: c64[2, 16, 4, 4] = aten.mul.Tensor(self=%z, other=%freqs)
  %y: f32[2, 16, 4, 4, 2] = aten.view_as_real(self=%t)
  return %y
}
"""

REAL_ROTATION = """graph rotation {
  input %pairs: f32[2, 16, 4, 4, 2]
  param %freqs: c64[1, 16, 1, 4]
  %freqs.pair: f32[1, 16, 1, 4, 2] = aten.view_as_real(self=%freqs)
  %freqs.real: f32[1, 16, 1, 4], %freqs.imag: f32[1, 16, 1, 4] = aten.unbind.int(self=%freqs.pair, dim=-1)
  %z.real: f32[2, 16, 4, 4], %z.imag: f32[2, 16, 4, 4] = aten.unbind.int(self=%pairs, dim=-1)
  %t.real.0: f32[2, 16, 4, 4] = aten.mul.Tensor(self=%z.real, other=%freqs.real)
  %t.real.1: f32[2, 16, 4, 4] = aten.mul.Tensor(self=%z.imag, other=%freqs.imag)
  %t.real: f32[2, 16, 4, 4] = aten.sub.Tensor(self=%t.real.0, other=%t.real.1)
  %t.imag.0: f32[2, 16, 4, 4] = aten.mul.Tensor(self=%z.real, other=%freqs.imag)
  %t.imag.1: f32[2, 16, 4, 4] = aten.mul.Tensor(self=%z.imag, other=%freqs.real)
  %t.imag: f32[2, 16, 4, 4] = aten.add.Tensor(self=%t.imag.0, other=%t.imag.1)
  %y: f32[2, 16, 4, 4, 2] = aten.stack(tensors=[%t.real, %t.imag], dim=-1)
  return %y
}
"""


class LlamaRope(nn.Module):
    """``apply_rotary_emb`` of LLaMA, and of HunyuanVideo as it was published: a table in f32, shared by the heads."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
        angles = torch.outer(torch.arange(16).float(), frequencies)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        table = self.get_buffer("freqs_cis").view(1, x.shape[1], 1, -1)
        return torch.view_as_real(pairs * table).flatten(3).type_as(x)


class WanRope(nn.Module):
    """``rope_apply`` of Wan as it was published: a table in f64 for each of time, height and width, put together."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(8), 1.0 / 10000 ** (torch.arange(0, 8, 2).to(torch.float64) / 8))
        self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = 4, 2, 2
        time, down, across = self.get_buffer("freqs").split([2, 1, 1], dim=1)
        table = torch.cat(
            [
                time[:frames].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                down[:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                across[:width].view(1, 1, width, -1).expand(frames, height, width, -1),
            ],
            dim=-1,
        ).reshape(1, 16, 1, -1)
        pairs = torch.view_as_complex(x.to(torch.float64).reshape(*x.shape[:3], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3).float()


class MadeInside(nn.Module):
    """Tables made in forward, turned back, and scaled."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(16).float(), torch.arange(1, 5).float()).view(1, 16, 1, 4)
        table = torch.polar(torch.ones_like(angles), angles)
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * table * 0.5
        back = (z - torch.complex(angles, -angles)) * table.conj()
        return torch.cat([torch.view_as_real(-back).flatten(3), back.real + back.imag], dim=-1)


def is_real(graph: Graph) -> bool:
    return "c64" not in str(graph) and "c128" not in str(graph)


def test_a_rotation_becomes_this(target: Target) -> None:
    changed = ComplexToReal().run(Graph.parse(ROTATION), target, {})
    assert str(changed) == REAL_ROTATION
    assert ComplexToReal().run(Graph.parse(str(changed).replace("c64", "f32")), target, {}).nodes
    verify(changed)
    check_types(changed)


@pytest.mark.parametrize("module", [LlamaRope, WanRope, MadeInside])
def test_published_rotations_lose_their_complex_numbers_and_keep_their_values(
    module: Callable[[], nn.Module], target: Target
) -> None:
    rope, x = module(), torch.randn(2, 16, 4, 8)
    program = trace(rope, {"x": x})
    assert not is_real(program.graph)
    graph = ComplexToReal().run(Clean().run(program.graph, target, {}), target, {})
    verify(graph)
    check_types(graph)
    real = materialize(Program(graph, program.weights))
    assert is_real(real.graph)
    assert agreement.error(real.module()(x), (rope(x),)) < 1e-7


@pytest.mark.parametrize(("module", "whole"), [(LlamaRope, True), (WanRope, False)])
def test_published_rotations_reach_onnx_runtime(
    module: Callable[[], nn.Module], whole: bool, target: Target, tmp_path: Path
) -> None:
    """As one operator in f32; ONNX has none in f64."""
    rope, x = module(), torch.randn(2, 16, 4, 8)
    program, backend = trace(rope, {"x": x}), OnnxBackend()
    prepared = run_passes(backend.passes, program.graph, target)
    built = backend.build(materialize(Program(prepared, program.weights)), target, tmp_path)
    assert ("RotaryEmbedding" in built.info["operators"]) is whole  # type: ignore[operator]
    assert agreement.error(backend.load(tmp_path, built.files)(x), (rope(x),)) < 1e-6


def test_a_rotation_by_complex_numbers_reads_like_one_by_real_numbers(target: Target) -> None:
    program = trace(LlamaRope(), {"x": torch.randn(2, 16, 4, 8)})
    graph = ComplexToReal().run(Clean().run(program.graph, target, {}), target, {})
    found = [rotation for node in graph.nodes if (rotation := Rotation.ending_at(node, graph))]
    assert found == [Rotation("x", "view_1.real", "view_1.imag")]


def test_a_real_graph_stays_as_it_is(mlp: Graph, target: Target) -> None:
    assert ComplexToReal().run(mlp, target, {}) is mlp


def test_running_it_again_changes_nothing(target: Target) -> None:
    once = ComplexToReal().run(Graph.parse(ROTATION), target, {})
    assert ComplexToReal().run(once, target, {}) == once


@pytest.mark.parametrize(
    ("found", "instead", "place", "reason"),
    [
        ("aten.mul.Tensor(self=%z, other=%freqs)", "aten.exp(self=%z)", "t", "aten.exp on complex numbers has no real"),
        ("return %y", "return %t", "t", "a complex output"),
        ("input %pairs", "input %in: c64[2]\n  input %pairs", "in", "a complex input"),
    ],
)
def test_what_has_no_real_form_is_told_and_nothing_is_changed(
    found: str, instead: str, place: str, reason: str, target: Target
) -> None:
    graph = Graph.parse(ROTATION.replace(found, instead))
    refusals = ComplexToReal().refusals(graph, target)
    assert list(refusals) == [place]
    assert refusals[place].startswith(reason)
    assert ComplexToReal().run(graph, target, {}) is graph


def test_it_is_found_by_name() -> None:
    assert find_pass("complex-to-real") == ComplexToReal()
