"""One kernel tuned at one shape, with a laboratory that answers at once in place of compilers and a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.target import load_target
from intarsia.kernels.records import MEASURED, RANKED, Database
from intarsia.kernels.tiling import TILINGS, Draw, Tile, require_tiling
from intarsia.search.progress import Silent
from intarsia.search.tune_problem import Problem, Site, site_of, sites_of
from intarsia.search.tune_rank import MULTIPROCESSORS, predicted, ranked
from intarsia.search.tune_study import EFFORTS, Effort, tune
from intarsia.search.tune_worker import TaskFailed

TARGET = load_target("h200")
SHAPE = {"tokens": 32_760, "rows": 1536, "columns": 1536}
EFFORT = Effort(candidates=24, ranked=6, fitting=3)
SHAPES = {
    "intarsia.linear_i8": SHAPE,
    "intarsia.linear_i4": {**SHAPE, "group": 64},
    "intarsia.linear_i8i8": SHAPE,
    "intarsia.attention": {"heads": 12, "queries": 4096, "keys": 4096, "channels": 128},
    "intarsia.block_sparse_attention_tables": {
        "heads": 12, "queries": 4096, "keys": 4096, "channels": 64, "blocks": 300, "block_q": 128, "block_k": 64,
        "ordered": 1,
    },
    "intarsia.norm_rope": {"tokens": 4096, "channels": 1536, "heads": 12},
    "intarsia.modulated_norm": {"tokens": 4096, "channels": 1536},
    "intarsia.gated_residual": {"tokens": 4096, "channels": 1536},
    "intarsia.add_requantized": {"elements": 100_000},
}  # fmt: skip
DTYPES = {"intarsia.linear_i8i8": "i8", "intarsia.add_requantized": "i16"}


class OnPaper:
    """A laboratory whose fastest tile is 64 x 128 x 64 in 8 warps and 4 stages; interrupted ``stop_after`` so many."""

    def __init__(self, *, clock: str | None = "a clock of paper", stop_after: int = 10**9) -> None:
        self.clock, self.stop_after = clock, stop_after
        self.looked: list[Tile] = []

    def compiled(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        if len(self.looked) >= self.stop_after:
            raise KeyboardInterrupt
        self.looked.append(dict(tile))
        spilling = tile.get("block_m", 0) * tile.get("block_n", 0) > 128 * 256
        return {"registers": 128, "refused": "spills 8 bytes of a thread" if spilling else ""}

    def error(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        wrong = tile.get("block_k") == 32
        return {"error": float("inf") if wrong else 1e-4, "refused": "error inf is above 0.002" if wrong else ""}

    def seconds(self, problem: Problem, tiles: Sequence[Tile]) -> tuple[float, ...]:
        if any(tile["warps"] == 4 and tile["stages"] == 5 for tile in tiles):
            raise TaskFailed("ended the process")
        return tuple(map(self._seconds, tiles))

    @staticmethod
    def _seconds(tile: Tile) -> float:
        sides = {"block_m": 64, "block_n": 128, "block_k": 64, "warps": 8, "stages": 4}
        return 1e-3 * (1 + sum(abs(tile[name].bit_length() - best.bit_length()) for name, best in sides.items()))


@pytest.fixture
def site() -> Site:
    return site_of("linear_i8", SHAPE, "f16", TARGET)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "tuning.jsonl")


def tuned(site: Site, database: Database, laboratory: OnPaper, effort: Effort = EFFORT, **wishes: Any) -> Any:
    return tune(site, TARGET, database, laboratory, effort=effort, progress=Silent(), **wishes)


def test_what_was_measured_says_what_comes_next_and_the_fastest_wins(site: Site, database: Database) -> None:
    laboratory = OnPaper()
    found = tuned(site, database, laboratory, replace(EFFORT, candidates=60))
    assert found.complete
    assert found.tried == len(laboratory.looked) == len(database.records(site.key)) == 60
    assert found.best == database.best(site.key)
    assert found.best.seconds < found.default.seconds
    assert (found.best.how, found.best.facts["device"]) == (MEASURED, "a clock of paper")
    later = [record for record in database.records(site.key)[EFFORT.ranked :] if not record.refused]
    early = [record for record in database.records(site.key)[: EFFORT.ranked] if not record.refused]
    assert min(one.seconds for one in later) < min(one.seconds for one in early), "the model learns"


def test_candidates_that_do_not_fit_are_wrong_or_do_not_run_never_win(site: Site, database: Database) -> None:
    found = tuned(site, database, OnPaper(), EFFORTS["full"])
    reasons = {record.refused for record in database.records(site.key) if record.refused}
    assert "does not run: ended the process" in reasons
    assert "error inf is above 0.002" in reasons
    assert "spills 8 bytes of a thread" in reasons
    assert found.refused == sum(bool(record.refused) for record in database.records(site.key))
    assert not found.best.refused


@pytest.mark.parametrize("stop_after", [0, 1, 7, 15])
def test_a_search_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path, site: Site, stop_after: int) -> None:
    whole, cut = Database(tmp_path / "whole"), Database(tmp_path / "cut")
    expected = tuned(site, whole, OnPaper(), seed=3)
    with pytest.raises(KeyboardInterrupt):
        tuned(site, cut, OnPaper(stop_after=stop_after), seed=3)
    with cut.path.open("a") as file:
        file.write('{"schema": 1, "choi')  # a line that the kill cut short
    again, laboratory = Database(cut.path), OnPaper()
    assert again.broken == 1
    found = tuned(site, again, laboratory, seed=3)
    assert (found.best, found.tried) == (expected.best, expected.tried)
    assert len(laboratory.looked) == found.measured == expected.tried - stop_after, "nothing is looked at twice"
    assert Database(cut.path).records(site.key) == whole.records(site.key)


def test_without_a_clock_the_best_of_the_ranking_that_fit_are_kept_as_ranked(site: Site, database: Database) -> None:
    found = tuned(site, database, OnPaper(clock=None))
    fitting = [record for record in database.records(site.key) if not record.refused]
    assert len(fitting) == EFFORT.fitting + 1, "and the default"
    assert {record.how for record in fitting} == {RANKED}
    assert found.best.seconds == predicted(site.problem, found.best.choice, TARGET)
    measured = tuned(site, database, OnPaper())
    assert database.best(site.key) == measured.best, "what a clock said comes before any ranking"


def test_no_candidate_begins_after_the_time_is_spent(site: Site, database: Database) -> None:
    found = tuned(site, database, OnPaper(), deadline=0.0)
    assert (found.best, found.tried, found.complete) == (None, 0, False)


def test_the_same_seed_tries_the_same(tmp_path: Path, site: Site) -> None:
    tried = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        laboratory = OnPaper()
        tuned(site, Database(tmp_path / name), laboratory, seed=seed)
        tried.append(laboratory.looked)
    assert tried[0] == tried[1]
    assert tried[0] != tried[2]


@pytest.mark.parametrize("op", TILINGS)
@pytest.mark.parametrize("target", ["a100", "h200"])
def test_every_kernel_that_varies_has_an_example_whose_calls_are_the_problem_itself(op: str, target: str) -> None:
    machine = load_target(target)
    problem = Problem(op, SHAPES[op], DTYPES.get(op, "bf16"))
    space = problem.space(machine.architecture)
    assert {name: int(extent) for name, extent in space.extents.items()} == problem.shape
    assert space.dtype == problem.dtype
    order = ranked(problem, machine)
    assert order[0] == space.default
    assert len(order) > 4
    for tile in (order[0], order[1], order[-1]):
        assert space.offers(tile)
        launch = problem.launch(machine.architecture, tile)
        assert launch.warps == tile["warps"]
        assert predicted(problem, tile, machine) > machine.launch
        small = require_tiling(op).small(tile, problem.shape)
        assert all(small[name] <= problem.shape[name] for name in small)
        require_tiling(op).example(small, Draw(problem.dtype, "cpu"))


def test_bigger_tiles_read_less_and_rank_above_smaller_ones() -> None:
    problem = Problem("intarsia.linear_i8", SHAPE, "f16")
    small = {"block_m": 16, "block_n": 32, "block_k": 64, "warps": 4, "stages": 3}
    large = {**small, "block_m": 128, "block_n": 128, "warps": 8}
    assert predicted(problem, large, TARGET) < predicted(problem, small, TARGET)
    assert predicted(problem, {**large, "stages": 5}, TARGET) <= predicted(problem, {**large, "stages": 2}, TARGET)
    assert TARGET.architecture in MULTIPROCESSORS


GRAPH = """graph g {
  size N in [1, 200000]
  input %x: bf16[2, 1000, 1536]
  input %z: bf16[2, N, 1536]
  param %w: i8[8960, 1536]
  param %v: i8[9000, 1500]
  param %s: f32[8960]
  %a: bf16[2, 1000, 8960] = intarsia.linear_i8(input=%x, weight=%w, scale=%s, bias=None)
  %b: bf16[2, 1000, 8960] = intarsia.linear_i8(input=%x, weight=%w, scale=%s, bias=None)
  %c: bf16[2, N, 8960] = intarsia.linear_i8(input=%z, weight=%w, scale=%s, bias=None)
  %d: bf16[2, 1000, 8960] = aten.relu(self=%a)
  return %b, %c, %d
}
"""


def test_calls_of_a_graph_share_a_bucket_of_powers_of_two_and_open_sizes_have_their_own() -> None:
    graph = Graph.parse(GRAPH)
    first, second = sites_of([graph], TARGET, {"N": 500})
    assert (first.key.bucket, first.calls) == ("columns<=2048 rows<=16384 tokens<=2048", 2)
    assert (second.key.bucket, second.calls) == ("columns<=2048 rows<=16384 tokens=*", 1)
    assert second.problem.shape == {"tokens": 1000, "rows": 8960, "columns": 1536}
    given = site_of("linear_i8", {"tokens": 2048, "rows": 9000, "columns": 1025}, "bf16", TARGET)
    assert given.key == first.key


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype", "said"),
    [
        ("gemm", SHAPE, "f16", "--kernel gemm: there is nothing to tune of that name; linear_i8, linear_i4"),
        ("linear_i8", {"tokens": 1, "rows": 8}, "f16", "--shape: linear_i8 also needs columns"),
        ("linear_i8", {**SHAPE, "heads": 2}, "f16", "--shape: linear_i8 has no extent heads; those are tokens, rows"),
    ],
)
def test_a_shape_that_is_none_is_told(kernel: str, shape: dict[str, int], dtype: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        site_of(kernel, shape, dtype, TARGET)


def test_a_call_that_the_kernel_refuses_is_told() -> None:
    with pytest.raises(Unsupported, match="takes 32, 64, 128"):
        site_of("attention", {"heads": 1, "queries": 8, "keys": 8, "channels": 40}, "f16", TARGET)


def test_another_version_or_source_is_another_key(site: Site, database: Database) -> None:
    record = tuned(site, database, OnPaper(), EFFORTS["quick"]).best
    database.add(replace(record, key=replace(site.key, compiler="triton 3.6.0")))
    database.add(replace(record, key=replace(site.key, source="0" * 64)))
    assert len(database.records(site.key)) == EFFORTS["quick"].candidates
    assert database.stale(site.key) == 2
