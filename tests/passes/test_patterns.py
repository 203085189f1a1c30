"""Masks of patterns against their definitions, as plain loops over tokens; what patterns cost; their notation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from intarsia.ir.errors import SpecError, UsageError
from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.patterns.base import PATTERNS, find_pattern
from intarsia.passes.patterns.columns import columns_of
from intarsia.passes.patterns.dense import Dense
from intarsia.passes.patterns.diagonal import Diagonal
from intarsia.passes.patterns.masks import Mask
from intarsia.passes.patterns.multi_diagonal import MultiDiagonal
from intarsia.passes.patterns.offsets import Distances, tiles_of
from intarsia.passes.patterns.radial import Radial
from intarsia.passes.patterns.skip import Skip
from intarsia.passes.patterns.sliding_tile import SlidingTile
from intarsia.passes.patterns.tile_offsets import TileOffsets
from intarsia.passes.patterns.vertical_stripe import VerticalStripe

LAYOUTS = (
    TokenLayout(4, 4, 4),
    TokenLayout(3, 5, 3, before=7),
    TokenLayout(5, 3, 6, after=9),
    TokenLayout(3, 4, 5, before=3, after=6),
)
BLOCK = 8

Place = tuple[int, int, int]
Kept = Callable[[list[int], list[int]], bool]
"""Whether a block of queries attends to a block of keys, from the tokens that they hold."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_a_diagonal_is_the_blocks_within_a_reach_of_the_main_diagonal(layout: TokenLayout, reach: int):
    expected = slow_mask(layout, in_sequence(layout), lambda queries, keys: near(queries, keys, reach))
    mask = Mask(Diagonal(density=expected.mean()), layout, BLOCK, BLOCK)
    assert np.array_equal(mask.tokens(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reach", [0, 2])
def test_a_sink_adds_all_columns_that_hold_a_token_of_the_first_frames(layout: TokenLayout, reach: int):
    def kept(queries: list[int], keys: list[int]) -> bool:
        return near(queries, keys, reach) or any(in_frames(layout, key, 2) for key in keys)

    expected = slow_mask(layout, in_sequence(layout), kept)
    mask = Mask(Diagonal(density=expected.mean(), sink=2), layout, BLOCK, BLOCK)
    assert np.array_equal(mask.tokens(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_a_multi_diagonal_is_a_band_over_tokens_that_stand_place_by_place(layout: TokenLayout, reach: int):
    sequence = sorted(in_sequence(layout), key=lambda token: place_by_place(layout, token))
    position = {token: number for number, token in enumerate(sequence)}
    expected = slow_mask(
        layout,
        sequence,
        lambda queries, keys: near([position[token] for token in queries], [position[token] for token in keys], reach),
    )
    mask = Mask(MultiDiagonal(density=expected.mean()), layout, BLOCK, BLOCK)
    assert mask.order is not None
    assert mask.order.indices().tolist() == sequence
    assert np.array_equal(mask.tokens(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("sink", [0, 1])
def test_a_stripe_is_the_named_columns_and_those_of_the_first_frames(layout: TokenLayout, sink: int):
    def kept(queries: list[int], keys: list[int]) -> bool:
        return keys[0] // BLOCK in {3, 4, 6} or any(in_frames(layout, key, sink) for key in keys)

    expected = slow_mask(layout, in_sequence(layout), kept)
    mask = Mask(VerticalStripe(density=1.0, columns="3-4,6", sink=sink), layout, BLOCK, BLOCK)
    assert np.array_equal(mask.tokens(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("widest", [8, 16, 32, 64])
def test_a_radial_window_halves_with_the_bits_of_the_distance_in_frames(layout: TokenLayout, widest: int):
    """The rule of the paper's code, for windows that are powers of two, between the middles of blocks."""

    def kept(queries: list[int], keys: list[int]) -> bool:
        (frame_q, place_q), (frame_k, place_k) = (
            divmod(middle(layout, tokens), layout.frame) for tokens in (queries, keys)
        )
        frames, places = abs(frame_q - frame_k), abs(place_q - place_k)
        if frames == 0:
            return places <= widest
        window = widest / 2 ** frames.bit_length()
        every = 1 if window >= BLOCK else int(BLOCK / window)
        return frames % every == 0 and (places < BLOCK or places <= window)

    expected = slow_mask(layout, in_sequence(layout), kept)
    mask = Mask(Radial(density=expected.mean(), sink=0), layout, BLOCK, BLOCK)
    assert np.array_equal(mask.tokens(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("window", "tile"), [((1, 1, 1), (2, 2, 2)), ((2, 2, 1), (2, 2, 3)), ((3, 1, 2), (1, 2, 2))])
def test_a_sliding_tile_is_every_block_with_a_key_in_a_window_of_tiles(layout: TokenLayout, window: Place, tile: Place):
    mask = Mask(SlidingTile(window=window, tile=tile), layout, BLOCK, BLOCK)
    assert mask.order is not None

    def kept(queries: list[int], keys: list[int]) -> bool:
        return any(in_window(layout, query, key, window, tile) for query, key in product(queries, keys))

    assert np.array_equal(mask.tokens(), slow_mask(layout, mask.order.indices().tolist(), kept))


def test_a_sliding_tile_of_whole_blocks_computes_its_window_and_nothing_else():
    layout, window, tile = TokenLayout(4, 6, 4), (3, 2, 1), (1, 2, 4)
    mask = Mask(SlidingTile(window=window, tile=tile), layout, BLOCK, BLOCK)
    expected = [[in_window(layout, query, key, window, tile) for key in range(96)] for query in range(96)]
    assert np.array_equal(mask.tokens(), np.array(expected))


def test_the_tokens_of_a_tile_stand_side_by_side_with_tiles_that_are_cut_short_behind_them():
    order = SlidingTile(window=(1, 1, 1), tile=(1, 2, 2)).order(TokenLayout(2, 2, 5, before=1, after=2))
    whole = [1, 2, 6, 7, 3, 4, 8, 9, 11, 12, 16, 17, 13, 14, 18, 19]
    assert order.indices().tolist() == [0, *whole, 5, 10, 15, 20, 21, 22]
    assert str(order) == "0:1*1,1:2*10+1*10+2*2+1*10+2*5+2*1,5:2*10+1*10+1*1+1*10+2*5+1*1,21:2*1"


@pytest.mark.parametrize("offsets", [None, "0.0.0,1.0.0,-1.0.1,0.-1.-1", "0.1.0,9.9.9,0.-1.0"])
@pytest.mark.parametrize("count", [1, 3])
def test_tile_offsets_are_each_tiles_first_listed_distances_and_then_its_nearest_tiles(offsets: str | None, count: int):
    layout, tile = TokenLayout(4, 6, 4), (1, 2, 4)
    mask = Mask(TileOffsets(count / 12, tile, offsets), layout, BLOCK, BLOCK)
    listed = [tuple(map(int, offset.split("."))) for offset in (offsets or "").split(",") if offset]

    def wanted(query: Place, key: Place) -> tuple[int, int, int]:
        apart = tuple(b - a for a, b in zip(query, key, strict=True))
        place = listed.index(apart) if apart in listed else len(listed)
        return place, sum((along * size) ** 2 for along, size in zip(apart, tile, strict=True)), tiles.index(key)

    tiles = [(frame, row, 0) for frame in range(4) for row in range(3)]
    kept = {query: sorted(tiles, key=lambda key: wanted(query, key))[:count] for query in tiles}
    of = [(token // 24, token % 24 // 8, 0) for token in range(96)]
    assert np.array_equal(mask.tokens(), [[of[key] in kept[of[query]] for key in range(96)] for query in range(96)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tile_offsets_keep_text_and_the_density_where_tiles_are_cut_short(layout: TokenLayout):
    mask = Mask(TileOffsets(0.8, (2, 2, 2), "0.0.0,1.1.0"), layout, BLOCK, BLOCK)
    text = [*range(layout.before), *range(layout.before + layout.video, layout.tokens)]
    assert mask.tokens()[text].all()
    assert mask.tokens()[:, text].all()
    assert 0.8 - BLOCK**2 / layout.tokens**2 < mask.density <= 0.8


def test_offsets_are_those_with_the_largest_mass_and_tiles_those_that_hold_most_of_it():
    layout = TokenLayout(8, 8, 8)
    mass = np.full((15, 15, 15), 1e-4)
    mass[:, 7:9, 7] = 0.05  # the place itself and the one below it, in all frames
    found = Distances(mass, layout, 16).pattern(1 / 16)
    assert found.tile == (8, 1, 2)
    assert found.offsets is not None
    assert found.offsets.startswith("0.0.0,0.1.0")
    computed = Mask(found, layout, 16, 16).tokens()
    same_place = np.arange(512) % 64 == (np.arange(512) % 64)[:, None]
    assert computed[same_place].all()
    assert computed.mean() == 1 / 16


def test_each_query_wants_distances_that_the_video_has_from_its_tile():
    mass = np.zeros((15, 15, 15))
    mass[7, 0, 7], mass[7, 14, 7], mass[7, 7, 7] = 0.9, 0.8, 0.1
    found = Distances(mass, TokenLayout(8, 8, 8), 16).pattern(1 / 32)
    computed = Mask(found, TokenLayout(8, 8, 8), 16, 16).tokens()
    rows = np.arange(512) % 64 // 8
    for row, wanted in enumerate([7, 1, 2, 3, 4, 5, 6, 0]):
        queries = np.flatnonzero(rows == row)
        assert computed[queries, queries + 8 * (wanted - row)].all()


def test_tiles_have_as_many_tokens_as_a_block_with_sides_that_are_powers_of_two():
    assert set(tiles_of(TokenLayout(2, 3, 4), 8)) == {(1, 2, 4), (2, 1, 4), (2, 2, 2)}
    assert tiles_of(TokenLayout(1, 2, 2), 16) == ((1, 2, 2),)


@pytest.mark.parametrize("mass", [np.ones((15, 15, 14)), np.full((15, 15, 15), np.inf)])
def test_mass_is_one_number_for_each_distance(mass: NDArray[np.float64]):
    with pytest.raises(ValueError, match=r"one finite number for each distance, \(15, 15, 15\)"):
        Distances(mass, TokenLayout(8, 8, 8), 16)


def test_dense_keeps_every_pair_and_skip_none():
    layout = LAYOUTS[3]
    assert Mask(Dense(), layout, BLOCK, BLOCK).tokens().all()
    assert not Mask(Skip(), layout, BLOCK, BLOCK).tokens().any()


def test_blocks_of_queries_may_be_larger_than_blocks_of_keys():
    table = Diagonal(density=0.25).table(TokenLayout(4, 8, 8), 32, 16)
    middles = [(sum(runs[0]) + 1) * 16 / 2 for runs in table.rows[2:-2]]
    assert middles == [32 * row + 16 for row in range(2, 6)]


@pytest.mark.parametrize("text", ["dense", "skip", "diagonal(density=0.6, sink=1)", "multi-diagonal(density=0.5)"])
@pytest.mark.parametrize("blocks", [(8, 8), (16, 8)])
def test_operations_and_bytes_are_those_of_a_kernel_that_goes_through_the_rows(text: str, blocks: tuple[int, int]):
    layout, head_dim, element = TokenLayout(6, 6, 5, before=3, after=6), 16, 2
    mask = Mask(find_pattern(text), layout, *blocks)
    flops = moved = 0
    for queries, row in zip(cut(layout.tokens, blocks[0]), mask.table.blocks(), strict=True):
        keys = [len(held) for held, kept in zip(cut(layout.tokens, blocks[1]), row, strict=True) if kept]
        flops += 2 * 2 * head_dim * len(queries) * sum(keys)
        read = len(queries) if keys else 0
        moved += (read + len(queries) + 2 * sum(keys)) * head_dim * element + 4 * len(keys) + 4
    assert mask.flops(head_dim) == flops
    assert mask.bytes(head_dim, element) == moved + 4


def test_columns_are_those_with_the_largest_mass_that_the_density_allows():
    layout, generator = TokenLayout(4, 8, 8, after=16), np.random.default_rng(0)
    mass = generator.random(17)
    columns = columns_of(mass, layout, 16, 16, density=0.6)
    mask = Mask(VerticalStripe(density=0.6, columns=columns), layout, 16, 16)
    chosen = BlockTable.parse(f"17:{columns}").indices.tolist()
    others = set(range(4, 16)) - set(chosen)
    assert chosen
    assert min(mass[chosen]) > max(mass[list(others)])
    assert mask.density <= 0.6 < mask.density + (16 * 256) / layout.tokens**2


def test_columns_leave_out_text_and_the_first_frame_which_are_kept_anyway():
    mass = np.array([9.0, 9, 9, 9, 1, 2, 1, 1, 9])
    assert columns_of(mass, TokenLayout(2, 8, 8, after=16), 16, 16, density=0.71) == "5"
    assert columns_of(mass, TokenLayout(2, 8, 8, after=16), 16, 16, density=0.61) == ""
    assert columns_of(mass, TokenLayout(2, 8, 8, after=16), 16, 16, density=0.61, sink=0) == "0-3"


def test_no_columns_at_all_is_another_pattern_than_columns_that_are_not_named():
    layout = TokenLayout(4, 8, 8)
    assert VerticalStripe(density=0.5, columns="").table(layout, 16, 16) == BlockTable.parse("16:16*0-3")
    assert VerticalStripe(density=0.5).table(layout, 16, 16) == BlockTable.parse("16:16*0-3,5,8,11,14")


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "skip",
        "diagonal(density=0.25)",
        "diagonal(density=0.25, sink=2)",
        "multi-diagonal(density=1)",
        "vertical-stripe(density=0.25)",
        "vertical-stripe(density=0.25, columns='0-3,9', sink=0)",
        "vertical-stripe(density=0.25, columns='')",
        "radial(density=0.125, sink=0)",
        "sliding-tile(window=(3, 2, 1))",
        "sliding-tile(window=(3, 2, 1), tile=(4, 8, 8))",
        "random(density=0.5, seed=7)",
        "skip(mean=0.4)",
        "diagonal(density=0.25, sink=2, mean=0.25)",
        "tile-offsets(density=0.25)",
        "tile-offsets(density=0.25, tile=(2, 4, 2), offsets='0.0.0,-1.0.2')",
    ],
)
def test_a_pattern_is_written_as_it_is_read(text: str):
    assert str(find_pattern(text)) == text


def test_every_registered_name_is_the_name_of_its_pattern():
    arguments = {"dense": "", "skip": "", "sliding-tile": "(window=(1, 1, 1))"}
    for name in PATTERNS:
        assert find_pattern(name + arguments.get(name, "(density=0.5)")).name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("diagonal", "diagonal: density must be given"),
        ("diagonal(density=0)", "density is 0; it is a number above 0 and at most 1"),
        ("diagonal(density=1.5)", "density is 1.5; it is a number above 0 and at most 1"),
        ("random(density='half')", "density is 'half'; it is a number above 0 and at most 1"),
        ("radial(density=True)", "density is True; it is a number above 0 and at most 1"),
        ("diagonal(density=0.5, sink=-1)", "sink is -1; it is a number of frames, 0 or more"),
        ("diagonal(density=0.5, width=3)", "diagonal: unknown key 'width'; it takes density, sink, mean"),
        ("vertical-stripe(density=0.5, columns='3;4')", "columns is '3;4'; it is runs of blocks such as '0-3,9'"),
        ("vertical-stripe(density=0.5, columns=3)", "columns is 3; it is runs of blocks such as '0-3,9'"),
        ("sliding-tile(window=(3, 3))", "window is (3, 3); it is three whole numbers from 1 on, such as (3, 3, 3)"),
        ("sliding-tile(window=(1, 1, 1), tile=(0, 1, 1))", "tile is (0, 1, 1); it is three whole numbers from 1 on"),
        ("diagonal(density=0.5, mean=1.5)", "diagonal(density=0.5, mean=1.5): mean is 1.5; it is a share from 0 to 1"),
        ("tile-offsets(density=0.5, tile=(2, 4))", "tile is (2, 4); it is three whole numbers from 1 on"),
        (
            "tile-offsets(density=0.5, offsets='0.0')",
            "offsets is '0.0'; it is distances in tiles such as '0.0.0,-1.0.0",
        ),
        ("random(density=0.5, seed=-1)", "seed is -1; it is at least 0 and below 2^32"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(text: str, said: str):
    with pytest.raises(SpecError) as caught:
        find_pattern(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_pattern_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="pattern 'diagonals' is unknown; did you mean diagonal"):
        find_pattern("diagonals(density=0.5)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("diagonal(density=0.02)", "what it keeps in any case has density 0.0312, more than the 0.02 asked for"),
        ("vertical-stripe(density=0.1)", "what it keeps in any case has density 0.1250, more than the 0.1 asked for"),
        ("vertical-stripe(density=0.2, columns='4-9')", "has density 0.3125, more than the 0.2 asked for"),
        ("vertical-stripe(density=0.9, columns='30-32')", "columns '30-32' go beyond the 32 blocks of keys"),
        ("vertical-stripe(density=0.9, columns='9,4')", "columns '9,4' are not ascending"),
        ("vertical-stripe(density=0.9, columns='', sink=0)", "32 of 32 blocks of queries attend to nothing"),
        ("diagonal(density=0.9, sink=9)", "sink is 9 frames; the video has 8"),
        ("sliding-tile(window=(5, 1, 1))", "the window is larger than the video, which has 4 x 2 x 2 tiles"),
    ],
)
def test_what_does_not_fit_is_refused_with_pattern_layout_and_blocks(text: str, said: str):
    with pytest.raises(UsageError) as caught:
        find_pattern(text).table(TokenLayout(8, 8, 8), 16, 16)
    message = str(caught.value)
    assert message.startswith(f"{text} at tokens(frames=8, height=8, width=8), blocks of 16 x 16: ")
    assert said in message
    assert "\n" not in message


def test_blocks_have_at_least_one_token():
    with pytest.raises(UsageError, match="blocks are 0 queries x 16 keys; both are at least 1"):
        find_pattern("dense").table(TokenLayout(8, 8, 8), 0, 16)


@pytest.mark.parametrize("mass", [np.ones(31), np.full(32, np.nan)])
def test_mass_is_one_number_for_each_block(mass: NDArray[np.float64]):
    with pytest.raises(ValueError, match="one finite number for each of 32 blocks"):
        columns_of(mass, TokenLayout(8, 8, 8), 16, 16, density=0.5)


def slow_mask(layout: TokenLayout, sequence: list[int], kept: Kept) -> NDArray[np.bool_]:
    """The mask over tokens of a pattern over blocks of the sequence of tokens; blocks that hold text are kept."""
    mask = np.zeros((layout.tokens, layout.tokens), dtype=bool)
    for queries, keys in product(cut(layout.tokens, BLOCK), repeat=2):
        tokens_q, tokens_k = ([sequence[position] for position in positions] for positions in (queries, keys))
        if any(is_text(layout, token) for token in tokens_q + tokens_k) or kept(tokens_q, tokens_k):
            for query, key in product(tokens_q, tokens_k):
                mask[query, key] = True
    return mask


def cut(tokens: int, block: int) -> list[range]:
    return [range(first, min(first + block, tokens)) for first in range(0, tokens, block)]


def in_sequence(layout: TokenLayout) -> list[int]:
    return list(range(layout.tokens))


def is_text(layout: TokenLayout, token: int) -> bool:
    return not layout.before <= token < layout.before + layout.video


def in_frames(layout: TokenLayout, token: int, frames: int) -> bool:
    return not is_text(layout, token) and place_of(layout, token)[0] < frames


def place_of(layout: TokenLayout, token: int) -> Place:
    """Frame, row and column of a token of the video."""
    frame, rest = divmod(token - layout.before, layout.frame)
    return frame, *divmod(rest, layout.width)


def place_by_place(layout: TokenLayout, token: int) -> tuple[int, ...]:
    if is_text(layout, token):
        return (0 if token < layout.before else 2, token)
    frame, row, column = place_of(layout, token)
    return (1, row, column, frame)


def near(queries: list[int], keys: list[int], reach: int) -> bool:
    return abs(queries[0] // BLOCK - keys[0] // BLOCK) <= reach


def middle(layout: TokenLayout, tokens: list[int]) -> int:
    """The token of the video, counted from its first, in the middle of a block that begins with the first of these."""
    return min(max(tokens[0] + BLOCK // 2 - layout.before, 0), layout.video - 1)


def in_window(layout: TokenLayout, query: int, key: int, window: Place, tile: Place) -> bool:
    """Whether the key's tile is in the window about the query's tile, pushed back where it would leave the video."""
    if is_text(layout, query) or is_text(layout, key):
        return True
    return all(axis_within(*axis) for axis in axes(layout, query, key, window, tile))


def axes(layout: TokenLayout, query: int, key: int, window: Place, tile: Place) -> Iterator[tuple[int, ...]]:
    extents = (layout.frames, layout.height, layout.width)
    yield from zip(place_of(layout, query), place_of(layout, key), extents, window, tile, strict=True)


def axis_within(query: int, key: int, extent: int, window: int, tile: int) -> bool:
    tiles = -(-extent // tile)
    first = min(max(query // tile - window // 2, 0), tiles - window)
    return first <= key // tile < first + window
