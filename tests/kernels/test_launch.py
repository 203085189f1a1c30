"""How a kernel is launched, as data: expressions of sizes, layouts, strides, and what operands must be."""

import pytest
import torch

from intarsia import kernels
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.sizes import evaluate
from intarsia.ir.types import TensorType
from intarsia.kernels import launch
from intarsia.kernels.launch import Launch, launch_of

pytest.importorskip("triton")

ATTENTION = """graph g {
  size N in [1, 200000]
  input %q: bf16[2, 12, 2*N, 128]
  input %k: bf16[2, 12, N, 128]
  input %v: bf16[2, 12, N, 128]
  %y: bf16[2, 12, 2*N, 128] = intarsia.attention(query=%q, key=%k, value=%v, lengths=None, scale=None)
  return %y
}
"""
GATE = """graph g {
  input %r: f16[1, 4, 48]
  input %x: f16[1, 4, 48]
  input %g: f16[1, 4, 48]
  %y: f16[1, 4, 48] = intarsia.gated_residual(residual=%r, input=%x, gate=%g)
  return %y
}
"""


def first_launch(text: str, architecture: str = "sm_90") -> Launch:
    graph = Graph.parse(text)
    found = launch_of(graph.nodes[0], graph, architecture)
    assert found is not None
    return found


def test_a_launch_says_all_that_a_launcher_needs_in_terms_of_the_graphs_sizes() -> None:
    found = first_launch(ATTENTION)
    assert found.kernel == "intarsia.kernels.attention.triton:_attention"
    assert found.arguments[:5] == ("query", "key", "value", "output", "stride(query, 0)")
    assert found.arguments[-3:] == ("12", "2*N", "N")
    assert found.types == (*("*bf16",) * 4, *("i64", "i64", "i32") * 3, "i32", "i32", "i32")
    assert found.constants["lengths_ptr"] is None
    assert [evaluate(extent, {"N": 100}) for extent in found.grid] == [2, 24, 1]
    assert found.results == {"output": TensorType("bf16", (2, 12, "2*N", 128))}
    assert found.layouts == {"output": (0, 2, 1, 3)}
    assert launch.runtime_parameters(found)[:4] == ("q_ptr", "k_ptr", "v_ptr", "y_ptr")


@pytest.mark.parametrize(("architecture", "queries"), [("sm_80", 128), ("sm_100", 128), ("gfx942", 128)])
def test_an_architecture_has_a_tile_of_its_own(architecture: str, queries: int) -> None:
    assert first_launch(ATTENTION, architecture).constants["block_m"] == queries
    single = ATTENTION.replace("bf16", "f32")
    assert first_launch(single, architecture).constants["block_m"] == 64


def test_tokens_of_one_head_lie_side_by_side_in_the_result() -> None:
    (result,) = launch.allocate(first_launch(ATTENTION), {"N": 3}, torch.device("cpu")).values()
    assert result.shape == (2, 12, 6, 128)
    assert result.transpose(1, 2).is_contiguous()


def test_strided_operands_are_read_in_place_where_the_kernel_is_told_strides() -> None:
    fused = torch.randn(1, 4, 3 * 48)[..., 48:96].half()
    chunk = torch.randn(1, 4, 96).half()[..., 48:]
    found = first_launch(GATE)
    prepared = launch.prepare(found, {"residual": fused, "input": fused, "gate": chunk})
    assert prepared["gate"].data_ptr() == chunk.data_ptr()
    assert prepared["residual"].is_contiguous()
    results = launch.allocate(found, {}, torch.device("cpu"))
    assert found.arguments == ("residual", "input", "gate", "output", "0", "stride(gate, 1)", "4")
    assert launch.values(found, {**prepared, **results}, {})[4:] == [0, 96, 4]


@pytest.mark.parametrize(
    "gate",
    [
        torch.randn(1, 48, 4).half().transpose(1, 2),
        torch.randn(1, 4, 52).half()[..., :48],
        torch.randn(1, 4, 96).half()[..., 4:52],
    ],
    ids=["the last axis is no row", "a stride is no multiple of 16", "it starts inside 16 bytes"],
)
def test_an_operand_that_breaks_what_compiled_code_relies_on_is_copied(gate: torch.Tensor) -> None:
    prepared = launch.prepare(first_launch(GATE), {"gate": gate})["gate"]
    assert prepared.data_ptr() != gate.data_ptr()
    assert prepared.data_ptr() % 16 == prepared.stride(1) % 16 == 0
    assert torch.equal(prepared, gate)


def test_operators_without_a_kernel_have_no_launch() -> None:
    graph = Graph.parse(
        "graph g {\n  input %x: f32[4]\n  %y: i8[4] = intarsia.quantize_static(input=%x, scale=0.5)\n  return %y\n}\n"
    )
    assert launch_of(graph.nodes[0], graph, "sm_90") is None


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        ("128]", "96]", "a head has 96 channels; on a GPU intarsia.attention takes 32, 64, 128"),
        ("bf16", "f64", "query is f64; intarsia.attention takes f32, f16, bf16"),
        ("scale=None", "scale=-0.5", "scale is -0.5; on a GPU intarsia.attention takes a positive number"),
    ],
)
def test_what_no_kernel_takes_is_refused_and_nothing_runs_in_its_place(found: str, instead: str, reason: str) -> None:
    with pytest.raises(Unsupported) as refused:
        first_launch(ATTENTION.replace(found, instead))
    assert str(refused.value) == f"%y: intarsia.attention has no kernel for sm_90: {reason}"


def test_an_eager_call_is_refused_alike() -> None:
    kernels.register()
    heads = torch.zeros(1, 2, 5, 96)
    case = {"query": heads, "key": heads, "value": heads, "lengths": None, "scale": None}
    with pytest.raises(Unsupported, match="a head has 96 channels"):
        launch.run("intarsia.attention", case)


def test_expressions_cover_extents() -> None:
    assert evaluate(launch.cdiv("2*N", 128), {"N": 65}) == 2
    assert evaluate(launch.product(("N", 3, "H//2")), {"N": 5, "H": 4}) == 30
    assert launch.product((2, 3)) == "6"


@pytest.mark.parametrize(
    ("tokens", "tile"), [(1, (16, 32)), (16, (16, 32)), (17, (64, 128)), (65, (128, 128)), ("N", (128, 128))]
)
def test_a_product_of_few_tokens_has_a_small_tile(tokens: int | str, tile: tuple[int, int]) -> None:
    assert launch.product_tile(launch.product((1, tokens)), 128) == tile
