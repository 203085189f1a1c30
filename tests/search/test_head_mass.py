"""Where the attention of each head falls, and the patterns that follow it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import load_target
from intarsia.passes.sparse_attention import SKIP, SparseAttention
from intarsia.search import head_mass
from intarsia.search.head_errors import Heads
from intarsia.search.head_mass import Mass, attention_mass, calibrated

TARGET = load_target("cpu-avx2")
PATTERNS = (SKIP, "diagonal(density=0.5)", "vertical-stripe(density=0.5)", "tile-offsets(density=0.25)")


@pytest.fixture
def heads(denoiser: Program) -> Heads:
    return Heads.of(SparseAttention(block=16, patterns=PATTERNS), denoiser.graph, TARGET, {})


def calls() -> list[tuple[torch.Tensor, ...]]:
    noise = [torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return [(video, torch.tensor([0.3 + seed / 2])) for seed, video in enumerate(noise)]


def weights_of(denoiser: Program, heads: Heads) -> NDArray[np.float64]:
    """The first site's attention (H, S, S) in the mean over the calls, from its queries and keys."""
    site, program = heads.sites[0], materialize(denoiser)
    text = str(program.graph).replace(f"return %{program.graph.outputs[0]}", f"return %{site.query}, %{site.key}")
    operands = [Program(Graph.parse(text), program.weights).module()(*call) for call in calls()]
    found = [torch.softmax(query @ key.transpose(-1, -2) / 2, dim=-1) for query, key in operands]
    return torch.stack(found).mean((0, 1)).double().numpy()


def test_columns_are_what_each_key_gets(denoiser: Program, heads: Heads) -> None:
    mass = attention_mass(materialize(denoiser), calls(), heads)
    assert set(mass) == {site.name for site in heads.sites}
    for found in mass.values():
        assert found.columns.shape == (2, 64)
        assert np.allclose(found.columns.sum(1), 1)
    assert np.allclose(mass[heads.sites[0].name].columns, weights_of(denoiser, heads).mean(1), atol=1e-5)


def test_offsets_are_what_keys_at_a_distance_get_in_the_mean_over_all_pairs_that_far_apart(
    denoiser: Program, heads: Heads
) -> None:
    mass = attention_mass(materialize(denoiser), calls(), heads)[heads.sites[0].name].offsets
    weights = weights_of(denoiser, heads)
    places = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), axis=1)
    expected, seen = np.zeros((2, 7, 7, 7)), np.zeros((7, 7, 7))
    for query, key in np.ndindex(64, 64):
        apart = tuple(places[key] - places[query] + 3)
        expected[:, *apart] += weights[:, query, key]
        seen[apart] += 1
    assert np.allclose(mass, expected / seen, atol=1e-6)


def test_few_queries_stand_in_all_columns_of_frames_and_see_all_near_distances(
    denoiser: Program, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_mass, "ROWS", 16)
    some = attention_mass(materialize(denoiser), calls(), heads)[heads.sites[0].name]
    assert np.allclose(some.columns.sum(1), 1)
    assert some.offsets[:, 2:5, 2:5, 2:5].min() > 0


def test_a_mean_that_a_pattern_names_stays_when_its_tiles_follow_the_head(denoiser: Program) -> None:
    named = SparseAttention(block=16, patterns=("tile-offsets(density=0.25, mean=0.3)",))
    heads = Heads.of(named, denoiser.graph, TARGET, {})
    found = calibrated(heads, attention_mass(materialize(denoiser), calls(), heads))
    for _, option in found.options:
        assert "offsets=" in option
        assert option.endswith("mean=0.3)")


def test_patterns_follow_each_heads_attention_and_those_that_leave_nothing_open_stay(heads: Heads) -> None:
    flat = Mass(np.ones((2, 64)), np.full((2, 7, 7, 7), 0.01))
    mass = {site.name: Mass(flat.columns.copy(), flat.offsets.copy()) for site in heads.sites}
    first, second = (mass[site.name] for site in heads.sites)
    first.columns[0, 48:64] = 5.0
    first.columns[1, 16:32] = 5.0
    second.columns[1, 40:41] = 100.0
    first.offsets[1, :, 3, 3] = 0.2
    found = calibrated(heads, mass)
    assert [options[:3] for options in found.options] == [options[:3] for options in heads.options]
    stripes = [options[3] for options in found.options]
    columns = ["3", "1", "1", "2"]
    assert stripes == [f"vertical-stripe(density=0.5, columns='{column}')" for column in columns]
    tiles = [options[4] for options in found.options]
    assert tiles[1] == "tile-offsets(density=0.25, tile=(4, 1, 4), offsets='0.0.0')"
    assert all(text.startswith("tile-offsets(density=0.25, tile=(") for text in tiles)
