"""The report: one page, made from the files of a bundle alone, that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from intarsia.ir.errors import UsageError
from intarsia.report import page_of, write_report

Handmade = Callable[..., Path]


def test_the_page_needs_nothing_but_itself(handmade: Handmade, tmp_path: Path):
    page = write_report(handmade(), tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not re.search(r"url\(|@import|<script|<link", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_head_tells_what_was_gained_and_what_it_cost(handmade: Handmade):
    page = page_of(handmade())
    assert page.title == "wan-mini for cpu-avx2"
    assert "3.59x smaller" in page.verdict
    assert "37.21 dB PSNR, where 35.00 dB was asked" in page.verdict
    cards = {card.label: card for card in page.cards}
    assert (cards["Weights"].value, cards["Weights"].detail) == ("3.59x smaller", "7.14 MB to 1.99 MB")
    assert cards["Predicted time"].value == "2.35x as fast"
    assert cards["Measured time"].value == "2.07x as fast"
    assert (cards["PSNR"].mood, cards["PSNR"].detail) == ("good", "asked 35.00 dB; floor 13.20 dB")


def test_a_goal_that_is_missed_shows(handmade: Handmade):
    folder = handmade()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["quality"]["goal"] = "psnr>=40"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert next(card for card in page_of(folder).cards if card.label == "PSNR").mood == "bad"


def test_the_map_has_a_row_for_each_block_and_a_column_for_each_kind(handmade: Handmade):
    (map_,) = page_of(handmade(blocks=6)).maps
    assert [row.name for row in map_.rows] == [f"blocks.{block}" for block in range(6)]
    assert map_.kinds[0] == ("attn1", "to_q")
    assert len(map_.kinds) == 8
    assert all(cell is not None for row in map_.rows for cell in row.cells)
    assert [cell.place for cell in map_.others] == ["condition_embedder.time_proj"]


def test_shades_follow_the_order_in_which_options_are_offered(handmade: Handmade):
    (map_,) = page_of(handmade()).maps
    assert [(entry.name, entry.tone) for entry in map_.legend] == [
        ("keep", 0), ("i8", 1), ("i4(group=32)", 2), ("i4(group=64)", 3), ("i4(group=128)", 4),
    ]  # fmt: skip
    assert sum(entry.count for entry in map_.legend) == 49


def test_every_place_tells_what_was_tried_and_why(handmade: Handmade):
    (map_,) = page_of(handmade()).maps
    place = next(place for place in map_.places if place.name == "condition_embedder.time_proj")
    assert place.chosen == "i8"
    assert place.why.startswith("saves 48,497 bytes")
    assert [tried.text for tried in place.tried if tried.chosen] == ["i8: error 4e-05, 48.5 kB less, 14.8 µs less"]
    assert len(place.tried) == 5
    assert map_.places[-1].why == "16 rows are fewer than min_rows=32"


def test_quality_stands_between_its_floor_and_its_best_sample(handmade: Handmade):
    row = next(row for row in page_of(handmade()).metrics if row.name == "PSNR")
    assert row.floor is not None
    assert row.goal is not None
    assert row.floor < row.goal < row.mean
    assert len(row.dots) == 8
    assert (row.mean_text, row.worst_text, row.floor_text) == ("37.21 dB", "36.16 dB", "13.20 dB")


def test_measured_stands_beside_predicted(handmade: Handmade):
    seconds, sizes = page_of(handmade()).bars
    assert [bar.text for bar in seconds.bars] == ["22.1 ms", "9.4 ms", "31.2 ms", "15.1 ms"]
    assert [bar.text for bar in sizes.bars] == ["7.14 MB", "1.99 MB", "2.11 MB"]
    assert max(bar.percent for bar in seconds.bars) == 100


def test_the_plan_that_was_chosen_is_marked_among_those_that_were_measured(handmade: Handmade):
    trail = page_of(handmade()).trail
    assert trail is not None
    assert len(trail.dots) == 7
    assert [dot.chosen for dot in trail.dots] == [False, False, False, True, False, False, False]
    assert [dot.met for dot in trail.dots] == [False] * 3 + [True] * 4


def test_command_versions_fingerprints_and_hashes_are_there(handmade: Handmade, tmp_path: Path):
    page = write_report(handmade(), tmp_path / "page.html").read_text()
    for text in ("intarsia optimize wan-mini", "2.13.0", "0123456789ab", "cd" * 32, "psnr&gt;=35"):
        assert text in page


def test_a_bundle_without_plan_frames_or_quality_has_a_page_without_them(handmade: Handmade, tmp_path: Path):
    folder = handmade(frames=False)
    for name in ("plan.json", "measurements.json", "config.json"):
        (folder / name).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "quality": {}, "predicted": {}}))
    page = page_of(folder)
    assert (page.maps, page.trail, page.metrics, page.pictures) == ((), None, (), ())
    assert "Engine on disk" in [card.label for card in page.cards]
    assert "Frames" not in write_report(folder, tmp_path / "page.html").read_text()


def test_names_are_never_markup(handmade: Handmade, tmp_path: Path):
    folder = handmade()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": "<script>alert(1)</script>"}))
    assert "<script>" not in write_report(folder, tmp_path / "page.html").read_text()


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="is no bundle"):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
