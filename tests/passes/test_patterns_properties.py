"""What holds for patterns at any layout: promises, densities, pictures; and patterns of the user's own."""

from __future__ import annotations

import io
import re
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from intarsia.ir.errors import UsageError
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import Pattern, find_pattern
from intarsia.passes.patterns.conformance import check_pattern
from intarsia.passes.patterns.diagonal import Diagonal, width_of_density
from intarsia.passes.patterns.masks import Mask
from intarsia.passes.patterns.pictures import EDGE, GAP, INK, LINE, PAPER, TEXT, picture, position_shares, token_shares

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "patterns.md").read_text()

REALISTIC = {
    "wan-mini": (TokenLayout(8, 8, 8), 16),
    "wan 480p": (TokenLayout(21, 30, 52), 128),
    "wan 720p": (TokenLayout(21, 45, 80), 128),
    "cogvideox": (TokenLayout(13, 30, 45, before=226), 128),
    "hunyuanvideo": (TokenLayout(33, 45, 80, after=256), 128),
}

extents = st.integers(1, 6)
text_tokens = st.sampled_from([0, 0, 1, 5, 16, 30])
layouts = st.builds(TokenLayout, extents, extents, extents, before=text_tokens, after=text_tokens)
blocks = st.sampled_from([1, 3, 8, 16])
densities = st.floats(0.05, 1.0)
names = st.sampled_from(["diagonal", "multi-diagonal", "vertical-stripe", "radial", "random"])
fixed = st.sampled_from(["dense", "skip", "sliding-tile(window=(1, 1, 1), tile=(2, 3, 2))"])
patterns = st.one_of(fixed, st.builds(lambda name, density: f"{name}(density={density!r})", names, densities))


narrow = settings(suppress_health_check=[HealthCheck.filter_too_much])
"""Many drawn densities are below the narrowest form of a pattern at the drawn layout."""


@narrow
@given(patterns.map(find_pattern), layouts, blocks, blocks)
def test_every_pattern_keeps_its_promises_wherever_it_fits(
    pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int
):
    fitting(pattern, layout, block_q, block_k)
    check_pattern(pattern, layout, block_q, block_k)


