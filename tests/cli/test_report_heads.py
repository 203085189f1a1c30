"""The report on sparse attention: modes of heads, their attention under the masks, and how far the choice carries."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia import flow, report_attention
from intarsia.backends.bundle import load_bundle
from intarsia.ir.errors import InvalidGraph
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import save_weights
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.masks import Mask
from intarsia.passes.patterns.pictures import token_shares
from intarsia.report import page_of, render
from intarsia.report_attention import head_maps, parts_of, short_names, spread, why_not_run
from intarsia.report_charts import trail
from intarsia.report_heads import HeadsSection, heads_section
from intarsia.report_modes import density_of, mode_of
from intarsia.report_strips import EMPTY, LEVELS, SHARES, HeadMap, short, strip

RUN = "sparse-attention(tokens='tokens(frames=8, height=8, width=8)')"
LAYOUT = TokenLayout(8, 8, 8)
DIAGONAL, MULTI = "diagonal(density=0.25)", "multi-diagonal(density=0.25)"
STRIPE = "vertical-stripe(density=0.25, columns='5,9')"
FIRST = {"blocks.0.y#0": DIAGONAL, "blocks.0.y#1": "skip", "blocks.0.y#2": MULTI, "blocks.0.y#3": DIAGONAL}
SECOND = {"blocks.1.y#1": STRIPE}

LAYER = """\
  %{0}.q: f32[1, 512, 64] = aten.linear(input=%{1}, weight=%{0}.wq)
  %{0}.k: f32[1, 512, 64] = aten.linear(input=%{1}, weight=%{0}.wk)
  %{0}.v: f32[1, 512, 64] = aten.linear(input=%{1}, weight=%{0}.wv)
  %{0}.q4: f32[1, 512, 4, 16] = aten.view(self=%{0}.q, size=[1, 512, 4, 16])
  %{0}.k4: f32[1, 512, 4, 16] = aten.view(self=%{0}.k, size=[1, 512, 4, 16])
  %{0}.v4: f32[1, 512, 4, 16] = aten.view(self=%{0}.v, size=[1, 512, 4, 16])
  %{0}.qh: f32[1, 4, 512, 16] = aten.permute(self=%{0}.q4, dims=[0, 2, 1, 3])
  %{0}.kh: f32[1, 4, 512, 16] = aten.permute(self=%{0}.k4, dims=[0, 2, 1, 3])
  %{0}.vh: f32[1, 4, 512, 16] = aten.permute(self=%{0}.v4, dims=[0, 2, 1, 3])
  %{0}.y: f32[1, 4, 512, 16] = aten.scaled_dot_product_attention(query=%{0}.qh, key=%{0}.kh, value=%{0}.vh)
  %{0}.z: f32[1, 512, 4, 16] = aten.permute(self=%{0}.y, dims=[0, 2, 1, 3])
  %{0}.flat: f32[1, 512, 64] = aten.reshape(self=%{0}.z, shape=[1, 512, 64])
  %{0}.out: f32[1, 512, 64] = aten.linear(input=%{0}.flat, weight=%{0}.wo)
"""
PARAMS = "".join(
    f"  param %blocks.{layer}.{name}: f32[64, 64]\n" for layer in (0, 1) for name in ("wq", "wk", "wv", "wo")
)
GRAPH = (
    f"graph heads {{\n  input %x: f32[1, 512, 64]\n{PARAMS}"
    f"{LAYER.format('blocks.0', 'x')}{LAYER.format('blocks.1', 'blocks.0.out')}  return %blocks.1.out\n}}\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four heads over eight frames of 8 x 8 tokens, as a graph with weights."""
    path = tmp_path_factory.mktemp("heads") / "heads.graph"
    path.write_text(GRAPH)
    generator = torch.Generator().manual_seed(0)
    weights = {value.name: torch.randn(64, 64, generator=generator) / 4 for value in Graph.parse(GRAPH).params}
    save_weights(weights, path.with_suffix(".safetensors"))
    return path


def plan(*, fuse: bool, **notes: object) -> Plan:
    steps = (Step(RUN, {**FIRST, **SECOND}), *([Step("fuse-heads")] if fuse else []))
    return Plan(Graph.parse(GRAPH).fingerprint, "null", (Phase(steps),), notes)


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "gathered"])
def bundle(model: Path, request: pytest.FixtureRequest) -> Path:
    """The bundle of a plan for all heads, with their order in the weights and without."""
    output = model.parent / f"bundle-{request.param}"
    flow.export(model, plan(fuse=request.param), backends=("null",), target="null", output=output, effort="quick")
    return output


def section(folder: Path) -> HeadsSection:
    found = page_of(folder).heads
    assert found is not None
    return found


