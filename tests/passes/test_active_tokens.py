"""A denoiser that computes the active tokens only: what its caches hold, that it is the model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.flow import trace
from intarsia.ir.errors import SpecError, Unsupported
from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.operators import DTYPES
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.rewrite import rewrite
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.ir.verify import verify
from intarsia.passes.active_tokens import ACTIVE, ActiveTokens
from intarsia.passes.attention_sites import SPARSE
from intarsia.passes.base import find_pass
from intarsia.passes.fuse_heads import FuseHeads
from intarsia.passes.fuse_kernels import FuseKernels
from intarsia.passes.sparse_attention import SparseAttention, places

GOLDEN = Path(__file__).parent.parent / "golden"

TEXT = (GOLDEN / "small-video.graph").read_text()
"""Two blocks of attention among 4 x 4 x 4 tokens, and from them to text, for two rows."""

KEYS, VALUES = "blocks.0.self.k", "blocks.0.self.v"

KINDS = [ActiveTokens(caches, dtype) for caches in ("held", "linear") for dtype in ("", "i8", "f8e4m3")]

Tensors = Sequence[Tensor]


class Stepper:
    """The program that the pass makes, called with its inputs by kind."""

    def __init__(self, pass_: ActiveTokens, program: Program, target: Target) -> None:
        self.graph = pass_.run(program.graph, target, {})
        self.own = [value.name for value in self.graph.inputs].index(ACTIVE)
        self.clocked = pass_.caches == "linear"
        self.caches = self.graph.inputs[self.own + (3 if self.clocked else 1) :]
        size = self.graph.sizes[-1]
        assert size.maximum is not None
        self.tokens = size.maximum
        self._run = Program(self.graph, program.weights).module()

    def empty(self) -> list[Tensor]:
        made = []
        for value in self.caches:
            assert isinstance(value.type, TensorType)
            made.append(torch.zeros([int(dim) for dim in value.type.shape], dtype=DTYPES[value.type.dtype]))
        return made

    def __call__(
        self, own: Tensors, active: Tensor, caches: Tensors, *, elapsed: Tensor | None = None
    ) -> tuple[Tensor, Tensors]:
        told = torch.zeros(self.tokens) if elapsed is None else elapsed
        clock = (told, (1 / told).nan_to_num(0.0, 0.0, 0.0)) if self.clocked else ()
        with torch.no_grad():
            answer = self._run(*own, active, *clock, *caches)
        return answer[0], answer[1:]

    def cache(self, caches: Tensors, name: str) -> Tensor:
        return caches[[value.name for value in self.caches].index(name)]


@pytest.fixture(scope="module")
def small() -> Program:
    graph = Graph.parse(TEXT)
    generator = torch.Generator().manual_seed(2)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) / 2 for p in graph.params})  # type: ignore[union-attr, arg-type]


def step_inputs(program: Program, seed: int = 0) -> tuple[Tensor, ...]:
    return example_inputs(program.graph, seed=seed)


def third(tokens: int) -> Tensor:
    return torch.arange(0, tokens, 3)


@pytest.mark.parametrize("pass_", KINDS, ids=str)
def test_the_graph_it_makes_is_sound(pass_: ActiveTokens, small: Program, target: Target) -> None:
    made = pass_.run(small.graph, target, {})
    verify(made)
    check_types(made)
    assert Graph.parse(str(made)) == made
    assert pass_.run(made, target, {}) is made


@pytest.mark.parametrize("pass_", KINDS, ids=str)
def test_caches_go_in_and_come_out_in_one_order(pass_: ActiveTokens, small: Program, target: Target) -> None:
    step = Stepper(pass_, small, target)
    before = small.graph
    assert step.graph.inputs[: step.own] == before.inputs
    assert step.graph.outputs[: len(before.outputs)] == before.outputs
    assert [value.type for value in step.caches] == [
        step.graph.type(name) for name in step.graph.outputs[len(before.outputs) :]
    ]
    assert all(
        str(value.type).startswith(pass_.cache_dtype or "f32")
        for value in step.caches
        if not value.name.startswith("out") and not value.name.endswith(".scale")
    )


@pytest.mark.parametrize("pass_", KINDS, ids=str)
def test_with_all_tokens_active_it_is_the_model_bit_for_bit(
    pass_: ActiveTokens, small: Program, target: Target
) -> None:
    step, own = Stepper(pass_, small, target), step_inputs(small)
    velocity, caches = step(own, torch.arange(64), step.empty())
    assert torch.equal(velocity, small.module()(*own)[0])
    again, _ = step(step_inputs(small, 1), torch.arange(64), caches)
    assert torch.equal(again, small.module()(*step_inputs(small, 1))[0])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cogvideox-mini", "hunyuanvideo-mini", "ltx-mini")]


@pytest.mark.parametrize("name", ["wan-mini", *SLOW])
def test_models_are_the_same_with_all_tokens_and_with_few(
    name: str, target: Target, request: pytest.FixtureRequest
) -> None:
    program = request.getfixturevalue("wan_mini") if name == "wan-mini" else trace(name)
    same_with_few(program, ActiveTokens(), target)


@pytest.mark.parametrize("caches", ["held", "linear"])
@pytest.mark.parametrize("text", ["before", "after"])
def test_text_beside_the_video_is_computed_at_every_step(
    text: str, caches: str, target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    program = with_weights(joined(text))
    same_with_few(program, ActiveTokens(caches), target)
    step = Stepper(ActiveTokens(caches), program, target)
    _, before = step(step_inputs(program), torch.arange(64), step.empty())
    _, after = step(step_inputs(program, 1), torch.tensor([5]), before)
    changed = (step.cache(before, "k.cache") != step.cache(after, "k.cache")).any(dim=(0, 1, 3))
    words = [0, 1, 2, 8] if text == "before" else [5, 64, 65, 66]
    assert changed.nonzero().flatten().tolist() == words


def joined(text: str) -> Graph:
    """Attention among the video's tokens and 3 of text, before or after them."""
    found = (GOLDEN / "joined-video.graph").read_text()
    if text == "after":
        found = found.replace("[%encoder_hidden_states, %tokens]", "[%tokens, %encoder_hidden_states]")
        found = found.replace("start=3, end=67", "start=0, end=64")
    return Graph.parse(found)