@narrow
@given(patterns.map(find_pattern), layouts, blocks, blocks)
def test_a_pair_of_tokens_is_computed_if_its_block_in_the_table_is(
    pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int
):
    mask = fitting(pattern, layout, block_q, block_k)
    places = mask.order.inverse() if mask.order else np.arange(layout.tokens)
    of_table = mask.table.blocks()[(places // block_q)[:, None], (places // block_k)[None, :]]
    assert np.array_equal(mask.tokens(), of_table)
    assert mask.pairs == mask.tokens().sum()
    assert mask.density == mask.tokens().mean()


@narrow
@given(st.sampled_from(["diagonal", "multi-diagonal", "radial", "random"]), densities, layouts, blocks)
def test_no_pattern_could_be_a_step_wider(name: str, density: float, layout: TokenLayout, block: int):
    mask = fitting(find_pattern(f"{name}(density={density!r})"), layout, block, block)
    step = 2 if name in ("diagonal", "multi-diagonal") else layout.frames * 4
    assert mask.pairs == layout.tokens**2 or mask.pairs > density * layout.tokens**2 - step * block**2 - 1


@narrow
@given(st.sampled_from(["diagonal", "multi-diagonal", "radial", "random"]), densities, densities, layouts, blocks)
def test_what_a_density_computes_a_larger_one_computes_too(
    name: str, one: float, other: float, layout: TokenLayout, block: int
):
    masks = (fitting(find_pattern(f"{name}(density={density!r})"), layout, block, block) for density in (one, other))
    smaller, larger = sorted(masks, key=lambda mask: mask.pairs)
    assert (smaller.tokens() <= larger.tokens()).all()


@pytest.mark.parametrize("where", REALISTIC)
@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("name", ["diagonal", "multi-diagonal", "vertical-stripe", "radial", "random"])
def test_the_density_that_is_reached_is_near_the_one_asked_for(where: str, name: str, density: float):
    layout, block = REALISTIC[where]
    sink = ", sink=0" if name in ("vertical-stripe", "radial") else ""
    mask = Mask(find_pattern(f"{name}(density={density}{sink})"), layout, block, block)
    step = 1 / mask.table.columns if name == "vertical-stripe" else 0.0
    assert density - max(0.01, density / 10, step) <= mask.density <= density


def test_a_density_that_is_met_exactly_is_taken():
    layout = TokenLayout(8, 8, 8)
    for blocks_wide in (94, 154):  # of 1,024: one and two blocks to each side of the main diagonal
        assert Mask(Diagonal(blocks_wide / 1024), layout, 16, 16).table.count == blocks_wide
        assert Mask(Diagonal((blocks_wide - 1e-3) / 1024), layout, 16, 16).table.count < blocks_wide
    assert Mask(Diagonal(32 / 1024), layout, 16, 16).table.count == 32
    with pytest.raises(UsageError, match="ask for more, or for smaller blocks"):
        Mask(Diagonal(31.9 / 1024), layout, 16, 16).density  # noqa: B018


def test_another_seed_draws_other_blocks_and_the_same_seed_the_same():
    layout = TokenLayout(8, 8, 8)
    one, again, other = (
        find_pattern(f"random(density=0.25, seed={seed})").blocks(layout, 16, 16) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.sum() == other.sum() == 256


def test_rows_differ_by_one_block_to_each_side_and_are_spread_evenly():
    rows = Mask(Diagonal(0.25), TokenLayout(64, 8, 8), 16, 16).table.rows
    reaches = [row[0][1] - number for number, row in enumerate(rows) if row[0][1] < 255]
    wider = [number for number, reach in enumerate(reaches) if reach == max(reaches)]
    assert max(reaches) - min(reaches) == 1
    assert 0 < len(wider) < len(reaches)
    gaps = np.diff(wider)
    assert gaps.max() <= 3 * gaps.min()


@pytest.mark.parametrize(
    ("density", "layout", "frames"),
    [
        (0.25, TokenLayout(11, 48, 85, before=226), 1.42),
        (0.25, TokenLayout(33, 45, 80, after=256), 4.35),
        (0.30, TokenLayout(21, 45, 80), 3.43),
    ],
    ids=["CogVideoX1.5", "HunyuanVideo", "Wan2.1"],
)
def test_the_formula_of_sparse_videogen_gives_its_widths(density: float, layout: TokenLayout, frames: float):
    assert width_of_density(density, layout) / layout.frame == pytest.approx(frames, abs=0.005)


def test_our_bands_are_as_wide_as_the_formula_says_but_for_blocks():
    layout = TokenLayout(33, 45, 80, after=256)
    rows = Mask(Diagonal(0.25), layout, 128, 128).table.rows
    reach = (rows[400][0][1] - 400) * 128
    assert reach == pytest.approx(width_of_density(0.25, layout), abs=128)


def test_a_density_below_the_text_has_no_width():
    with pytest.raises(ValueError, match=r"density 0\.1 at tokens\(.*\): text alone takes 0\.1111 of the pairs"):
        width_of_density(0.1, TokenLayout(17, 8, 8, after=64))


def test_the_page_names_the_densities_that_are_reached():
    rows = re.findall(
        r"^\| .* \| ([\d,]+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == len(REALISTIC)
    known = {layout.tokens: (layout, block) for layout, block in REALISTIC.values()}
    for tokens, *shown in rows:
        layout, block = known[int(tokens.replace(",", ""))]
        names = ("diagonal", "multi-diagonal", "vertical-stripe", "radial")
        found = [Mask(find_pattern(f"{name}(density=0.25)"), layout, block, block).density for name in names]
        assert [f"{density * 100:.2f}" for density in found] == shown


@settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])
@given(patterns.map(find_pattern), layouts, blocks)
def test_a_picture_with_a_pixel_a_token_is_the_mask(pattern: Pattern, layout: TokenLayout, block: int):
    mask = fitting(pattern, layout, block, block)
    assert np.allclose(token_shares(mask, layout.tokens), mask.tokens())
    positions = mask.table.mask(layout.tokens, layout.tokens, block, block)
    assert np.allclose(position_shares(mask, layout.tokens), positions)


def test_a_pixel_is_as_dark_as_the_share_of_its_pairs():
    mask = Mask(find_pattern("multi-diagonal(density=0.4)"), TokenLayout(4, 6, 5, before=8), 16, 16)
    whole = mask.tokens().reshape(32, 4, 32, 4).mean(axis=(1, 3))
    assert np.allclose(token_shares(mask, 32), whole)


@pytest.mark.parametrize("text", ["diagonal(density=0.25)", "multi-diagonal(density=0.25)"])
def test_a_picture_shows_the_mask_over_tokens_and_over_positions_and_text_at_the_edge(text: str):
    mask = Mask(find_pattern(text), TokenLayout(8, 8, 8, after=64), 16, 16)
    left, right = squares(picture(mask, pixels=576), pixels=576)
    for square, expected in ((left, mask.tokens()), (right, mask.table.mask(576, 576, 16, 16))):
        assert np.array_equal(square[EDGE + 1 :, EDGE + 1 :], np.where(expected[..., None], INK, PAPER))
        assert (square[0, -64:] == TEXT).all()
        assert (square[-64:, 0] == TEXT).all()
        assert not (square[0, EDGE + 1 : -64] == TEXT).all(axis=-1).any()
    assert picture(mask) == picture(mask)


def test_the_pictures_of_the_page_are_what_its_code_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(example("PICTURES"), {})
    drawn = sorted((tmp_path / "docs" / "images").iterdir())
    assert [path.name for path in drawn] == sorted(path.name for path in (DOCS / "images").glob("patterns-*.png"))
    assert set(re.findall(r"images/(patterns-.*?\.png)", PAGE)) >= {path.name for path in drawn}
    for path in drawn:
        kept = (DOCS / "images" / path.name).read_bytes()
        for found, expected in zip(squares(path.read_bytes(), 192), squares(kept, 192), strict=True):
            assert np.array_equal(found, expected), path.name


def test_the_pattern_of_the_page_works_from_its_file(tmp_path: Path):
    path = tmp_path / "near_frames.py"
    path.write_text(example("class NearFrames"))
    pattern = find_pattern(f"{path}:NearFrames(density=0.375)")
    layout = TokenLayout(8, 8, 8)
    check_pattern(pattern, layout, 16, 16)
    frames = np.arange(512) // 64
    apart = np.abs(frames[:, None] - frames[None, :])
    mask = Mask(pattern, layout, 16, 16).tokens()
    assert mask[apart <= 1].all()
    assert not mask[apart > 2].any()
    assert pattern == find_pattern(f"{path}:NearFrames(density=0.375)")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "blocks = np.eye(32, dtype=bool); blocks[5] = False",
            "1 of 32 blocks of queries attend to nothing, the first is block 5",
        ),
        ("blocks = np.eye(32)", "its blocks are float64 (32, 32); they must be bool (32, 32)"),
        ("blocks = np.eye(31, dtype=bool)", "its blocks are bool (31, 31); they must be bool (32, 32)"),
        ("raise ValueError('it is for one frame only')", "blocks of 16 x 16: it is for one frame only"),
    ],
)
def test_a_pattern_of_the_users_that_breaks_a_rule_is_refused(body: str, said: str, tmp_path: Path):
    pattern = own(tmp_path, f"def blocks(self, layout, block_q, block_k): {body}; return blocks")
    with pytest.raises(UsageError) as caught:
        pattern.table(TokenLayout(8, 8, 8), 16, 16)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("0:511*1", "its order names 511 tokens; there are 512"),
        ("0:511*1,0:1*1", "order '0:511*1,0:1*1': it does not name each of 512 tokens once"),
    ],
)
def test_an_order_that_loses_a_token_is_refused(order: str, said: str, tmp_path: Path):
    methods = """\
    def blocks(self, layout, block_q, block_k): return np.ones((32, 32), dtype=bool)
    def order(self, layout): return TokenOrder.parse({order!r})
    """
    pattern = own(tmp_path, dedent(methods).format(order=order))
    with pytest.raises(UsageError, match=re.escape(said)):
        pattern.table(TokenLayout(8, 8, 8), 16, 16)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (
            "def blocks(self, layout, block_q, block_k): return np.eye(36, dtype=bool)",
            "not all rows and columns of text",
        ),
        (
            "def blocks(self, layout, block_q, block_k): return np.random.rand(36, 36) < 0.5",
            "gives other blocks when it is asked again",
        ),
        (
            "def blocks(self, layout, block_q, block_k): return np.ones((36, 36), dtype=bool)\n"
            "def order(self, layout): return TokenOrder.parse('64:512*1,0:64*1')",
            "its order moves text",
        ),
        (
            "density: float = 0.5\ndef blocks(self, layout, block_q, block_k): return np.ones((36, 36), dtype=bool)",
            "its density is 1.0, more than the 0.5 asked for",
        ),
    ],
)
def test_the_conformance_suite_finds_broken_promises(methods: str, said: str, tmp_path: Path):
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_pattern(own(tmp_path, methods), TokenLayout(8, 8, 8, before=64), 16, 16)