def test_the_map_of_modes_has_a_row_for_each_layer_and_a_column_for_each_head(bundle: Path):
    found = section(bundle)
    (grid,) = found.grids
    assert [label.text for label in grid.layers] == ["blocks.0", "blocks.1"]
    assert [label.text for label in grid.heads] == ["0", "1", "2", "3"]
    assert [cell.label for cell in grid.cells] == ["25", "", "25", "25", "", "25", "", ""]
    assert grid.cells[5].text == f"blocks.1.y#1: {STRIPE}"
    assert {mode.name: mode.count for mode in found.modes} == {
        "dense": 3, "skip": 1, "diagonal": 2, "multi-diagonal": 1, "vertical-stripe": 1,
    }  # fmt: skip
    assert len({mode.tone for mode in found.modes}) == 5


def test_every_head_has_its_own_attention_whatever_the_order_in_which_the_graph_computes_them(
    bundle: Path, model: Path
):
    (variant,) = load_bundle(bundle).variants
    options = {"blocks.0.y": [FIRST[f"blocks.0.y#{head}"] for head in range(4)]}
    maps = head_maps(variant, options)["blocks.0.y"]
    assert maps[1] is None
    (x,) = variant.sample.inputs
    weights = _weights(model)
    query, key = ((x[0] @ weights[f"blocks.0.{name}"].T).view(512, 4, 16) for name in ("wq", "wk"))
    for head in (0, 2, 3):
        found = maps[head]
        assert found is not None
        dense = torch.softmax(query[:, head] @ key[:, head].T / 4, dim=-1)
        expected = dense.view(64, 8, 64, 8).mean((1, 3)).numpy()
        sampled = dense.view(64, 8, 64, 8)[:, 1::2].mean((1, 3)).numpy()  # the queries that are looked at
        np.testing.assert_allclose(found.weights, sampled, rtol=1e-4)
        assert np.corrcoef(found.weights.ravel(), expected.ravel())[0, 1] > 0.9
        mask = Mask(find_pattern(str(FIRST[f"blocks.0.y#{head}"])), LAYOUT, 16, 16)
        np.testing.assert_allclose(found.computed, token_shares(mask, 64), atol=1e-9)
        assert found.kept == pytest.approx(float((dense.numpy() * mask.tokens()).sum() / dense.sum()), abs=0.05)


def _weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model.with_suffix(".safetensors"))


def test_the_page_holds_a_picture_for_each_layer_and_needs_nothing_else(bundle: Path):
    page = render(bundle)
    pictures = re.findall(r'<image href="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert image.size == (4 * 64 + 3 * 6, 64)
    assert "skipped" in page
    assert "keeps 100%" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "Not drawn" not in page


def test_notes_tell_strategy_density_and_how_far_the_choice_carries(bundle: Path):
    notes = {
        "strategy": "HeadSearch(choose='exact', phases=8, density=0.25, transfer=True)",
        "density": 0.2498,
        "gap": 0.0,
        "transfer": {"agreement": 0.83, "loss_db": 0.4, "metric": "psnr"},
    }
    found = heads_section(bundle, plan(fuse=True, **notes))
    assert found is not None
    assert found.strategy == "heads(density=0.25)"
    assert found.sentences == (
        "8 heads of 2 layers in one phase compute 25.0% of all pairs of queries and keys, in the mean over heads and "
        "steps.",
        "No other choice within the budget has a smaller sum of errors.",
        "83% of heads would have been chosen alike on other prompts and noise; choosing there would gain 0.40 dB of "
        "PSNR.",
    )


def test_cells_tell_why_where_a_search_noted_it(bundle: Path):
    options = [("dense", 0.0, 0.0), (DIAGONAL, 0.01, -1e-4), ("skip", 0.2, -2e-4)]
    listed = [{"option": o, "error": error, "seconds": seconds, "bytes": 0} for o, error, seconds in options]
    noted = [{"steps": [0, 0], "step": 0, "place": "blocks.0.y#0", "options": listed}]
    found = heads_section(bundle, plan(fuse=True, places=noted, error=0.1))
    assert found is not None
    assert found.grids[0].cells[0].text == (
        f"blocks.0.y#0: {DIAGONAL}. saves 100 us at 10.0% of the plan's error; "
        "next, skip would save 200 us at 200.0% of the plan's error"
    )


def test_notes_of_other_passes_and_of_other_choices_are_left_out(bundle: Path):
    listed = [{"option": o, "error": 0.0, "seconds": 0.0, "bytes": 0} for o in ("dense", "radial")]
    noted = [{"step": 0, "place": "blocks.0.y#0", "options": listed}, {"step": 1, "place": "linear", "options": []}]
    found = heads_section(bundle, plan(fuse=True, places=noted))
    assert found is not None
    assert found.grids[0].cells[0].text == f"blocks.0.y#0: {DIAGONAL}"


def test_a_bundle_that_is_too_large_to_run_says_so_in_place_of_maps(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_attention, "TOKENS", 256)
    found = section(bundle)
    assert found.attention == ()
    assert found.why_no_maps == "the program has 512 tokens, and its slow reference is run for up to 256 only"
    monkeypatch.setattr(report_attention, "TOKENS", 512)
    monkeypatch.setattr(report_attention, "WEIGHTS", 1000)
    assert "and its slow reference is run for up to" in why_not_run(load_bundle(bundle).variants[0])


def test_heads_that_a_plan_groups_otherwise_than_the_graph_are_refused(bundle: Path):
    (variant,) = load_bundle(bundle).variants
    with pytest.raises(InvalidGraph, match=r"%blocks.0.y: 2 calls of attention for 1 patterns of heads"):
        head_maps(variant, {"blocks.0.y": ["dense"] * 4})


def test_large_models_are_drawn_in_part_and_the_caption_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_attention, "HEADS", 2)
    found = section(bundle)
    assert found.attention_note == "Drawn: the first 2 of 4 heads."
    assert [len(strip.labels) for strip in found.attention[0].strips] == [2, 2]
    assert spread(list(range(40)), 12)[:3] == [0, 4, 7]
    assert (spread(list(range(40)), 12)[-1], len(spread(list(range(40)), 12))) == (39, 12)


