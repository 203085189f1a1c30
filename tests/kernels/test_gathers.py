"""The plan of block-sparse attention in dense pieces: each pair that the table asks for, once, and few others."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from intarsia.kernels.block_sparse_attention.gathers import Gathers
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable


def planned(blocks: NDArray[np.bool_], tokens: int, *, order: str | None = None, most: int | None = None) -> Gathers:
    places = None if order is None else TokenOrder.parse(order)
    sizes = {"queries": tokens, "keys": tokens, "block_q": 128, "block_k": 128}
    return Gathers.of(BlockTable.of(blocks), places, **sizes, most=most)


def computed(found: Gathers, queries: int, keys: int) -> NDArray[np.int64]:
    """How often each pair of positions is attended to (S, T)."""
    times = np.zeros((queries, keys), np.int64)
    for piece in found.pieces:
        kept = np.ones(piece.keys.shape, bool) if piece.kept is None else piece.kept
        for places, given, real in zip(piece.queries, piece.keys, kept, strict=True):
            times[np.ix_(places, given[real])] += 1
    return times


def band(rows: int, width: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = abs(np.arange(rows)[:, None] - np.arange(rows)[None]) <= width
    return found


def stripe(rows: int) -> NDArray[np.bool_]:
    return np.broadcast_to(np.arange(rows) % 4 == 0, (rows, rows))


def test_a_stripe_is_one_piece_of_all_queries() -> None:
    (piece,) = planned(stripe(32), 4096).pieces
    assert piece.queries.shape == (1, 4096)
    assert piece.keys.tolist() == [[key for key in range(4096) if key // 128 % 4 == 0]]
    assert piece.kept is None


def test_windows_of_equal_counts_are_one_batched_piece() -> None:
    rows = np.arange(32)
    first = np.clip(rows - 4, 0, 24)
    blocks = (rows[None] >= first[:, None]) & (rows[None] < first[:, None] + 8)
    found = planned(blocks, 4096)
    assert [piece.keys.shape for piece in found.pieces] == [(32, 1024)]
    assert found.answers is None


def test_rows_that_see_everything_are_one_piece_beside_the_windows() -> None:
    blocks = band(64, 8)
    blocks[60:] = True
    shapes = [piece.queries.shape for piece in planned(blocks, 8192).pieces if piece.keys_per_group == 8192]
    assert shapes == [(1, 512)]


def test_large_groups_are_cut_where_that_is_asked_for() -> None:
    (piece,) = planned(stripe(32), 4096, most=256).pieces
    assert piece.queries.shape == (16, 256)
    assert (piece.keys == piece.keys[0]).all()


def of_counts(*counts: int) -> Gathers:
    """Rows of so many blocks each, of 32, none like another."""
    rows = np.arange(len(counts))[:, None]
    blocks = (np.arange(32)[None] - rows) % 32 < np.array(counts)[:, None]
    sizes = {"queries": 128 * len(counts), "keys": 4096, "block_q": 128, "block_k": 128}
    return Gathers.of(BlockTable.of(blocks), None, **sizes)


def test_few_groups_of_nearly_equal_counts_are_one_piece_padded_under_a_mask() -> None:
    (piece,) = of_counts(10, 11).pieces
    assert piece.kept is not None
    assert piece.kept.sum(axis=1).tolist() == [1280, 1408]


def test_many_groups_stay_apart_since_a_mask_costs_more_than_a_piece() -> None:
    pieces = of_counts(*[10] * 8, *[11] * 8).pieces
    assert [(piece.keys.shape, piece.kept) for piece in pieces] == [((8, 1280), None), ((8, 1408), None)]


def test_groups_of_unlike_counts_stay_apart() -> None:
    assert [piece.kept for piece in of_counts(4, 5).pieces] == [None, None]


def test_an_order_takes_keys_from_tokens_and_puts_answers_back() -> None:
    order = "0:1024*1+4*1024"
    found = planned(band(32, 2), 4096, order=order)
    assert found.order is not None
    assert found.answers is not None
    given = np.concatenate([found.order[piece.queries].reshape(-1) for piece in found.pieces])
    assert given[found.answers].tolist() == list(range(4096))


def test_an_order_that_changes_nothing_is_none() -> None:
    assert planned(band(32, 2), 4096, order="0:4096*1").order is None


def test_queries_that_attend_to_nothing_share_a_row_of_zeros() -> None:
    blocks = band(8, 1)
    blocks[3] = False
    found = planned(blocks, 1000)
    assert found.zeros
    assert found.answers is not None
    assert np.flatnonzero(found.answers == 1000 - 128).tolist() == list(range(384, 512))


def test_a_table_of_nothing_has_no_pieces() -> None:
    found = planned(np.zeros((4, 4), bool), 512)
    assert (found.pieces, found.zeros, found.pairs) == ((), True, 0)


@pytest.mark.parametrize("seed", range(30))
def test_every_pair_of_the_table_is_computed_once_and_no_other_is_kept(seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, keys, block_q, block_k = random.integers(1, [300, 300, 64, 64])
    blocks = random.random((-(-queries // block_q), -(-keys // block_k))) < random.random()
    table, most = BlockTable.of(blocks), int(random.integers(1, 100)) if seed % 2 else None
    found = Gathers.of(table, None, queries=queries, keys=keys, block_q=block_q, block_k=block_k, most=most)
    assert np.array_equal(computed(found, queries, keys), table.mask(queries, keys, block_q, block_k))
    assert all(most is None or piece.queries.shape[1] <= most for piece in found.pieces)


def tables() -> dict[str, NDArray[np.bool_]]:
    random, rows = np.random.default_rng(0), np.arange(128)
    apart = abs(rows[:, None] // 16 - rows[None] // 16)
    return {
        "band": band(128, 16),
        "band with text": band(128, 16) | (rows >= 124) | (rows[:, None] >= 124),
        "stripe": stripe(128),
        "radial": abs(rows[:, None] % 16 - rows[None] % 16) * 2**apart <= 16,
        "random": random.random((128, 128)) < 0.25,
        "few at random": random.random((128, 128)) < 0.03,
    }


@pytest.mark.parametrize("blocks", tables().values(), ids=tables())
@pytest.mark.parametrize("tokens", [16_384, 16_300])
def test_padding_adds_less_than_a_seventh(blocks: NDArray[np.bool_], tokens: int) -> None:
    found = planned(blocks, tokens)
    asked = BlockTable.of(blocks).pairs(tokens, tokens, 128, 128)
    assert asked <= found.pairs <= 1.15 * asked
    assert len(found.pieces) < 40
