from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from intarsia.flow import trace
from intarsia.ir.errors import SpecError
from intarsia.ir.execute import check_types
from intarsia.ir.exported import export_program
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import find_pass
from intarsia.passes.cast_floats import CastFloats
from intarsia.passes.clean import Clean
from intarsia.passes.fuse_kernels import FuseKernels
from intarsia.passes.quantize_linear import QuantizeLinear

GOLDEN = Path(__file__).parent.parent / "golden"

TIMESTEP = """graph timestep {
  size N in [2, 64]
  input %t: f32[N, 1]
  param %frequency: f32[]
  param %w: f32[8, 4]
  %a: f32[N, 4] = aten.expand(self=%t, size=[-1, 4])
  %m: f32[N, 4] = aten.mul.Tensor(self=%a, other=%frequency)
  %s: f32[N, 4] = aten.sin(self=%m)
  %y: f32[N, 8] = aten.linear(input=%s, weight=%w, bias=None)
  %n: f32[N, 8] = aten.relu(self=%y)
  return %n
}
"""


def lines(graph: Graph) -> list[str]:
    return [line.strip() for line in str(graph).splitlines() if " = " in line]


def error(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm())


def test_activations_are_cast_where_they_meet_a_cast_parameter(target: Target) -> None:
    assert (
        str(CastFloats().run(Graph.parse(TIMESTEP), target, {}))
        == """graph timestep {
  size N in [2, 64]
  input %t: f32[N, 1]
  param %frequency: f32[]
  param %w: f32[8, 4]
  %a: f32[N, 4] = aten.expand(self=%t, size=[-1, 4])
  %m: f32[N, 4] = aten.mul.Tensor(self=%a, other=%frequency)
  %s: f32[N, 4] = aten.sin(self=%m)
  %s.f16: f16[N, 4] = aten._to_copy(self=%s, dtype=torch.float16)
  %w.f16: f16[8, 4] = aten._to_copy(self=%w, dtype=torch.float16)
  %y: f16[N, 8] = aten.linear(input=%s.f16, weight=%w.f16, bias=None)
  %n.f16: f16[N, 8] = aten.relu(self=%y)
  %n: f32[N, 8] = aten._to_copy(self=%n.f16, dtype=torch.float32)
  return %n
}
"""
    )


def test_a_cast_that_converts_makes_an_island_and_one_that_does_not_follows_its_input(target: Target) -> None:
    graph = Graph.parse("""graph islands {
  input %x: bf16[4, 8]
  param %w: f32[8, 8]
  %wide: f32[4, 8] = aten._to_copy(self=%x, dtype=torch.float32)
  %square: f32[4, 8] = aten.mul.Tensor(self=%wide, other=%wide)
  %y: f32[4, 8] = aten.linear(input=%square, weight=%w, bias=None)
  %same: f32[4, 8] = aten.to.dtype(self=%y, dtype=torch.float32)
  %alike: f32[4, 8] = aten.type_as(self=%same, other=%wide)
  %sum: f32[4] = aten.sum.dim_IntList(self=%alike, dim=[1], dtype=torch.float32)
  %z: bf16[4, 8] = aten.type_as(self=%alike, other=%x)
  return %z, %sum
}
""")
    assert lines(CastFloats("bf16").run(graph, target, {})) == [
        "%wide: f32[4, 8] = aten._to_copy(self=%x, dtype=torch.float32)",
        "%square: f32[4, 8] = aten.mul.Tensor(self=%wide, other=%wide)",
        "%square.bf16: bf16[4, 8] = aten._to_copy(self=%square, dtype=torch.bfloat16)",
        "%w.bf16: bf16[8, 8] = aten._to_copy(self=%w, dtype=torch.bfloat16)",
        "%y: bf16[4, 8] = aten.linear(input=%square.bf16, weight=%w.bf16, bias=None)",
        "%same: bf16[4, 8] = aten._to_copy(self=%y, dtype=torch.bfloat16)",
        "%alike: bf16[4, 8] = aten._to_copy(self=%same, dtype=torch.bfloat16)",
        "%sum: f32[4] = aten.sum.dim_IntList(self=%alike, dim=[1], dtype=torch.float32)",
        "%z: bf16[4, 8] = aten.type_as(self=%alike, other=%x)",
    ]


def test_what_has_the_other_sixteen_bits_is_cast_where_it_meets_the_asked_ones(target: Target) -> None:
    graph = Graph.parse("""graph both {
  input %x: bf16[4, 8]
  param %w: f32[8, 8]
  %wide: f32[4, 8] = aten._to_copy(self=%x, dtype=torch.float32)
  %sum: f32[4, 8] = aten.add.Tensor(self=%x, other=%wide)
  %y: f32[4, 8] = aten.linear(input=%sum, weight=%w, bias=None)
  return %y
}
""")
    cast = CastFloats("f16").run(graph, target, {})
    check_types(cast)
    assert [cast.type(name).dtype for name in ("sum", "y.f16", "y")] == ["bf16", "f16", "f32"]


