import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from intarsia.models import train_wan_mini
from intarsia.models.base import find, load
from intarsia.models.train_wan_mini import Recipe, train

pytest.importorskip("diffusers")


@pytest.fixture
def three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_wan_mini, "_shares", lambda seconds: iter([0.02, 0.2, 0.4]))


@pytest.mark.usefixtures("three_steps")
def test_training_writes_weights_that_load_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    recipe = Recipe(batch=1, device="cpu")
    train(recipe, tmp_path / "first")
    module = load(find("wan-mini"), weights=tmp_path / "first" / "wan-mini.safetensors")
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    train(recipe, tmp_path / "second", resume=tmp_path / "first")
    assert json.loads((tmp_path / "second" / "step.json").read_text()) == {"step": 6}
    first, second = (load_file(tmp_path / run / "live.safetensors") for run in ("first", "second"))
    moved = (second["proj_out.weight"] - first["proj_out.weight"]).abs().max()
    assert 0 < moved < 0.02
    assert not list(tmp_path.rglob("*.unfinished"))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(learning_rate=1.0, warm_up=0.1)
    rates = [train_wan_mini._learning_rate(recipe, share) for share in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_an_evaluation_counts_what_is_read(tmp_path: Path) -> None:
    model = find("wan-mini")
    assert model.sampler is not None
    report = train_wan_mini.evaluate(
        lambda *, hidden_states, **_: hidden_states, model.sampler, count=3, sheet=tmp_path / "sheet.png"
    )
    assert report["count"] == 3
    assert report["guidance"] == 3.0
    assert 0 <= report["all"] <= report["colour"] <= 1
    assert (tmp_path / "sheet.png").stat().st_size > 0
