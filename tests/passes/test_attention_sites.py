"""Where self-attention over video tokens is found, which layout it has, and why other attention is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from intarsia.flow import trace
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.attention_sites import Site, refused, sites, why_none
from intarsia.passes.drop_unused import DropUnused
from intarsia.passes.fuse_kernels import FuseKernels

MINIS = {
    "wan-mini": ("tokens(frames=8, height=8, width=8)", 6, 12),
    "cogvideox-mini": ("tokens(frames=3, height=4, width=6, before=16)", 2, 2),
    "cogvideox1.5-mini": ("tokens(frames=3, height=4, width=6, before=16)", 2, 2),
    "hunyuanvideo-mini": ("tokens(frames=3, height=4, width=6, after=16)", 3, 4),
    "ltx-mini": ("tokens(frames=3, height=4, width=6)", 2, 4),
}
"""Layout, sites, and all calls of attention."""

VIDEO = """graph video {
  input %video: bf16[1, 16, 21, 90, 160]
  input %text: bf16[1, 256, 5120]
  param %patch: bf16[5120, 16, 1, 2, 2]
  param %weight: bf16[5120, 5120]
  %grid: bf16[1, 5120, 21, 45, 80] = aten.conv3d(input=%video, weight=%patch, bias=None, stride=[1, 2, 2])
  %flat: bf16[1, 5120, 75600] = aten.flatten.using_ints(self=%grid, start_dim=2, end_dim=4)
  %tokens: bf16[1, 75600, 5120] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
"""
"""The patch embedding of Wan2.1-14B at 720p."""

ATTENTION = """
  %to_q: bf16[1, {n}, 5120] = aten.linear(input={q}, weight=%weight, bias=None)
  %to_k: bf16[1, {m}, 5120] = aten.linear(input={k}, weight=%weight, bias=None)
  %q_heads: bf16[1, {n}, 40, 128] = aten.view(self=%to_q, size=[1, -1, 40, 128])
  %k_heads: bf16[1, {m}, 40, 128] = aten.view(self=%to_k, size=[1, -1, 40, 128])
  %q: bf16[1, 40, {n}, 128] = aten.permute(self=%q_heads, dims=[0, 2, 1, 3])
  %k: bf16[1, 40, {m}, 128] = aten.permute(self=%k_heads, dims=[0, 2, 1, 3])
  %y: bf16[1, 40, {n}, 128] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%k{more})
  return %y
}}
"""

FLAT = """graph flat {
  input %tokens: f32[2, 88, 32]
  param %weight: f32[32, 32]
  %to_q: f32[2, 88, 32] = aten.linear(input=%tokens, weight=%weight, bias=None)
  %heads: f32[2, 88, 4, 8] = aten.view(self=%to_q, size=[2, 88, 4, 8])
  %q: f32[2, 4, 88, 8] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %y: f32[2, 4, 88, 8] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  return %y
}
"""


@pytest.fixture(scope="session")
def mini(wan_mini: Program) -> Callable[[str], Program]:
    """A small model by name, traced once for all tests that look at it."""
    return lru_cache(lambda name: wan_mini if name == "wan-mini" else trace(name))


def video(calls: str = "", *, tokens: str = "%tokens", n: int = 75600, more: str = "") -> Graph:
    """Self-attention of ``tokens`` that the calls make of Wan's."""
    return Graph.parse(VIDEO + calls + ATTENTION.format(q=tokens, k=tokens, n=n, m=n, more=more))


def reason(graph: Graph) -> str:
    assert sites(graph) == ()
    return refused(graph)["y"]


@pytest.mark.parametrize("name", MINIS)
def test_finds_every_self_attention_over_video_tokens_and_its_layout(mini: Callable[[str], Program], name: str) -> None:
    layout, count, calls = MINIS[name]
    graph = mini(name).graph
    found = sites(graph)
    assert {str(site.layout) for site in found} == {layout}
    assert (len(found), len(refused(graph))) == (count, calls - count)
    assert why_none(graph) is None
    for site in found:
        assert graph.type(site.query).shape == (2, site.heads, site.layout.tokens, site.head_dim)
        assert graph.type(site.key) == graph.type(site.value) == graph.type(site.query)