def same_with_few(program: Program, pass_: ActiveTokens, target: Target) -> None:
    """All tokens give the model's velocity bit for bit; some of them, of the same inputs, find what was there."""
    step, own = Stepper(pass_, program, target), step_inputs(program)
    expected = program.module()(*own)[0]
    velocity, caches = step(own, torch.arange(step.tokens), step.empty())
    assert torch.equal(velocity, expected)
    few, after = step(own, third(step.tokens), caches)
    assert torch.allclose(few, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(caches, after, strict=True))


def test_the_cache_of_the_first_layer_is_what_a_dense_pass_writes_for_active_tokens(
    small: Program, target: Target
) -> None:
    step, active = Stepper(ActiveTokens(), small, target), third(64)
    _, before = step(step_inputs(small), torch.arange(64), step.empty())
    _, after = step(step_inputs(small, 1), active, before)
    _, dense = step(step_inputs(small, 1), torch.arange(64), step.empty())
    for name in (f"{KEYS}.cache", f"{VALUES}.cache"):
        found, was, whole = (step.cache(caches, name) for caches in (after, before, dense))
        assert torch.allclose(found[:, :, active], whole[:, :, active], rtol=1e-5, atol=1e-6)
        left = torch.ones(64, dtype=torch.bool).index_fill(0, active, value=False)
        assert torch.equal(found[:, :, left], was[:, :, left])
        assert not torch.allclose(found[:, :, left], whole[:, :, left], atol=0.1)


def test_tokens_that_are_not_active_keep_their_velocity(small: Program, target: Target) -> None:
    step = Stepper(ActiveTokens(), small, target)
    first, caches = step(step_inputs(small), torch.arange(64), step.empty())
    second, _ = step(step_inputs(small, 1), torch.tensor([5]), caches)
    changed = (first != second).any(dim=1).unfold(2, 2, 2).unfold(3, 2, 2).any(dim=(-1, -2))
    assert changed[0].flatten().nonzero().flatten().tolist() == [5]


def test_active_tokens_see_the_others_through_the_cache(small: Program, target: Target) -> None:
    step = Stepper(ActiveTokens(), small, target)
    _, some = step(step_inputs(small), torch.arange(64), step.empty())
    _, other = step(step_inputs(small, 1), torch.arange(64), step.empty())
    of_some, _ = step(step_inputs(small, 2), torch.tensor([5]), some)
    of_other, _ = step(step_inputs(small, 2), torch.tensor([5]), other)
    assert not torch.allclose(of_some[:, :, 0, 2:4, 2:4], of_other[:, :, 0, 2:4, 2:4])


