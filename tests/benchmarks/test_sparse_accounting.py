"""The paper's accounting: its rule on sites of a trace, and the figures that are kept."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import torch

from intarsia.ir.graph import Graph
from intarsia.ir.target import load_target
from intarsia.ir.tokens import TokenLayout
from intarsia.models import find
from intarsia.passes.attention_sites import Site, sites
from intarsia.search.roofline import predict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

BLOCK = """graph block {
  input %video: bf16[1, 128, 4, 8, 8]
  param %weight: bf16[128, 128]
  %flat: bf16[1, 128, 256] = aten.view(self=%video, size=[1, 128, 256])
  %tokens: bf16[1, 256, 128] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
  %to_q: bf16[1, 256, 128] = aten.linear(input=%tokens, weight=%weight, bias=None)
  %heads: bf16[1, 256, 4, 32] = aten.view(self=%to_q, size=[1, 256, 4, 32])
  %q: bf16[1, 4, 256, 32] = aten.permute(self=%heads, dims=[0, 2, 1, 3])
  %y: bf16[1, 4, 256, 32] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  return %y
}
"""


@pytest.fixture
def accounting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("sparse_accounting")


def blocks(layout: TokenLayout, *, heads: int, head_dim: int, layers: int) -> tuple[Site, ...]:
    site = Site("y", "q", "k", "v", heads, head_dim, layout, None)
    return tuple(replace(site, name=f"y{layer}") for layer in range(layers))


def test_the_rule_gives_the_papers_pflops_at_its_three_sizes(accounting: ModuleType) -> None:
    found = {
        "cogvideox15": blocks(TokenLayout(11, 48, 85, before=226), heads=48, head_dim=64, layers=42),
        "hunyuan": blocks(TokenLayout(33, 45, 80, after=256), heads=24, head_dim=128, layers=60),
        "wan21": blocks(TokenLayout(21, 45, 80), heads=40, head_dim=128, layers=40),
    }
    for key, run in accounting.RUNS.items():
        dense = run.calls * sum(accounting.rule(found[key], run.tokens)) / 1e15
        assert dense == pytest.approx(run.published.dense, rel=0.005)


def test_the_rules_attention_is_what_the_trace_counts(accounting: ModuleType) -> None:
    graph = Graph.parse(BLOCK)
    attention, linear = accounting.rule(sites(graph))
    assert accounting.attention_flops(sites(graph), graph) == attention == 4 * 256**2 * 128
    assert linear == 2 * 256 * 12 * 128**2


def test_densities_count_the_steps_that_stay_dense(accounting: ModuleType) -> None:
    densities = {key: run.average_density for key, run in accounting.RUNS.items()}
    assert densities == pytest.approx({"cogvideox15": 0.265, "hunyuan": 0.320, "wan21": 0.438}, abs=0.0005)


def test_sparse_seconds_lose_attentions_products_and_keep_its_bytes(accounting: ModuleType) -> None:
    graph, target = Graph.parse(BLOCK), load_target("a800")
    dense = predict(graph, target).seconds
    assert accounting.seconds(graph, target, sites(graph), 1.0) == pytest.approx(dense)
    slow = replace(target, flops={**target.flops, "bf16": 1e9})
    product = 4 * 256**2 * 128 / 1e9
    saved = predict(graph, slow).seconds - accounting.seconds(graph, slow, sites(graph), 0.25)
    assert saved == pytest.approx(0.75 * product)
    moved = 4 * 256 * 128 * 2 / 2 / target.bandwidth  # query, key and value are one tensor here
    attention = predict(graph, target).nodes["y"].seconds
    assert dense - accounting.seconds(graph, target, sites(graph), 0.0) == pytest.approx(
        attention - target.launch - moved
    )


@pytest.mark.parametrize(("key", "tokens"), [("cogvideox15", 45_106), ("hunyuan", 119_056), ("wan21", 75_600)])
def test_the_models_have_the_papers_sizes(accounting: ModuleType, key: str, tokens: int) -> None:
    with torch.device("meta"):
        inputs = find(accounting.RUNS[key].model).inputs()
    shape = inputs["hidden_states"].shape
    frames, height, width = (shape[1] // 2, *shape[3:]) if key == "cogvideox15" else shape[2:]
    text = {"cogvideox15": 226, "hunyuan": 256, "wan21": 0}[key]
    assert prod((frames, height // 2, width // 2)) + text == tokens


def test_the_machines_of_the_paper_compute_as_those_they_were_cut_from() -> None:
    for cut, whole in (("a800", "a100"), ("h800", "h100")):
        one, other = load_target(cut), load_target(whole)
        assert (one.flops["bf16"], one.bandwidth, one.memory) == (other.flops["bf16"], other.bandwidth, other.memory)


def test_the_figures_that_are_kept_are_the_papers(accounting: ModuleType) -> None:
    kept = sorted((BENCHMARKS / "results").glob("*-sparse_accounting-*.json"))[-1]
    figures = json.loads(kept.read_text())["figures"]
    assert figures.keys() == accounting.MEANINGS.keys()
    for key, run in accounting.RUNS.items():
        assert figures[f"pflops_dense_{key}"] == pytest.approx(run.published.dense, rel=0.005)
        assert figures[f"pflops_sparse_{key}"] == pytest.approx(run.published.sparse, rel=0.01)
        assert 1 < figures[f"predicted_speedup_{key}"] < figures[f"speedup_of_flops_{key}"]
