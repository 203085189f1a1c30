"""Along which axis of a value the video's tokens lie, found from data flow alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.passes.attention_sites import Site
from intarsia.passes.token_places import Place, TokenPlaces, restricted

GOLDEN = Path(__file__).parent.parent / "golden"

TEXT = (GOLDEN / "small-video.graph").read_text()

WIDE = "  param %wide: f32[16, 2, 1, 4, 4]\n  param"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("hidden_states", None),  # three axes, none of which is all tokens
        ("patch", None),
        ("flat", Place(2)),
        ("sequence", Place(1)),
        ("tokens", Place(1)),
        ("blocks.0.self.q", Place(2)),
        ("blocks.1.self.k", Place(2)),
        ("blocks.0.cross.q", Place(2)),
        ("blocks.0.cross.k", None),  # text
        ("text", None),
        ("shift", None),
        ("out", Place(1)),
        ("patches", None),
        ("velocity", None),
    ],
)
def test_tokens_are_followed_to_the_axis_that_they_lie_along(value: str, place: Place | None) -> None:
    assert TokenPlaces(Graph.parse(TEXT)).of(value) == place


def test_the_layout_is_that_of_the_video() -> None:
    places = TokenPlaces(Graph.parse(TEXT))
    assert (places.layout.frames, places.layout.height, places.layout.width) == (4, 4, 4)
    assert places.count == 64
    assert [name for name, found in places.attention.items() if isinstance(found, Site)] == [
        "blocks.0.self",
        "blocks.1.self",
    ]


def test_text_beside_the_video_is_counted() -> None:
    text = (GOLDEN / "joined-video.graph").read_text()
    places = TokenPlaces(Graph.parse(text))
    assert places.count == 64
    assert places.of("k") == Place(2, before=3)
    assert places.of("tokens") == places.of("video") == Place(1)
    turned = text.replace("[%encoder_hidden_states, %tokens]", "[%tokens, %encoder_hidden_states]")
    assert TokenPlaces(Graph.parse(turned)).of("k") == Place(2, after=3)


def test_an_axis_that_loses_tokens_is_named() -> None:
    assert restricted((2, 4, 88, 8), Place(2, before=16), "active") == (2, 4, "active + 16", 8)
    assert restricted((2, 64, 16), Place(1), "active") == (2, "active", 16)


def test_attention_among_other_tokens_beside_the_video_s_is_refused() -> None:
    coarse = """  %coarse: f32[2, 16, 4, 2, 2] = aten.conv3d(input=%hidden_states, weight=%wide, stride=[1, 4, 4])
  %coarse.flat: f32[2, 16, 16] = aten.flatten.using_ints(self=%coarse, start_dim=2, end_dim=4)
  %coarse.tokens: f32[2, 16, 16] = aten.transpose.int(self=%coarse.flat, dim0=1, dim1=2)
  %coarse.heads: f32[2, 16, 2, 8] = aten.view(self=%coarse.tokens, size=[2, 16, 2, 8])
  %coarse.q: f32[2, 2, 16, 8] = aten.transpose.int(self=%coarse.heads, dim0=1, dim1=2)
  %other: f32[2, 2, 16, 8] = aten.scaled_dot_product_attention(query=%coarse.q, key=%coarse.q, value=%coarse.q)
  return %velocity, %other
"""
    with pytest.raises(Unsupported, match="one set of tokens is followed"):
        TokenPlaces(Graph.parse(TEXT.replace("  return %velocity\n", coarse).replace("  param", WIDE, 1)))


def test_a_graph_without_attention_has_no_tokens(mlp: Graph) -> None:
    with pytest.raises(Unsupported, match="step allocation: mlp calls no attention"):
        TokenPlaces(mlp)
