import pytest
import torch

from intarsia.models import detector, shapes
from intarsia.models.detector import Recognised


def drawn_of_each_label() -> torch.Tensor:
    return shapes.draw(shapes.words(shapes.labels() * 5), torch.Generator().manual_seed(3))


@pytest.mark.parametrize("disturbance", [0.0, 0.1])
def test_reads_what_was_drawn(disturbance: float) -> None:
    videos = drawn_of_each_label()
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(5))
    shown = detector.read(videos + disturbance * noise)
    assert detector.recognised(shapes.labels() * 5, shown).all >= 0.99


def test_sees_nothing_in_an_empty_video() -> None:
    assert detector.read(torch.full((2, 3, 8, 32, 32), -0.8)) == [None, None]


def test_sees_nothing_where_the_object_vanishes() -> None:
    videos = drawn_of_each_label()[:1]
    videos[:, :, 5] = torch.tensor(shapes.BACKGROUND)[:, None, None]
    assert detector.read(videos) == [None]


def test_half_precision_reads_the_same() -> None:
    videos = drawn_of_each_label()[:48]
    assert detector.read(videos.bfloat16()) == list(shapes.labels())


def test_shares_are_counted_by_kind_and_nothing_seen_is_wrong_in_all() -> None:
    asked = [
        shapes.Label.parse(text) for text in ("red disc moving left", "red disc moving left", "blue disc moving up")
    ]
    shown = [shapes.Label.parse("red disc moving left"), shapes.Label.parse("red square moving left"), None]
    assert detector.recognised(asked, shown) == Recognised(shape=1 / 3, colour=2 / 3, motion=2 / 3, all=1 / 3)