def test_a_file_that_is_not_there_cannot_be_imported_or_has_no_such_pattern_is_named(tmp_path: Path):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    for text, said in (
        (f"{tmp_path}/missing.py:Own", f"there is no file {tmp_path}/missing.py"),
        (f"{broken}:Own", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            find_pattern(text)
    own(tmp_path, "def blocks(self, layout, block_q, block_k): ...")
    with pytest.raises(UsageError, match=r"own\.py defines no Pattern called Other"):
        find_pattern(f"{tmp_path / 'own.py'}:Other")


def fitting(pattern: Pattern, layout: TokenLayout, block_q: int, block_k: int) -> Mask:
    """The mask; examples in which text and the narrowest form exceed the density are passed over."""
    mask = Mask(pattern, layout, block_q, block_k)
    try:
        pattern.table(layout, block_q, block_k)
    except UsageError as error:
        assume("what it keeps in any case has density" not in str(error))
        raise
    return mask


def own(folder: Path, methods: str) -> Pattern:
    """A pattern of the user's own, from a file."""
    header = """\
    from dataclasses import dataclass
    import numpy as np
    from intarsia.kernels.block_sparse_attention.order import TokenOrder
    from intarsia.passes.patterns.base import Pattern

    @dataclass(frozen=True)
    class Own(Pattern):
        name = "own"
    """
    path = folder / "own.py"
    path.write_text(dedent(header) + "".join(f"    {line}\n" for line in methods.splitlines()))
    return find_pattern(f"{path}:Own")


def example(word: str) -> str:
    """The code of the page that holds this word."""
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in code)
    return found


def squares(png: bytes, pixels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The two squares of a picture, without what is written over them."""
    from PIL import Image

    drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    side, top = pixels + EDGE + 1, GAP + 2 * LINE
    left, right = (drawn[top : top + side, first : first + side] for first in (GAP, 2 * GAP + side))
    return left, right
