import pytest
import torch

from intarsia import kernels
from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.kernels.base import Work
from intarsia.kernels.linear_i8.reference import dequantize_rows, linear_i8, quantize_rows

LAYER = """graph g {
  size N in [1, 64]
  input %x: bf16[N, 48]
  param %w: bf16[40, 48]
  param %b: bf16[40]
  %q: i8[40, 48], %s: f32[40] = intarsia.quantize_rows(weight=%w)
  %y: bf16[N, 40] = intarsia.linear_i8(input=%x, weight=%q, scale=%s, bias=%b)
  return %y
}
"""


def test_a_row_is_rounded_to_127_steps_of_its_largest_magnitude() -> None:
    codes, scale = quantize_rows(torch.tensor([[127.0, -63.4, 0.6, 0.0], [0.5, -2.0, 1.0, 2.0]]))
    assert codes.tolist() == [[127, -63, 1, 0], [32, -127, 64, 127]]
    torch.testing.assert_close(scale, torch.tensor([1.0, 2.0 / 127]))


def test_a_row_of_zeros_stays_zeros() -> None:
    codes, scale = quantize_rows(torch.zeros(2, 4))
    assert not codes.any()
    assert torch.equal(dequantize_rows(codes, scale, torch.float32), torch.zeros(2, 4))


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_rows(weight)
    off = (dequantize_rows(codes, scale, torch.float32) - weight).abs()
    assert (off <= 0.5001 * scale[:, None]).all()
    assert codes.abs().max() == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_is_that_of_the_dequantized_weight_in_the_inputs_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, scale = quantize_rows(torch.randn(24, 32, generator=generator))
    x, bias = torch.randn(2, 5, 32, generator=generator).to(dtype), torch.randn(24, generator=generator).to(dtype)
    weight = (codes.float() * scale[:, None]).to(dtype)
    y = linear_i8(x, codes, scale, bias)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


def test_work_counts_the_product_and_the_weight_in_eight_bits() -> None:
    graph = Graph.parse(LAYER)
    quantize, linear = graph.nodes
    read = 2 * 10 * 48 + 40 * 48 + 4 * 40 + 2 * 40
    assert kernels.work(linear, graph, {"N": 10}) == Work(2.0 * 10 * 40 * 48, "bf16", read + 2 * 10 * 40)
    assert kernels.work(quantize, graph, {"N": 10}) == Work(0.0, "f32", 2 * 40 * 48 + 40 * 48 + 4 * 40)


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        (
            "param %w: bf16[40, 48]",
            "param %w: bf16[40, 6, 8]",
            "weight is bf16[40, 6, 8]; intarsia.quantize_rows takes a matrix",
        ),
        (
            "param %w: bf16[40, 48]",
            "param %w: bf16[40, N]",
            "weight is bf16[40, N]; intarsia.quantize_rows takes fixed extents",
        ),
        ("param %w: bf16", "param %w: i32", "weight is i32; intarsia.quantize_rows takes f32, f16, bf16"),
        ("param %w", "input %w", "weight depends on the model's inputs; only weights are rounded at build time"),
    ],
)
def test_why_not_says_what_it_found_and_what_it_takes(found: str, instead: str, reason: str, target: Target) -> None:
    graph = Graph.parse(LAYER.replace(found, instead))
    assert kernels.why_not(graph.nodes[0], graph, target) == reason


def test_why_not_takes_the_layer_and_refuses_integers(target: Target) -> None:
    graph = Graph.parse(LAYER)
    assert [kernels.why_not(node, graph, target) for node in graph.nodes] == [None, None]
    graph = Graph.parse(LAYER.replace("input %x: bf16", "input %x: i8"))
    assert kernels.why_not(graph.nodes[1], graph, target) == "input is i8; intarsia.linear_i8 takes f32, f16, bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 9), torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4), None), "input ends in 8, found 9"),
        ((torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4), None), "weight is int8"),
        ((torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.int8), torch.zeros(3), None), r"scale is \(4,\)"),
        ((torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4), torch.zeros(3)), r"bias is \(4,\)"),
    ],
)
def test_the_fake_kernel_refuses_what_does_not_fit(arguments: tuple[torch.Tensor | None, ...], message: str) -> None:
    kernels.register()
    on_meta = [None if tensor is None else tensor.to("meta") for tensor in arguments]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.intarsia.linear_i8(*on_meta)
