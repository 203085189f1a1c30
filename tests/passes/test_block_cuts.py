"""The residual stream of a video transformer and where its blocks end, found without a name of a module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.passes.block_cuts import BlockCuts

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = (GOLDEN / "small-video.graph").read_text()

SEQUENTIAL = """graph sequential {
  input %hidden_states: f32[2, 2, 4, 8, 8]
  param %patch.weight: f32[16, 2, 1, 2, 2]
  %patch: f32[2, 16, 4, 4, 4] = aten.conv3d(input=%hidden_states, weight=%patch.weight, bias=None, stride=[1, 2, 2])
  %flat: f32[2, 16, 64] = aten.flatten.using_ints(self=%patch, start_dim=2, end_dim=4)
  %tokens: f32[2, 64, 16] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
  %heads: f32[2, 64, 2, 8] = aten.view(self=%tokens, size=[2, 64, 2, 8])
  %q: f32[2, 2, 64, 8] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %y: f32[2, 2, 64, 8] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  return %y
}
"""


def test_a_block_ends_where_the_next_attention_is_added() -> None:
    cuts = BlockCuts.of(Graph.parse(TEXT))
    assert cuts == BlockCuts("tokens", "blocks.0.moved", ("blocks.0", "blocks.1"))
    assert cuts.last == "blocks.1"


SUM = re.compile(
    r"(?P<name>%\S+): f32\[2, 64, 16\] = aten\.add\.Tensor\(self=(?P<self>%\S+), other=(?P<other>%blocks\S+)\)"
)

WIDE_SUM = """\\g<name>.wide: f64[2, 64, 16] = aten._to_copy(self=\\g<self>, dtype=torch.float64)
  \\g<name>.term: f64[2, 64, 16] = aten._to_copy(self=\\g<other>, dtype=torch.float64)
  \\g<name>.sum: f64[2, 64, 16] = aten.add.Tensor(self=\\g<name>.wide, other=\\g<name>.term)
  \\g<name>: f32[2, 64, 16] = aten.type_as(self=\\g<name>.sum, other=\\g<self>)"""


def test_every_block_of_a_stream_whose_sums_are_in_a_wider_type_ends_in_its_own() -> None:
    wide, count = SUM.subn(WIDE_SUM, TEXT)
    assert count == 6
    assert BlockCuts.of(Graph.parse(wide)) == BlockCuts("tokens", "blocks.0.moved", ("blocks.0", "blocks.1"))


def test_a_stream_whose_sums_are_in_a_wider_type_is_cut_in_its_own() -> None:
    graph = Graph.parse((GOLDEN / "wan-block-bf16.clean.graph").read_text())
    cuts = BlockCuts.of(graph)
    assert cuts == BlockCuts("clone", "blocks.0.type_as", ("blocks.0.type_as_4",))
    assert {graph.type(name).dtype for name in (cuts.first, cuts.signal, cuts.last)} == {"bf16"}


def test_a_stream_that_ends_in_another_type_than_it_begins_with_is_refused() -> None:
    wide = TEXT.replace(
        "f32[2, 64, 16] = aten.add.Tensor(self=%blocks.0.told,", "f64[2, 64, 16] = aten.add.Tensor(self=%blocks.0.told,"
    )
    with pytest.raises(Unsupported, match=r"%tokens, %blocks\.0 and what is between them are not of one type"):
        BlockCuts.of(Graph.parse(wide))


def test_casts_between_sums_are_followed() -> None:
    wide = TEXT.replace(
        "  %blocks.1.seen: f32[2, 64, 16] = aten.add.Tensor(self=%blocks.0,",
        "  %wide: f32[2, 64, 16] = aten._to_copy(self=%blocks.0, dtype=torch.float32)\n"
        "  %blocks.1.seen: f32[2, 64, 16] = aten.add.Tensor(self=%wide,",
    )
    assert BlockCuts.of(Graph.parse(wide)) == BlockCuts("tokens", "blocks.0.moved", ("blocks.0", "blocks.1"))


def test_attention_that_nothing_goes_around_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="sequential: no residual stream: no sum of a value and what was computed"):
        BlockCuts.of(Graph.parse(SEQUENTIAL))
    broken = TEXT.replace("(self=%blocks.0, other=%blocks.1.self.o)", "(self=%blocks.1.self.o, other=%blocks.1.self.o)")
    reason = "the sums that end in %blocks.1 begin at %blocks.1.seen, behind %blocks.0.self; caching steps needs one"
    with pytest.raises(Unsupported, match=reason):
        BlockCuts.of(Graph.parse(broken))
