"""Cleaning a real trace: the traced texts in tests/golden are Wan blocks of diffusers as torch.export gives them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from intarsia.ir.execute import check_types
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import find_pass
from intarsia.passes.clean import Clean

GOLDEN = Path(__file__).parent.parent / "golden"
TRACES = ("wan-block-bf16", "wan-block-dynamic")


def traced(name: str) -> Graph:
    return Graph.parse((GOLDEN / f"{name}.traced.graph").read_text())


@pytest.mark.parametrize("name", TRACES)
def test_a_traced_block_becomes_this(name: str, target: Target, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.clean.graph", str(Clean().run(traced(name), target, {})))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("wan-block-bf16", {}),
        ("wan-block-dynamic", {}),
        ("wan-block-dynamic", {"batch": 1, "frames": 1, "height": 2, "width": 2, "text": 1}),
        ("wan-block-dynamic", {"batch": 3, "frames": 2, "height": 5, "width": 3, "text": 7}),
    ],
)
def test_a_cleaned_graph_gives_the_same_bits(
    name: str, sizes: Mapping[str, int], target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    program = with_weights(traced(name))
    cleaned = Program(Clean().run(program.graph, target, {}), program.weights)
    inputs = example_inputs(program.graph, sizes)
    assert torch.equal(program.module()(*inputs)[0], cleaned.module()(*inputs)[0])


@pytest.mark.parametrize("name", TRACES)
def test_a_cleaned_graph_is_valid_and_clean(name: str, target: Target) -> None:
    cleaned = Clean().run(traced(name), target, {})
    verify(cleaned)
    check_types(cleaned)
    assert Clean().run(cleaned, target, {}) is cleaned


@pytest.mark.parametrize("name", TRACES)
def test_nothing_that_only_traces_need_is_left(name: str, target: Target) -> None:
    cleaned = Clean().run(traced(name), target, {})
    unwanted = ("aten.slice_scatter", "aten.copy", "aten.empty_like", "aten._unsafe_view", "aten.dropout", "aten.alias")
    assert not list(cleaned.find(*unwanted))
    assert len(list(cleaned.find("aten.clone"))) <= 2  # patches to tokens and back: each moves memory


def test_it_is_found_by_name() -> None:
    assert find_pass("clean") == Clean()


def test_a_cleaned_trace_gives_the_same_bits_as_the_module_it_came_from(target: Target) -> None:
    diffusers = pytest.importorskip("diffusers")
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "patch_size": (1, 2, 2), "rope_max_seq_len": 16}
    widths = {"in_channels": 3, "out_channels": 3, "text_dim": 8, "freq_dim": 16, "ffn_dim": 64, "num_layers": 1}
    module = diffusers.WanTransformer3DModel(**heads, **widths, cross_attn_norm=True).eval()
    inputs = {
        "hidden_states": torch.randn(1, 3, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 8),
    }
    program = trace(module, inputs, static={"return_dict": False})
    cleaned = Program(Clean().run(program.graph, target, {}), program.weights)
    with torch.no_grad():
        (expected,) = module(**inputs, return_dict=False)
    assert torch.equal(cleaned.module()(*inputs.values())[0], expected)
    assert len(cleaned.graph.nodes) < len(program.graph.nodes) - 25