@pytest.mark.parametrize("name", ["wan-mini", "cogvideox-mini", "cogvideox1.5-mini", "hunyuanvideo-mini"])
def test_the_layout_is_where_a_changed_patch_of_the_video_arrives(mini: Callable[[str], Program], name: str) -> None:
    program = mini(name)
    site = sites(program.graph)[0]
    query = DropUnused().run(replace(program.graph, outputs=(site.query,)), None, {})  # type: ignore[arg-type]
    module = Program(query, {param.name: program.weights[param.name] for param in query.params}).module()
    inputs = {value.name: tensor for value, tensor in zip(query.inputs, example_inputs(query), strict=True)}
    latent = inputs["hidden_states"]
    grid = latent.clone().movedim(2 if name.startswith("cog") else 1, -1)
    layout, place = site.layout, (2, 1, 3)
    extents = (layout.frames, layout.height, layout.width)
    grid[:, *(index * (long // short) for index, long, short in zip(place, grid.shape[1:], extents, strict=False))] += 1
    changed = inputs | {"hidden_states": grid.movedim(-1, 2 if name.startswith("cog") else 1)}
    before, after = (module(*given.values())[0] for given in (inputs, changed))
    moved = (before != after).any(dim=3).any(dim=1)[0].nonzero().flatten().tolist()
    frame, row, column = place
    assert moved == [layout.before + (frame * layout.height + row) * layout.width + column]


def test_a_fused_graph_has_the_same_sites(mini: Callable[[str], Program], target: Target) -> None:
    for name in ("wan-mini", "hunyuanvideo-mini"):
        graph = mini(name).graph
        fused = FuseKernels(everywhere=True).run(graph, target, {})
        plain = [(site.name, site.layout, site.lengths) for site in sites(graph)]
        assert [(site.name, site.layout, site.lengths) for site in sites(fused)] == plain
        assert list(refused(fused)) == list(refused(graph))


def test_the_lengths_are_those_that_the_mask_is_proved_to_cut_keys_off_at(mini: Callable[[str], Program]) -> None:
    graph = mini("hunyuanvideo-mini").graph
    (lengths,) = {site.lengths for site in sites(graph)}
    assert lengths is not None
    assert graph.type(lengths).shape == (2,)
    assert {site.lengths for site in sites(mini("wan-mini").graph)} == {None}


def test_cross_attention_and_text_are_told_by_what_their_tokens_are_made_of(mini: Callable[[str], Program]) -> None:
    wan, hunyuan = refused(mini("wan-mini").graph), refused(mini("hunyuanvideo-mini").graph)
    assert set(wan.values()) == {
        "cross-attention: its queries' tokens are 8 x 8 x 8 of %hidden_states, "
        "its keys' are 3 of %encoder_hidden_states"
    }
    (refiner,) = hunyuan.values()
    assert refiner.startswith("its tokens are 16 of %encoder_hidden_states, not frames x height x width of a video;")


UNLISTED: dict[str, tuple[dict[str, object], dict[str, tuple[int, ...]], set[str]]] = {
    "EasyAnimateTransformer3DModel": (
        dict(sample_width=12, sample_height=8, time_embed_dim=8, text_embed_dim=16, mmdit_layers=1, patch_size=2),
        {},
        {"tokens(frames=3, height=4, width=6, before=7)"},
    ),
    "LatteTransformer3DModel": (
        dict(sample_size=8, patch_size=2, video_length=3, caption_channels=16, norm_type="ada_norm_single"),
        {"hidden_states": (1, 4, 3, 8, 8)},
        set(),
    ),
}
"""Transformers of diffusers that Intarsia has no entry for: arguments, other inputs, the layouts of their sites."""


@pytest.mark.parametrize("name", UNLISTED)
def test_models_that_nobody_registered_are_understood_as_well(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config, other, layouts = UNLISTED[name]
    shared = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1)
    module = getattr(diffusers, name)(**shared, **config).eval().requires_grad_(False)
    shapes = {"hidden_states": (1, 4, 3, 8, 12), "timestep": (1,), "encoder_hidden_states": (1, 7, 16)} | other
    inputs = {key: torch.ones(shape) for key, shape in shapes.items()}
    graph = trace(module, inputs=inputs, static={"return_dict": False}).graph
    assert {str(site.layout) for site in sites(graph)} == layouts
    assert (why_none(graph) is None) == bool(layouts)


def test_text_of_no_tokens_is_none() -> None:
    padded = """
  %none: bf16[1, 0, 5120] = aten.new_zeros(self=%text, size=[1, 0, 5120])
  %same: bf16[1, 75600, 5120] = aten.cat(tensors=[%tokens, %none], dim=1)
"""
    assert [site.layout for site in sites(video(padded, tokens="%same"))] == [TokenLayout(21, 45, 80)]


def test_a_named_batch_is_no_obstacle() -> None:
    text = str(video()).replace("bf16[1, ", "bf16[batch, ").replace("{", "{\n  size batch in [1, 64]", 1)
    assert [site.layout for site in sites(Graph.parse(text))] == [TokenLayout(21, 45, 80)]


def test_a_named_number_of_frames_is_one_reason() -> None:
    text = str(video()).replace("16, 21, 90", "16, frames, 90").replace("5120, 21, 45", "5120, frames, 45")
    text = text.replace("75600", "3600*frames").replace("{", "{\n  size frames in [1, 64]", 1)
    assert why_none(Graph.parse(text)) == (
        "no attention of video is among a video's tokens; the first of 1, %y: its tokens are 3600*frames, "
        "a named size; trace without --dynamic frames, height, width or text"
    )


def test_a_model_without_attention_says_so() -> None:
    graph = trace("resnet18", meta=True).graph
    assert sites(graph) == ()
    assert refused(graph) == {}
    assert why_none(graph) == "resnet18 calls no attention (aten.scaled_dot_product_attention or intarsia.attention)"


def test_a_published_size_is_found_as_a_small_one_is() -> None:
    (site,) = sites(video())
    assert site == Site("y", "q", "k", "k", 40, 128, TokenLayout(21, 45, 80), None)


def test_text_is_counted_before_and_behind_the_video() -> None:
    joined = """
  %one: bf16[1, 75856, 5120] = aten.cat(tensors=[%text, %tokens], dim=1)
  %head: bf16[1, 256, 5120] = aten.slice.Tensor(self=%one, dim=1, start=0, end=256)
  %rest: bf16[1, 75600, 5120] = aten.slice.Tensor(self=%one, dim=1, start=-75600, end=9223372036854775807)
  %both: bf16[1, 76112, 5120] = aten.cat(tensors=[%head, %rest, %text], dim=1)
"""
    (site,) = sites(video(joined, tokens="%both", n=76112))
    assert site.layout == TokenLayout(21, 45, 80, before=256, after=256)


def test_tokens_in_another_order_than_frame_row_column_are_refused() -> None:
    turned = """
  %turned: bf16[1, 5120, 45, 80, 21] = aten.permute(self=%grid, dims=[0, 1, 3, 4, 2])
  %line: bf16[1, 5120, 75600] = aten.reshape(self=%turned, shape=[1, 5120, 75600])
  %places: bf16[1, 75600, 5120] = aten.transpose.int(self=%line, dim0=1, dim1=2)
"""
    assert "its tokens are 45 x 80 x 21 of %video, not frames x height x width" in reason(
        video(turned, tokens="%places")
    )


@pytest.mark.parametrize(
    "moving",
    [
        "aten.roll(self=%tokens, shifts=[1], dims=[1])",
        "aten.flip(self=%tokens, dims=[1])",
        "aten.sort.stable(self=%tokens, stable=False, dim=1)",
    ],
)
def test_tokens_that_moved_are_not_taken_for_those_of_the_video(moving: str) -> None:
    outputs = "%moved: bf16[1, 75600, 5120]" + (", %order: i64[1, 75600, 5120]" if "sort" in moving else "")
    assert reason(video(f"  {outputs} = {moving}\n", tokens="%moved")).startswith("its tokens are 75600 of unknown")


def test_a_part_of_the_video_is_no_video() -> None:
    half = "  %half: bf16[1, 37800, 5120] = aten.slice.Tensor(self=%tokens, dim=1, start=0, end=37800)\n"
    assert reason(video(half, tokens="%half", n=37800)).startswith("its tokens are 37800 of unknown origin")


def test_attention_within_a_frame_is_refused() -> None:
    frames = """
  %frames: bf16[1, 21, 5120, 45, 80] = aten.transpose.int(self=%grid, dim0=1, dim1=2)
  %first: bf16[1, 5120, 45, 80] = aten.select.int(self=%frames, dim=1, index=0)
  %line: bf16[1, 5120, 3600] = aten.view(self=%first, size=[1, 5120, 3600])
  %places: bf16[1, 3600, 5120] = aten.transpose.int(self=%line, dim0=1, dim1=2)
"""
    assert "its tokens are 45 x 80 of %video, not" in reason(video(frames, tokens="%places", n=3600))


def test_two_videos_of_one_shape_are_cross_attention() -> None:
    other = VIDEO.replace("input %text", "input %other: bf16[1, 16, 21, 90, 160]\n  input %text")
    other += """
  %grid2: bf16[1, 5120, 21, 45, 80] = aten.conv3d(input=%other, weight=%patch, bias=None, stride=[1, 2, 2])
  %flat2: bf16[1, 5120, 75600] = aten.flatten.using_ints(self=%grid2, start_dim=2, end_dim=4)
  %tokens2: bf16[1, 75600, 5120] = aten.transpose.int(self=%flat2, dim0=1, dim1=2)
"""
    graph = Graph.parse(other + ATTENTION.format(q="%tokens", k="%tokens2", n=75600, m=75600, more=""))
    assert reason(graph) == (
        "cross-attention: its queries' tokens are 21 x 45 x 80 of %video, its keys' are 21 x 45 x 80 of %other"
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (", is_causal=True", "is_causal is set"),
        (", dropout_p=0.1", "dropout_p is 0.1"),
        (", attn_mask=%bias", "the mask %bias is bf16[75600, 75600], added to the scores"),
    ],
)
def test_attention_that_is_more_than_a_softmax_of_all_keys_says_what(more: str, expected: str) -> None:
    graph = Graph.parse(
        VIDEO.replace("param %patch", "input %bias: bf16[75600, 75600]\n  param %patch")
        + ATTENTION.format(q="%tokens", k="%tokens", n=75600, m=75600, more=more)
    )
    assert expected in reason(graph)


def test_keys_that_several_heads_share_are_refused() -> None:
    shared = "  %one: f32[2, 1, 88, 8] = aten.slice.Tensor(self=%q, dim=1, start=0, end=1)\n  %y"
    graph = Graph.parse(FLAT.replace("  %y", shared).replace("key=%q, value=%q", "key=%one, value=%one"))
    assert "its keys f32[2, 1, 88, 8]" in reason(graph)


def test_a_layout_by_hand_serves_a_model_that_does_not_show_its_own(mini: Callable[[str], Program]) -> None:
    graph = Graph.parse(FLAT)
    assert reason(graph) == (
        "its tokens are 88 of %tokens, not frames x height x width of a video; "
        "if they are, give tokens='tokens(frames=..., height=..., width=...)'"
    )
    layout = TokenLayout.parse("tokens(frames=3, height=4, width=6, after=16)")
    assert [site.layout for site in sites(graph, layout)] == [layout]
    assert refused(mini("wan-mini").graph, TokenLayout(8, 8, 8)).keys() == refused(mini("wan-mini").graph).keys()


def test_a_layout_by_hand_that_does_not_fit_gives_one_line(mini: Callable[[str], Program]) -> None:
    with pytest.raises(UsageError) as wrong:
        sites(Graph.parse(FLAT), TokenLayout(3, 4, 6))
    assert str(wrong.value) == (
        "tokens(frames=3, height=4, width=6) has 0 + 3 x 4 x 6 + 0 = 72 tokens; the attention of flat has 88; "
        "give frames, height and width after the patch embedding, and text with before= or after="
    )
    with pytest.raises(UsageError) as shown:
        sites(mini("wan-mini").graph, TokenLayout(4, 16, 8))
    assert str(shown.value) == (
        "%blocks.0.attn1.scaled_dot_product_attention: the graph shows tokens(frames=8, height=8, width=8), "
        "tokens(frames=4, height=16, width=8) was given; leave tokens out"
    )


def test_a_call_that_is_sparse_already_is_left_alone() -> None:
    table = 'lengths=None, blocks="11:11*0-10", order=None, block_q=8, block_k=8, scale=None'
    sparse = FLAT.replace("aten.scaled_dot_product_attention", "intarsia.block_sparse_attention")
    graph = Graph.parse(sparse.replace("value=%q)", f"value=%q, {table})"))
    assert reason(graph) == "is sparse already"