def test_integers_and_untouched_interfaces_stay(target: Target) -> None:
    graph = Graph.parse("""graph lookup {
  input %i: i64[3]
  input %x: f32[3, 4]
  param %table: f32[10, 4]
  param %offset: i64[3]
  %j: i64[3] = aten.add.Tensor(self=%i, other=%offset)
  %y: f32[3, 4] = aten.embedding(weight=%table, indices=%j)
  return %y, %x, %table, %j
}
""")
    cast = CastFloats().run(graph, target, {})
    check_types(cast)
    assert lines(cast) == [
        "%j: i64[3] = aten.add.Tensor(self=%i, other=%offset)",
        "%table.f16: f16[10, 4] = aten._to_copy(self=%table, dtype=torch.float16)",
        "%y.f16: f16[3, 4] = aten.embedding(weight=%table.f16, indices=%j)",
        "%y: f32[3, 4] = aten._to_copy(self=%y.f16, dtype=torch.float32)",
    ]
    assert cast.outputs == graph.outputs


def test_cleaning_before_and_after_gives_the_same_element_types(target: Target) -> None:
    traced = Graph.parse((GOLDEN / "wan-block-dynamic.traced.graph").read_text())
    before = CastFloats().run(Clean().run(traced, target, {}), target, {})
    after = Clean().run(CastFloats().run(traced, target, {}), target, {})
    shared = before.producers.keys() & after.producers.keys()
    assert len(shared) > 0.9 * len(before.nodes)
    assert all(before.values[name] == after.values[name] for name in shared)


def test_what_pytorch_cannot_do_in_sixteen_bits_stays_as_it_was(target: Target) -> None:
    graph = Graph.parse("""graph complex {
  input %x: f32[4, 2]
  param %w: f32[2, 2]
  %y: f32[4, 2] = aten.linear(input=%x, weight=%w, bias=None)
  %c: c64[4] = aten.view_as_complex(self=%y)
  %r: f32[4, 2] = aten.view_as_real(self=%c)
  return %r
}
""")
    cast = CastFloats().run(graph, target, {})
    check_types(cast)
    assert cast.producers["c"].ref("self") == "y.f32"
    assert cast.type("c").dtype == "c64"


def test_names_that_are_taken_are_not_taken_again(target: Target) -> None:
    cast = CastFloats().run(Graph.parse(TIMESTEP.replace("%a", "%w.f16").replace("%y", "%n.f16")), target, {})
    verify(cast)
    assert {"w.f16_", "n.f16_"} <= cast.producers.keys()


def test_scales_of_narrow_weights_stay_f32_and_weights_are_rounded_as_given(
    mlp: Graph, target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    rounded = QuantizeLinear().run(mlp, target, {"up": "i8", "down": "i4(group=32)"})
    cast = CastFloats().run(rounded, target, {})
    check_types(cast)
    assert [cast.type(name).dtype for name in ("up.scale", "down.scale", "up", "down")] == ["f32", "f32", "f16", "f16"]
    assert {"up.weight.f16", "down.weight.f16"}.isdisjoint(cast.values)
    before, after = Program(rounded, with_weights(mlp).weights), Program(cast, with_weights(mlp).weights)
    inputs = example_inputs(mlp)
    assert 0 < error(before.module()(*inputs)[0], after.module()(*inputs)[0]) < 2e-3


def test_another_element_type_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="dtype is 'f8e4m3'; it is one of f16, bf16"):
        find_pass("cast-floats(dtype='f8e4m3')")


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 2e-3), ("bf16", 2e-2)])
def test_wan_mini_in_sixteen_bits_stays_close_and_casts_once(
    dtype: str, bound: float, target: Target, wan_mini: Program
) -> None:
    program = wan_mini
    cast = CastFloats(dtype).run(program.graph, target, {})
    check_types(cast)
    assert CastFloats(dtype).run(cast, target, {}) is cast
    assert cast.type("condition_embedder.timesteps_proj.sin").dtype == "f32"
    assert cast.type("blocks.5.ffn.net.2.linear").dtype == dtype
    built = materialize(Program(cast, program.weights))
    assert not set(built.graph.params) & set(program.graph.params)
    inputs = example_inputs(program.graph)
    assert 0 < error(program.module()(*inputs)[0], built.module()(*inputs)[0]) < bound


def test_kernels_that_are_fused_already_keep_their_tables_in_f32(target: Target, wan_mini: Program) -> None:
    fused = FuseKernels(everywhere=True).run(wan_mini.graph, target, {})
    cast = CastFloats("f16").run(fused, target, {})
    check_types(cast)
    rotated = next(cast.find("intarsia.norm_rope"))
    assert [cast.type(rotated.ref(arg)).dtype for arg in ("input", "weight", "cos")] == ["f16", "f16", "f32"]
    inputs = example_inputs(fused)
    found = Program(cast, wan_mini.weights).module()(*inputs)[0]
    assert 0 < error(wan_mini.module()(*inputs)[0], found) < 2e-3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = torch.relu(y + self.norm(y))
        pooled: torch.Tensor = self.head(nn.functional.max_pool2d(y, 2).mean((2, 3)))
        return pooled


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_convolutional_network_runs_and_goes_back_through_torch_export(dtype: str, target: Target) -> None:
    program = trace(Residual().eval(), inputs={"x": torch.randn(2, 3, 8, 8)})
    cast = Program(CastFloats(dtype).run(program.graph, target, {}), program.weights)
    check_types(cast.graph)
    inputs = example_inputs(program.graph)
    assert 0 < error(program.module()(*inputs)[0], cast.module()(*inputs)[0]) < 2e-2
    assert torch.equal(export_program(cast).module()(*inputs)[0], cast.module()(*inputs)[0])