def test_attention_sees_tokens_left_out_go_on_as_they_went(small: Program, target: Target) -> None:
    step, active = Stepper(ActiveTokens("linear"), small, target), third(64)
    every, behind = torch.arange(64), torch.full((64,), -0.1)
    _, caches = step(step_inputs(small), every, step.empty())
    first = step.cache(caches, f"{KEYS}.cache")
    _, caches = step(step_inputs(small, 1), every, caches, elapsed=2 * behind)
    second = step.cache(caches, f"{KEYS}.cache")
    slope = (second - first) / -0.2
    assert torch.allclose(step.cache(caches, f"{KEYS}.slope"), slope, rtol=1e-3, atol=1e-3)
    left = torch.ones(64, dtype=torch.bool).index_fill(0, active, value=False)
    own = step_inputs(small, 2)
    keys = Program(replace(step.graph, outputs=(f"{KEYS}.whole",)), small.weights).module()
    (seen,) = keys(*own, active, behind, 1 / behind, *caches)
    _, after = step(own, active, caches, elapsed=behind)
    found = step.cache(after, f"{KEYS}.cache")
    assert torch.allclose(seen[:, :, left], (second + slope * -0.1)[:, :, left], rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[:, :, active], found[:, :, active])
    assert torch.equal(found[:, :, left], second[:, :, left])
    learnt = (found - second)[:, :, active] / -0.1
    assert torch.allclose(step.cache(after, f"{KEYS}.slope")[:, :, active], learnt, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "relative"), [("i8", 0.5 / 127), ("f8e4m3", 2.0**-4)])
def test_caches_of_eight_bits_are_off_by_half_a_step_at_most(
    dtype: str, relative: float, small: Program, target: Target
) -> None:
    exact, narrow = (Stepper(ActiveTokens("held", kind), small, target) for kind in ("", dtype))
    own, every = step_inputs(small), torch.arange(64)
    keys = exact.cache(exact(own, every, exact.empty())[1], f"{KEYS}.cache")
    _, caches = narrow(own, every, narrow.empty())
    codes, scale = (narrow.cache(caches, f"{KEYS}.{part}") for part in ("cache", "cache.scale"))
    assert codes.dtype == DTYPES[dtype]
    assert scale.shape == (2, 2, 64, 1)
    off = (codes.float() * scale - keys).abs() / keys.abs().amax(-1, keepdim=True)
    assert 0 < float(off.max()) <= relative * 1.0001


@pytest.mark.parametrize("pass_", [*KINDS, ActiveTokens(allocation="allocation(warm_up=3)")], ids=str)
def test_its_notation_makes_it_again(pass_: ActiveTokens) -> None:
    assert find_pass(str(pass_)) == pass_


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("active-tokens(caches='quadratic')", "caches is 'quadratic'; it is held or linear"),
        ("active-tokens(cache_dtype='i4')", "cache_dtype is 'i4'; it is i8 or f8e4m3"),
        ("active-tokens(allocation='allocation(warm_up=0)')", "warm_up is at least 2"),
        ("active-tokens(buckets=-1)", "buckets is -1; it is how many counts of tokens there are, or 0 for any"),
        ("active-tokens(cache='i8')", "cache"),
    ],
)
def test_says_which_setting_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        find_pass(text)


MIXING = """  %across: f32[2, 16, 64] = aten.transpose.int(self=%before, dim0=1, dim1=2)
  %mixed: f32[2, 16, 64] = aten.conv1d(input=%across, weight=%mix, bias=None, padding=[1])
  %blocks.0: f32[2, 64, 16] = aten.transpose.int(self=%mixed, dim0=1, dim1=2)
"""

NAMED = """graph named {
  size N in [2, 64]
  input %x: f32[1, N, 16]
  %heads: f32[1, N, 2, 8] = aten.view(self=%x, size=[1, -1, 2, 8])
  %q: f32[1, 2, N, 8] = aten.transpose.int(self=%heads, dim0=1, dim1=2)
  %y: f32[1, 2, N, 8] = aten.scaled_dot_product_attention(query=%q, key=%q, value=%q)
  return %y
}
"""


def with_convolution() -> str:
    """A convolution over the tokens as a sequence, between the blocks."""
    first, _, rest = TEXT.partition("  %blocks.0: ")
    line, _, behind = rest.partition("\n")
    text = f"{first}  %before: {line}\n{MIXING}{behind}"
    return text.replace("  param %out.weight", "  param %mix: f32[16, 16, 3]\n  param %out.weight")


def causal(block: int) -> str:
    return TEXT.replace(f"value=%blocks.{block}.self.v)", f"value=%blocks.{block}.self.v, is_causal=True)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_convolution(), r"%mixed \(aten.conv1d\) mixes tokens .* and %blocks.1.self reads that"),
        (causal(1), "%blocks.1.self is causal"),
        (NAMED, "its tokens are N, a named size"),
    ],
)
def test_says_what_it_cannot_leave_tokens_out_of(text: str, message: str, target: Target) -> None:
    with pytest.raises(Unsupported, match=message) as raised:
        ActiveTokens().run(Graph.parse(text), target, {})
    assert "\n" not in str(raised.value)


