import pytest
import torch

from intarsia.models import shapes
from intarsia.models.shapes import Label, UnknownWord


def drawn(text: str, count: int = 64) -> torch.Tensor:
    said = shapes.words([Label.parse(text)] * count)
    return shapes.draw(said, torch.Generator().manual_seed(4))


def test_a_label_is_what_its_text_says() -> None:
    assert Label.parse("red disc moving left") == Label(shape="disc", colour="red", motion="left")


def test_case_and_spaces_do_not_matter() -> None:
    assert Label.parse("  Red  disc MOVING left ") == Label.parse("red disc moving left")


@pytest.mark.parametrize("label", shapes.labels(), ids=str)
def test_every_label_survives_its_text(label: Label) -> None:
    assert Label.parse(str(label)) == label


def test_there_are_48_labels() -> None:
    assert len(set(shapes.labels())) == len(shapes.labels()) == 48


def test_an_unknown_word_is_named_with_those_known() -> None:
    with pytest.raises(UnknownWord, match=r"^label: 'blob' is no shape; known: disc, square, triangle$"):
        Label.parse("red blob moving left")


@pytest.mark.parametrize("text", ["", "red disc", "red disc going left", "red big disc moving left"])
def test_text_of_another_form_is_told_the_form_and_the_words(text: str) -> None:
    with pytest.raises(UnknownWord, match=r"expected '<colour> <shape> moving <motion>'; colours: red, .*left, right"):
        Label.parse(text)


def test_videos_fill_their_range_and_no_more() -> None:
    videos = drawn("yellow square moving up")
    assert videos.shape == (64, 3, 8, 32, 32)
    assert videos.min() == pytest.approx(-0.8)
    assert videos.max() == pytest.approx(0.9)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_shape_has_the_disc_s_area(shape: str) -> None:
    place = torch.tensor([shapes.SHAPES.index(shape)])
    cover = shapes.coverage(place, torch.tensor([[5.0]]), torch.tensor([[[16.0, 16.0]]]))
    assert cover.sum().item() == pytest.approx(25 * torch.pi, rel=0.03)


@pytest.mark.parametrize("text", ["red disc moving left", "blue triangle moving down"])
def test_shapes_stay_inside_the_picture(text: str) -> None:
    said = shapes.words([Label.parse(text)] * 256)
    videos = shapes.draw(said, torch.Generator().manual_seed(9))
    areas = ((videos - videos.amin()).abs().amax(1) > 0.5).sum((2, 3)).float()
    assert (areas.amax(1) / areas.amin(1)).max() < 1.35


def test_some_shapes_bounce() -> None:
    cover = (drawn("red disc moving right")[:, 0] > 0).float()
    column = (cover.sum(2) * torch.arange(32)).sum(2) / cover.sum((2, 3))
    turned = (column.diff(dim=1) < -0.5).any(1)
    assert turned.any()
    assert not turned.all()
    assert (column.diff(dim=1)[:, : shapes.STRAIGHT_FRAMES] > 0.5).all()


def test_the_same_generator_draws_the_same_videos() -> None:
    assert torch.equal(drawn("green square moving left", 3), drawn("green square moving left", 3))


def test_conditioning_has_a_row_for_each_prompt_and_says_nothing_in_null() -> None:
    conditioning = shapes.condition(["red disc moving left", "blue square moving up"])
    assert conditioning.text.shape == conditioning.null.shape == (2, shapes.TEXT_TOKENS, shapes.TEXT_DIM)
    assert not torch.equal(conditioning.text[0], conditioning.text[1])
    assert torch.equal(conditioning.null[0], conditioning.null[1])
    assert conditioning.null[0, 0].argmax() == shapes.NULL


def test_random_words_are_labels_and_reach_all_of_them() -> None:
    said = shapes.random_words(2000, torch.Generator().manual_seed(0)).tolist()
    spoken = {tuple(shapes.WORDS[word] for word in row) for row in said}
    assert spoken == {(label.shape, label.colour, label.motion) for label in shapes.labels()}
