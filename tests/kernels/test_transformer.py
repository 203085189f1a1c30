"""What the operators of a transformer's block compute, said in another way, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.kernels.attention.reference import attention
from intarsia.kernels.base import Work
from intarsia.kernels.gated_residual.reference import gated_residual
from intarsia.kernels.modulated_norm.reference import modulated_norm
from intarsia.kernels.norm_rope.reference import norm_rope

BLOCK = """graph g {
  size N in [1, 64]
  input %x: bf16[2, N, 96]
  input %scale: f32[2, 1, 96]
  input %cos: f32[N, 16]
  input %lengths: i64[2]
  %n: bf16[2, N, 96] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%scale, shift=%scale, eps=1e-06)
  %q: bf16[2, N, 3, 32] = intarsia.norm_rope(input=%n, weight=None, cos=%cos, sin=%cos, heads=3, eps=1e-06)
  %h: bf16[2, 3, N, 32] = aten.permute(self=%q, dims=[0, 2, 1, 3])
  %a: bf16[2, 3, N, 32] = intarsia.attention(query=%h, key=%h, value=%h, lengths=%lengths, scale=None)
  %y: bf16[2, N, 96] = intarsia.gated_residual(residual=%x, input=%n, gate=%scale)
  return %a, %y
}
"""
BROADCAST = "(B or 1, N or 1, C) and (B, N, C)"
GPU = Target("gpu", "a GPU for tests", "cuda", "sm_90", {"f32": 1e9}, 1e9, 10**9, 0.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_keys_beyond_the_length_change_nothing() -> None:
    query, key, value = (random(2, 3, 5, 8, seed=seed) for seed in range(3))
    found = attention(query, key, value, torch.tensor([2, 9]), 0.3)
    for batch, keys in ((0, 2), (1, 5)):
        weights = torch.softmax(0.3 * query[batch] @ key[batch, :, :keys].mT, dim=-1)
        torch.testing.assert_close(found[batch], weights @ value[batch, :, :keys])


def test_a_query_without_keys_gives_zeros() -> None:
    query = random(1, 2, 5, 8)
    assert not attention(query, query, query, torch.tensor([0]), None).any()


def test_the_heads_of_a_token_lie_side_by_side() -> None:
    kernels.register()
    query = random(1, 2, 5, 8)
    for device in ("cpu", "meta"):
        result = torch.ops.intarsia.attention(*[query.to(device)] * 3, None, None)
        assert result.transpose(1, 2).is_contiguous()


def test_modulation_follows_the_affine_norm() -> None:
    x, weight, bias, scale, shift = random(2, 5, 8), random(8), random(8), random(2, 1, 8), random(1, 1, 8)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    found = modulated_norm(x, weight, bias, scale, shift, 1e-3)
    torch.testing.assert_close(found, normed * (1 + scale) + shift)


def test_a_gate_in_f32_is_not_rounded_before_the_sum() -> None:
    residual, x, gate = torch.ones(1, 1, 1).half(), torch.full((1, 1, 1), 2048.0).half(), torch.tensor([[[1 / 4097]]])
    assert gated_residual(residual, x, gate).item() == torch.tensor(1 + 2048 / 4097).half().item()


def test_neighbouring_channels_turn_as_complex_numbers() -> None:
    x, weight, angles = random(2, 5, 24), random(24, seed=1), random(5, 4, seed=2)
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    turned = torch.view_as_complex(normed.view(2, 5, 3, 4, 2)) * torch.polar(torch.ones(5, 4), angles)[:, None]
    found = norm_rope(x, weight, angles.cos(), angles.sin(), 3, 1e-6)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(3))


def test_work_counts_the_products_of_attention_and_moves_the_rest_once() -> None:
    graph = Graph.parse(BLOCK)
    works = [kernels.work(node, graph, {"N": 10}) for node in graph.nodes if node.op.startswith("intarsia.")]
    rows, scale, table, head = 2 * 2 * 10 * 96, 4 * 2 * 96, 4 * 10 * 16, 2 * 2 * 3 * 10 * 32
    assert works == [
        Work(0.0, "bf16", 2 * rows + scale),
        Work(0.0, "bf16", rows + table + head),
        Work(4.0 * 2 * 3 * 10 * 10 * 32, "bf16", 2 * head + 8 * 2),
        Work(0.0, "bf16", 3 * rows + scale),
    ]


@pytest.mark.parametrize("machine", ["null", "cuda"])
def test_why_not_takes_the_block_on_every_machine(machine: str, target: Target) -> None:
    graph = Graph.parse(BLOCK)
    reasons = [kernels.why_not(node, graph, GPU if machine == "cuda" else target) for node in graph.nodes]
    assert reasons == [None] * 5


@pytest.mark.parametrize(
    ("found", "instead", "name", "reason"),
    [
        ("%scale: f32[2, 1, 96]", "%scale: f32[3, 1, 96]", "n",
         f"scale is f32[3, 1, 96], input bf16[2, N, 96]; intarsia.modulated_norm takes {BROADCAST}"),
        ("%scale: f32[2, 1, 96]", "%scale: f32[2, 96]", "y",
         f"gate is f32[2, 96], residual bf16[2, N, 96]; intarsia.gated_residual takes {BROADCAST}"),
        ("heads=3", "heads=5", "q", "96 channels are no 5 heads of pairs"),
        ("%cos: f32", "%cos: bf16", "q", "cos is bf16; intarsia.norm_rope takes f32"),
        ("%lengths: i64", "%lengths: f32", "a", "lengths is f32; intarsia.attention takes i32, i64"),
        ("residual=%x", "residual=%cos", "y",
         "residual is f32[N, 16], input bf16[2, N, 96]; intarsia.gated_residual takes equal extents"),
        ("key=%h", "key=%q", "a",
         "query is bf16[2, 3, N, 32], key bf16[2, N, 3, 32], value bf16[2, 3, N, 32]; "
         "intarsia.attention takes (B, H, S, D) and twice (B, H, T, D)"),
    ],
)  # fmt: skip
def test_why_not_says_what_fits_nowhere(found: str, instead: str, name: str, reason: str, target: Target) -> None:
    graph = Graph.parse(BLOCK.replace(found, instead))
    assert kernels.why_not(graph.producers[name], graph, target) == reason


@pytest.mark.parametrize(
    ("found", "instead", "name", "reason"),
    [
        (", 96]", ", 16386]", "n",
         "input has 16386 channels; on a GPU intarsia.modulated_norm takes a fixed number up to 16,384"),
        ("bf16", "f64", "q", "input is f64; intarsia.norm_rope takes f32, f16, bf16"),
        ("N, 32]", "N, 48]", "a", "a head has 48 channels; on a GPU intarsia.attention takes 32, 64, 128"),
    ],
)  # fmt: skip
def test_why_not_says_what_fits_no_kernel_of_a_gpu(
    found: str, instead: str, name: str, reason: str, target: Target
) -> None:
    graph = Graph.parse(BLOCK.replace(found, instead))
    assert kernels.why_not(graph.producers[name], graph, GPU) == reason
    assert kernels.why_not(graph.producers[name], graph, target) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x: ops.attention(x, x, x, None, None), r"query is \(B, H, S, D\), found 3 axes"),
        (lambda ops, x: ops.attention(x[None], x[None], x[None, :, :, :4], None, None), r"value is \(1, 2, 5, 8\)"),
        (lambda ops, x: ops.attention(x[None], x[None].half(), x[None], None, None), "key is torch.float32"),
        (lambda ops, x: ops.modulated_norm(x, x[0, 0, :3], None, x, x, 1e-6), r"weight is \(8,\)"),
        (lambda ops, x: ops.modulated_norm(x, None, None, x[:, :2], x, 1e-6), r"scale is \(2, 5, 8\) or 1 in"),
        (lambda ops, x: ops.gated_residual(x, x[:1], x), r"input is \(2, 5, 8\), found \(1, 5, 8\)"),
        (lambda ops, x: ops.gated_residual(x, x, x[..., :4]), "gate ends in 8, found 4"),
        (lambda ops, x: ops.norm_rope(x, None, x[0], x[0], 3, 1e-6), "8 channels are no 3 heads of pairs"),
        (lambda ops, x: ops.norm_rope(x, None, x[0], x[0], 2, 1e-6), r"cos is \(5, 2\), found \(5, 8\)"),
    ],
)  # fmt: skip
def test_fake_kernels_say_what_does_not_fit(call: Callable[[Any, Tensor], Tensor], message: str) -> None:
    kernels.register()
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.intarsia, torch.zeros(2, 5, 8, device="meta"))