def thinned(program: Program, target: Target, *, fused: bool) -> Program:
    """Every head of the first and third attention in a pattern of its own, all of the second in one."""
    sparse, graph = SparseAttention(), program.graph
    sites = sparse.sites(graph)
    options = ("diagonal(density=0.25)", "tile-offsets(density=0.25)", "skip", "vertical-stripe(density=0.25, sink=0)")
    chosen = {place: option for site in sites[0:3:2] for place, option in zip(places(site), options, strict=True)}
    chosen |= dict.fromkeys(places(sites[1]), "multi-diagonal(density=0.25)")
    made = sparse.run(graph, target, chosen)
    return Program(FuseHeads().run(made, target, {}) if fused else made, program.weights)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("caches", ["held", "linear"])
def test_sparse_heads_keep_their_patterns(wan_mini: Program, target: Target, fused: bool, caches: str) -> None:
    program = thinned(wan_mini, target, fused=fused)
    stepper = Stepper(ActiveTokens(caches), program, target)
    check_types(stepper.graph)
    own, everything = step_inputs(program), torch.arange(stepper.tokens)
    with torch.no_grad():
        (whole,) = program.module()(*own)
    dense, after = stepper(own, everything, stepper.empty())
    torch.testing.assert_close(dense, whole, rtol=1e-4, atol=1e-5)
    some, _ = stepper(own, everything[::3], after)
    torch.testing.assert_close(some, dense, rtol=1e-4, atol=1e-5)


def test_a_model_whose_attention_is_all_sparse_has_tokens(wan_mini: Program, target: Target) -> None:
    sparse = SparseAttention()
    options = dict.fromkeys(sparse.choices(wan_mini.graph, target), "diagonal(density=0.25)")
    made = ActiveTokens().run(sparse.run(wan_mini.graph, target, options), target, {})
    assert not list(made.find(SPARSE))
    assert len(list(made.find("intarsia.block_mask"))) == 1


def test_a_head_that_blends_in_the_mean_is_not_built(wan_mini: Program, target: Target) -> None:
    made = thinned(wan_mini, target, fused=False).graph
    blended = rewrite(
        made, lambda node: [replace(node, args={**node.args, "mean": 0.1})] if node.op == SPARSE else None
    )
    with pytest.raises(Unsupported, match="sparse attention, and its heads blend in the mean of all values: not built"):
        ActiveTokens().run(blended, target, {})


def test_a_graph_without_attention_has_no_tokens(mlp: Graph, target: Target) -> None:
    with pytest.raises(Unsupported, match="step allocation: mlp calls no attention"):
        ActiveTokens().run(mlp, target, {})


def test_a_convolution_behind_the_last_block_sees_all_tokens(small: Program, target: Target) -> None:
    text = TEXT.replace("return %velocity", "return %smooth").replace(
        "  return",
        "  %smooth: f32[2, 2, 4, 7, 7] = aten.avg_pool3d(self=%velocity, kernel_size=[1, 2, 2], stride=[1, 1, 1])\n"
        "  return",
    )
    program = Program(Graph.parse(text), small.weights)
    step, own = Stepper(ActiveTokens(), program, target), step_inputs(program)
    velocity, caches = step(own, torch.arange(64), step.empty())
    assert torch.equal(velocity, program.module()(*own)[0])
    assert torch.allclose(step(own, third(64), caches)[0], velocity, atol=1e-4)


def test_other_passes_run_behind_it(small: Program, target: Target) -> None:
    made = ActiveTokens().run(small.graph, target, {})
    fused = FuseKernels().run(made, target, {})
    verify(fused)
    own, step = step_inputs(small), Stepper(ActiveTokens(), small, target)
    expected = step(own, torch.arange(64), step.empty())[0]
    found = Program(fused, small.weights).module()(*own, torch.arange(64), *step.empty())[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_explains_which_attention_sees_through_caches(small: Program, target: Target) -> None:
    told = ActiveTokens().refusals(small.graph, target)
    assert list(told) == ["blocks.0.self", "blocks.0.cross", "blocks.1.self", "blocks.1.cross"]
    assert told["blocks.0.self"] == "no choice: 64 tokens (4 x 4 x 4) on axis 2 of its queries; keys and values cached"
    assert told["blocks.0.cross"].startswith("no choice: active queries; cross-attention")
    (reason,) = ActiveTokens().refusals(Graph.parse(with_convolution()), target).values()
    assert "mixes tokens" in reason
