import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia import kernels
from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.kernels.base import Work
from intarsia.kernels.linear_i4.reference import (
    HIGHEST,
    dequantize_groups,
    linear_i4,
    pack,
    quantize_groups,
    unpack,
)

LAYER = """graph g {
  size N in [1, 64]
  input %x: f32[N, 64]
  param %w: f32[40, 64]
  %q: u8[40, 32], %s: f32[40, 2] = intarsia.quantize_groups(weight=%w, group=32)
  %y: f32[N, 40] = intarsia.linear_i4(input=%x, packed=%q, scale=%s, bias=None, group=32)
  return %y
}
"""


def test_the_even_column_is_in_the_low_nibble() -> None:
    assert pack(torch.tensor([[1, -8, 7, -1]], dtype=torch.int8)).tolist() == [[0x81, 0xF7]]


@given(codes=st.lists(st.integers(-8, 7), min_size=1, max_size=8))
def test_packing_loses_nothing(codes: list[int]) -> None:
    tensor = torch.tensor([codes + codes[::-1]], dtype=torch.int8)
    assert torch.equal(unpack(pack(tensor)), tensor)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_each_group_has_its_own_scale(group: int) -> None:
    weight = torch.ones(3, 128)
    weight[:, :group] *= 100
    packed, scale = quantize_groups(weight, group)
    assert scale.shape == (3, 128 // group)
    torch.testing.assert_close(dequantize_groups(packed, scale, group, torch.float32), weight)


def test_a_group_of_zeros_stays_zeros() -> None:
    packed, scale = quantize_groups(torch.zeros(2, 32), 16)
    assert torch.equal(dequantize_groups(packed, scale, 16, torch.float32), torch.zeros(2, 32))


def test_clipping_beats_the_largest_magnitude() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, scale = quantize_groups(weight, 128)
    error = (dequantize_groups(packed, scale, 128, torch.float32) - weight).square().sum()
    plain = weight.view(64, 2, 128).abs().amax(2, keepdim=True) / HIGHEST
    unclipped = ((weight.view(64, 2, 128) / plain).round() * plain - weight.view(64, 2, 128)).square().sum()
    assert error < 0.95 * unclipped


def test_a_large_weight_is_rounded_like_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize_groups(weight, 32)
    monkeypatch.setattr("intarsia.kernels.linear_i4.reference.CHUNK", 64)
    assert all(map(torch.equal, whole, quantize_groups(weight, 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_is_that_of_the_dequantized_weight_in_the_inputs_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    packed, scale = quantize_groups(torch.randn(24, 64, generator=generator), 32)
    x, bias = torch.randn(2, 5, 64, generator=generator).to(dtype), torch.randn(24, generator=generator).to(dtype)
    weight = (unpack(packed).float() * scale.repeat_interleave(32, dim=1)).to(dtype)
    y = linear_i4(x, packed, scale, bias, 32)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


def test_work_counts_the_product_and_the_packed_weight() -> None:
    graph = Graph.parse(LAYER)
    quantize, linear = graph.nodes
    moved = 4 * 10 * 64 + 40 * 32 + 4 * 40 * 2 + 4 * 10 * 40
    assert kernels.work(linear, graph, {"N": 10}) == Work(2.0 * 10 * 40 * 64, "f32", moved)
    assert kernels.work(quantize, graph, {"N": 10}) == Work(0.0, "f32", 4 * 40 * 64 + 40 * 32 + 4 * 40 * 2)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (32, None),
        (64, None),
        (128, "64 columns are no multiple of group 128"),
        (16, "group is 16; intarsia.quantize_groups takes 32, 64, 128, 256"),
        (48, "group is 48; intarsia.quantize_groups takes 32, 64, 128, 256"),
    ],
)
def test_why_not_is_exact_at_its_borders(group: int, reason: str | None, target: Target) -> None:
    graph = Graph.parse(LAYER.replace("group=32", f"group={group}"))
    assert kernels.why_not(graph.nodes[0], graph, target) == reason


def test_why_not_refuses_weights_that_inputs_make(target: Target) -> None:
    graph = Graph.parse(LAYER.replace("param %w", "input %w"))
    reason = "weight depends on the model's inputs; only weights are rounded at build time"
    assert kernels.why_not(graph.nodes[0], graph, target) == reason


def test_the_fake_kernel_refuses_columns_that_the_group_does_not_divide() -> None:
    kernels.register()
    with pytest.raises(RuntimeError, match="48 columns are no multiple of group 32"):
        torch.ops.intarsia.quantize_groups(torch.zeros(4, 48, device="meta"), 32)


def test_a_group_that_no_kernel_has_is_refused_when_it_runs() -> None:
    kernels.register()
    with pytest.raises(RuntimeError, match="group is 16; it is one of 32, 64, 128, 256"):
        torch.ops.intarsia.quantize_groups(torch.zeros(4, 32), 16)
    with pytest.raises(RuntimeError, match="group is 16; it is one of 32, 64, 128, 256"):
        torch.ops.intarsia.linear_i4(
            torch.zeros(1, 32), torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2), None, 16
        )