def test_heads_that_nothing_names_are_counted_in_the_graph(model: Path, tmp_path: Path):
    steps = (Step(RUN, {"blocks.0.y#0": "skip"}), Step("fuse-heads"))
    skipping = Plan(Graph.parse(GRAPH).fingerprint, "null", (Phase(steps),))
    flow.export(model, skipping, backends=("null",), target="null", output=tmp_path / "out", effort="quick")
    found = section(tmp_path / "out")
    assert [cell.text for cell in found.grids[0].cells] == [
        "blocks.0.y#0: skip", "blocks.0.y#1: dense", "blocks.0.y#2: dense", "blocks.0.y#3: dense",
    ]  # fmt: skip
    assert [label.kept for label in found.attention[0].strips[0].labels] == ["", *["keeps 100%"] * 3]


def test_a_plan_whose_files_are_gone_has_modes_and_no_maps(bundle: Path, tmp_path: Path):
    found = heads_section(tmp_path, plan(fuse=True))
    assert found is not None
    assert len(found.grids[0].cells) == 4 + 2  # heads that nothing names are not known of
    assert "no bundle" in found.why_no_maps


def test_plans_without_heads_have_no_such_section(tmp_path: Path):
    dense = Plan("g", "null", (Phase((Step("quantize-linear", {"a": "i8"}), Step(RUN))),))
    assert heads_section(tmp_path, dense) is None
    assert heads_section(tmp_path, None) is None


def test_colours_tell_attention_that_is_computed_from_attention_that_is_lost():
    weights = np.full((64, 64), 1e-6)
    weights[:, 0] = 1.0
    computed = np.zeros((64, 64))
    computed[:32] = 1.0
    made = strip("blocks.0", (HeadMap(weights, computed, 0.5), None), (DIAGONAL, "skip"))
    image = Image.open(io.BytesIO(base64.b64decode(made.picture.partition(",")[2])))
    pixels = np.asarray(image)
    assert pixels[0, 0] == (SHARES - 1) * LEVELS + LEVELS - 1  # much, computed
    assert pixels[0, 9] == (SHARES - 1) * LEVELS  # little, computed
    assert pixels[63, 0] == LEVELS - 1  # much, lost
    assert (pixels[:, 64:] == EMPTY).all()
    assert image.info["transparency"] == EMPTY
    assert [label.kept for label in made.labels] == ["keeps 50%", ""]


def test_parts_divide_the_tokens_where_they_can():
    assert [parts_of(tokens) for tokens in (16, 512, 1536, 17776, 1009)] == [16, 64, 96, 88, 96]


def test_names_and_patterns_are_told_in_short():
    assert short_names(["blocks.0.attn1.y", "blocks.1.attn1.y"]) == ("blocks.0", "blocks.1")
    assert short_names(["dual.0.attn.y", "single.0.attn.y"]) == ("dual.0", "single.0")
    assert short_names(["blocks.0.attn1.y"]) == ("blocks.0.attn1.y",)
    assert [short(option) for option in (STRIPE, "multi-diagonal(density=0.5)", "skip")] == [
        "stripe 25", "multi-diag. 50", "skip",
    ]  # fmt: skip
    assert mode_of("./mine.py:Checkers(density=0.5)") == "Checkers"
    assert density_of("./mine.py:Checkers(density=0.5)") == 0.5
    assert density_of("radial") is None


def test_measured_plans_of_equal_bytes_are_drawn_over_their_density():
    tried = [
        {
            "bytes": 9,
            "seconds": 1.0 + share,
            "density": share,
            "error": 1 - share,
            "margin": 0.0,
            "quality": {"psnr": q},
        }
        for share, q in ((0.125, 20.0), (0.25, 24.0), (0.5, 30.0))
    ]
    drawn = trail(plan(fuse=True, tried=tried, quality={"psnr": 24.0}), {})
    assert drawn is not None
    assert drawn.x_label == "share of pairs that attention computes"
    assert [dot.chosen for dot in drawn.dots] == [False, True, False]
    assert drawn.dots[1].text == "25.0%, 24.00 dB"
    for one in tried:
        del one["density"]
    told = trail(replace(plan(fuse=True), notes=json.loads(json.dumps({"tried": tried}))), {})
    assert told is not None
    assert told.x_label == "seconds a call, predicted"
