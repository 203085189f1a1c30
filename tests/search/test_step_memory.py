"""What caches take in memory is known from the graph, and held against the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from intarsia.inspection import inspect
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.target import Target, load_target
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.search.step_memory import cache_bytes, cache_table, require_room
from intarsia.search.work import weight_bytes

GOLDEN = Path(__file__).parent.parent / "golden"

BRANCH = 2 * 2 * 2 * 64 * 8 * 4
"""Keys and values of two layers, two heads of 64 tokens and 8 numbers each, f32; the velocity takes as many more."""

VELOCITY = 64 * 8 * 4


@pytest.fixture
def graph() -> Graph:
    return Graph.parse((GOLDEN / "small-video.graph").read_text())


def machine(memory: int) -> Target:
    return replace(load_target("null"), name="small", memory=memory)


def test_caches_are_counted_by_kind_for_one_branch(graph: Graph) -> None:
    found = {(row.caches, row.dtype): row.bytes for row in cache_table(graph)}
    narrow = BRANCH // 4 + BRANCH // 8  # a byte a number, and four for every eight
    assert found == {
        ("held", "f32"): BRANCH + VELOCITY,
        ("held", "8 bits"): narrow + VELOCITY,
        ("linear", "f32"): 2 * BRANCH + VELOCITY,
        ("linear", "8 bits"): 2 * narrow + VELOCITY,
    }


@pytest.mark.parametrize("dtype", ["", "i8", "f8e4m3"])
@pytest.mark.parametrize("caches", ["held", "linear"])
def test_they_are_what_the_pass_makes(caches: str, dtype: str, graph: Graph) -> None:
    made = ActiveTokens(caches, dtype).run(graph, machine(2**40), {})
    told = {(row.caches, row.dtype): row.bytes for row in cache_table(graph)}
    assert cache_bytes(made) == 2 * told[caches, "8 bits" if dtype else "f32"]  # two rows


def test_branches_that_fit_are_those_beside_the_weights(graph: Graph) -> None:
    memory = weight_bytes(graph) + 3 * (BRANCH + VELOCITY)
    assert [row.branches for row in cache_table(graph, machine(memory))] == [3, 6, 1, 3]
    assert [row.branches for row in cache_table(graph, load_target("null"))] == [None] * 4


def test_caches_larger_than_memory_are_refused_in_one_line(graph: Graph) -> None:
    made = ActiveTokens().run(graph, machine(2**40), {})
    enough = weight_bytes(graph) + 2 * (BRANCH + VELOCITY)
    require_room(made, machine(enough))
    with pytest.raises(Unsupported, match=r"caches of small_video take .* ask for active-tokens") as raised:
        require_room(made, machine(enough - 1))
    assert "\n" not in str(raised.value)


def test_inspect_tells_what_caches_take(tmp_path: Path, graph: Graph) -> None:
    (tmp_path / "small.graph").write_text(str(graph))
    facts = inspect(tmp_path / "small.graph", target="h200")
    assert facts["step_allocation"]["memory"] == 141_000_000_000
    assert facts["step_allocation"]["caches"][0]["bytes"] == BRANCH + VELOCITY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("wan2.1-t2v-1.3b", 6.0), ("wan2.1-t2v-14b", 26.8), ("wan2.1-t2v-14b-720p", 61.9), ("hunyuanvideo", 87.8)],
)
def test_published_models_take_what_their_sizes_say(name: str, gigabytes: float) -> None:
    held = inspect(name)["step_allocation"]["caches"][0]
    assert held["bytes"] / 1e9 == pytest.approx(gigabytes, abs=0.06)
