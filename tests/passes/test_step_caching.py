"""Caching passes: the three segments they cut a denoiser into, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.flow import trace
from intarsia.ir.errors import SpecError, Unsupported
from intarsia.ir.execute import check_types, to_module
from intarsia.ir.graph import Graph, Ref
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import find_pass
from intarsia.passes.block_cuts import BlockCuts
from intarsia.passes.fuse_kernels import FuseKernels
from intarsia.passes.quantize_linear import QuantizeLinear
from intarsia.passes.step_caching import FirstBlockCache, StepCaching, TeaCache

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = (GOLDEN / "small-video.graph").read_text()

CUTS = {
    "wan-mini": BlockCuts("clone", "blocks.0.add_2", tuple(f"blocks.{number}.add_7" for number in range(6))),
    "cogvideox-mini": BlockCuts(
        "slice_1", "transformer_blocks.0.norm1.add_1", ("transformer_blocks.0.add_2", "transformer_blocks.1.add_2")
    ),
    "hunyuanvideo-mini": BlockCuts(
        "x_embedder.transpose",
        "transformer_blocks.0.norm1.add_1",
        (
            "transformer_blocks.0.add_6",
            "single_transformer_blocks.0.slice_2",
            "single_transformer_blocks.1.slice_2",
        ),
    ),
    "ltx-mini": BlockCuts(
        "proj_in.linear",
        "transformer_blocks.0.add_2",
        ("transformer_blocks.0.add_7", "transformer_blocks.1.add_7"),
    ),
}


@pytest.fixture(scope="module", params=CUTS)
def mini(request: pytest.FixtureRequest) -> Program:
    return trace(request.param)


def test_the_stream_of_the_video_is_told_from_that_of_the_text_beside_it(mini: Program) -> None:
    found = BlockCuts.of(mini.graph)
    assert found == CUTS[mini.graph.name]
    assert len({mini.graph.type(name).shape for name in (found.first, found.signal, *found.behind)}) == 1


def test_it_is_told_too_when_what_weights_alone_tell_was_computed(mini: Program) -> None:
    assert BlockCuts.of(materialize(mini).graph) == CUTS[mini.graph.name]


def run(program: Program, segments: tuple[Graph, ...], inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    table = {value.name: tensor for value, tensor in zip(program.graph.inputs, inputs, strict=True)}
    for segment in segments:
        verify(segment)
        check_types(segment)
        weights = {param.name: program.weights[param.name] for param in segment.params}
        answers = to_module(segment, weights)(*(table[value.name] for value in segment.inputs))
        table |= dict(zip(segment.outputs, answers, strict=True))
    return table


def test_three_segments_one_after_the_other_are_the_network_bit_for_bit(mini: Program) -> None:
    inputs = example_inputs(mini.graph)
    with torch.no_grad():
        expected = mini.module()(*inputs)[0]
        for pass_ in (TeaCache(), FirstBlockCache()):
            segments = pass_.split(mini.graph)
            assert torch.equal(run(mini, segments, inputs)[mini.graph.outputs[0]], expected)
            assert len(segments) == 3
            assert len(segments[1].outputs) == 1
            signal, stream = segments[0].outputs[:2]
            assert segments[0].type(signal).shape == segments[0].type(stream).shape
            assert segments[0].type(stream) == segments[1].type(segments[1].outputs[0])


def attention(graph: Graph) -> list[str]:
    return [node.name for node in graph.find("aten.scaled_dot_product_attention")]


def test_tea_cache_skips_all_blocks_and_the_first_block_cache_all_but_one() -> None:
    graph = Graph.parse(TEXT)
    before, blocks, head = map(attention, TeaCache().split(graph))
    assert (before, head) == ([], [])
    assert blocks == ["blocks.0.self", "blocks.0.cross", "blocks.1.self", "blocks.1.cross"]
    before, blocks, head = map(attention, FirstBlockCache().split(graph))
    assert (before, blocks, head) == (["blocks.0.self", "blocks.0.cross"], ["blocks.1.self", "blocks.1.cross"], [])


def test_the_first_segment_gives_the_signal_and_then_the_stream() -> None:
    graph = Graph.parse(TEXT)
    assert TeaCache().split(graph)[0].outputs[:2] == ("blocks.0.moved", "tokens")
    first, *_ = FirstBlockCache().split(graph)
    assert first.outputs[:2] == ("first_block", "blocks.0")
    assert first.producers["first_block"].args == {"self": Ref("blocks.0"), "other": Ref("tokens")}


@pytest.mark.parametrize(("pass_", "skipped"), [(TeaCache(), 67), (FirstBlockCache(), 34)], ids=str)
def test_the_graph_stays_as_it_is(pass_: StepCaching, skipped: int, target: Target) -> None:
    graph = Graph.parse(TEXT)
    assert pass_.run(graph, target, {}) is graph
    told = f"no choice: {skipped} of {len(graph.nodes)} calls are skipped by steps that reuse"
    assert pass_.refusals(graph, target) == {"small_video": told}


def test_the_signal_of_layers_in_eight_bits_is_what_was_put_into_eight_bits(mini: Program, target: Target) -> None:
    offered = QuantizeLinear().choices(mini.graph, target)
    narrow = QuantizeLinear().run(mini.graph, target, {place: options[-1] for place, options in offered.items()})
    assert narrow != mini.graph
    assert BlockCuts.of(narrow) == CUTS[mini.graph.name]


def test_graphs_whose_norms_and_sums_are_fused_are_cut_too(mini: Program, target: Target) -> None:
    offered = FuseKernels().choices(mini.graph, target)
    fused = FuseKernels().run(mini.graph, target, {place: options[-1] for place, options in offered.items()})
    assert any(fused.find("intarsia.gated_residual"))
    found, before = BlockCuts.of(fused), CUTS[mini.graph.name]
    assert (found.first, found.behind) == (before.first, before.behind)
    assert len({fused.type(name).shape for name in (found.first, found.signal)}) == 1


def test_what_goes_past_the_last_block_is_refused_by_name(target: Target) -> None:
    past = TEXT.replace("aten.layer_norm(input=%blocks.1,", "aten.layer_norm(input=%sum,").replace(
        "  %last:", "  %sum: f32[2, 64, 16] = aten.mul.Tensor(self=%blocks.1, other=%blocks.0.down)\n  %last:"
    )
    reason = r"small_video: %blocks.0.down goes past %blocks.1, the stream behind the last block"
    with pytest.raises(Unsupported, match=reason):
        TeaCache().split(Graph.parse(past))
    assert reason in TeaCache().refusals(Graph.parse(past), target)["small_video"]


def test_a_stream_that_no_time_step_modulates_is_no_signal() -> None:
    plain = Graph.parse(TEXT.replace("(input=%blocks.0.moved,", "(input=%tokens,"))
    with pytest.raises(Unsupported, match="small_video: its first attention reads %tokens as it is"):
        TeaCache().split(plain)
    assert FirstBlockCache().split(plain)[0].outputs[1] == "blocks.0"


def test_one_block_leaves_the_first_block_cache_nothing_to_skip() -> None:
    lines = TEXT.replace("aten.layer_norm(input=%blocks.1,", "aten.layer_norm(input=%blocks.0,").splitlines()
    one = Graph.parse("\n".join(line for line in lines if "blocks.1" not in line))
    assert attention(TeaCache().split(one)[1]) == ["blocks.0.self", "blocks.0.cross"]
    with pytest.raises(Unsupported, match="has one block, and behind the first there is nothing to skip"):
        FirstBlockCache().split(one)


def test_their_notation_is_that_of_passes() -> None:
    assert find_pass("teacache(threshold=0.2, tail=2, coefficients=(2.0, 0.0))") == TeaCache(0.2, 1, 2, (2.0, 0.0))
    assert str(FirstBlockCache(threshold=0.2)) == "first-block-cache(threshold=0.2)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("teacache(threshold=-1.0)", "threshold is -1.0; it is a relative change, 0 or more"),
        ("first-block-cache(warm_up=0)", "the first step has nothing to reuse"),
        ("teacache(tail=-1)", "tail is 0 or more"),
        ("teacache(coefficients=('a',))", "coefficients are \\('a',\\); they are numbers"),
    ],
)
def test_arguments_out_of_range_are_named(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        find_pass(text)
