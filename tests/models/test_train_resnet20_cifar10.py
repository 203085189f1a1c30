from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from intarsia.models import train_resnet20_cifar10 as training
from intarsia.models.base import find, load
from intarsia.models.cifar10 import Pictures, normalised
from intarsia.models.classification import classify
from intarsia.models.train_resnet20_cifar10 import CHECKPOINT, WEIGHTS, Recipe, train

RECIPE = Recipe(epochs=2, batch=8)

EPOCHS = 6
"""Enough to know 32 pictures by heart."""


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def colours() -> Pictures:
    """Pictures of one colour each, which few epochs are enough to tell apart by brightness."""
    labels = torch.arange(32) % 2
    pixels = (labels * 200 + 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    return Pictures(pixels, labels)


def test_training_writes_weights_that_load_and_know_the_training_pictures(
    colours: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = train(
        replace(RECIPE, epochs=EPOCHS, average=0.5, early=0.0, learning_rate=0.05), colours, colours, tmp_path
    )
    assert report["accuracy"] == 1
    assert report["epochs"] == EPOCHS
    module = load(find("resnet20-cifar10"), weights=tmp_path / WEIGHTS)
    assert classify(module, normalised(colours.pixels), colours.labels, batch=32).accuracy == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{epoch}/{EPOCHS}" for epoch in range(1, EPOCHS + 1)]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    colours: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(RECIPE, colours, colours, tmp_path / "whole")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    step = training._step

    def killed(state: training.Training, *args: object, **keywords: object) -> torch.Tensor:
        if state.step == 6:
            raise Killed
        return step(state, *args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_step", killed)
    with pytest.raises(Killed):
        train(RECIPE, colours, colours, tmp_path / "cut")
    monkeypatch.setattr(training, "_step", step)
    train(RECIPE, colours, colours, tmp_path / "cut")
    for file in (WEIGHTS, CHECKPOINT):
        whole, cut = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole), file


def test_a_finished_run_is_judged_again_without_a_step(colours: Pictures, tmp_path: Path) -> None:
    first = train(RECIPE, colours, colours, tmp_path)
    written = (tmp_path / WEIGHTS).read_bytes()
    assert train(RECIPE, colours, colours, tmp_path) == first
    assert (tmp_path / WEIGHTS).read_bytes() == written


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(learning_rate=1.0, warm_up=0.2)
    rates = [training._learning_rate(recipe, share) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_the_first_epochs_see_smaller_squares() -> None:
    assert [Recipe(epochs=5).side(epoch) for epoch in range(5)] == [24, 24, 24, 24, 32]
