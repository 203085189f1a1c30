"""Every head computes what its pattern says, whatever the others do, and what does not fit is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from intarsia.flow import trace
from intarsia.ir.errors import PlanError, SpecError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.passes.apply import apply
from intarsia.passes.attention_sites import Site, sites
from intarsia.passes.base import check_chosen, find_pass
from intarsia.passes.conformance import check_pass
from intarsia.passes.fuse_kernels import FuseKernels
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.masks import Mask
from intarsia.passes.sparse_attention import SparseAttention, places

LAYER = """graph layer {
  input %video: f32[2, 4, 4, 4, 4]
  param %patch: f32[16, 4, 1, 1, 1]
  param %to_q: f32[16, 16]
  param %to_k: f32[16, 16]
  param %to_v: f32[16, 16]
  %grid: f32[2, 16, 4, 4, 4] = aten.conv3d(input=%video, weight=%patch, bias=None)
  %flat: f32[2, 16, 64] = aten.flatten.using_ints(self=%grid, start_dim=2, end_dim=4)
  %tokens: f32[2, 64, 16] = aten.transpose.int(self=%flat, dim0=1, dim1=2)
  %q.all: f32[2, 64, 16] = aten.linear(input=%tokens, weight=%to_q, bias=None)
  %k.all: f32[2, 64, 16] = aten.linear(input=%tokens, weight=%to_k, bias=None)
  %v.all: f32[2, 64, 16] = aten.linear(input=%tokens, weight=%to_v, bias=None)
  %q.heads: f32[2, 64, 4, 4] = aten.view(self=%q.all, size=[2, 64, 4, 4])
  %k.heads: f32[2, 64, 4, 4] = aten.view(self=%k.all, size=[2, 64, 4, 4])
  %v.heads: f32[2, 64, 4, 4] = aten.view(self=%v.all, size=[2, 64, 4, 4])
  %q: f32[2, 4, 64, 4] = aten.transpose.int(self=%q.heads, dim0=1, dim1=2)
  %k: f32[2, 4, 64, 4] = aten.transpose.int(self=%k.heads, dim0=1, dim1=2)
  %v: f32[2, 4, 64, 4] = aten.transpose.int(self=%v.heads, dim0=1, dim1=2)
  %y: f32[2, 4, 64, 4] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v, scale=0.4)
  %rows: f32[2, 64, 4, 4] = aten.transpose.int(self=%y, dim0=1, dim1=2)
  %joined: f32[2, 64, 16] = aten.view(self=%rows, size=[2, 64, 16])
  return %joined
}
"""
"""Four heads over 4 x 4 x 4 tokens; the last call asks for tokens before heads in memory."""

SPARSE = SparseAttention(block=16)
DIAGONAL, STRIPE = "diagonal(density=0.5)", "vertical-stripe(density=0.75, columns='2')"

PICTURES = """graph pictures {
  input %image: f32[1, 3, 8, 8]
  param %weight: f32[4, 3, 3, 3]
  %conv: f32[1, 4, 8, 8] = aten.conv2d(input=%image, weight=%weight, bias=None, padding=[1, 1])
  %pooled: f32[1, 4, 8, 8] = aten.relu(self=%conv)
  return %pooled
}
"""


@pytest.fixture
def layer(with_weights: Callable[[Graph], Program]) -> Program:
    return with_weights(Graph.parse(LAYER))


@pytest.fixture(scope="module")
def hunyuan() -> Program:
    return trace("hunyuanvideo-mini")


@pytest.fixture(scope="module")
def cogvideo() -> Program:
    return trace("cogvideox-mini")


def on(*options: str, site: str = "y") -> dict[str, str]:
    """A choice of these options for the heads of a site, in order."""
    return {f"{site}#{head}": option for head, option in enumerate(options)}


def attended(site: Site, options: Mapping[str, str], block: int) -> Tensor:
    """What each head may look at (H, S, S), from the patterns alone."""
    masks = [
        Mask(find_pattern(options.get(place, "dense")), site.layout, block, block).tokens() for place in places(site)
    ]
    return torch.stack([torch.from_numpy(mask) for mask in masks])


def oracle(program: Program, site: Site, inputs: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """The site's result (B, H, S, D) under each head's own mask (H, S, S); a query without keys gives zeros."""
    names = [site.query, site.key, site.value, *([site.lengths] if site.lengths else [])]
    query, key, value, *lengths = inner(program, names, inputs)
    scale = program.graph.producers[site.name].args.get("scale")
    scores = query @ key.transpose(-1, -2) * (scale if isinstance(scale, float) else site.head_dim**-0.5)
    kept = mask[None].expand(len(query), -1, -1, -1)
    if lengths:
        kept = kept & (torch.arange(key.shape[2]) < lengths[0][:, None])[:, None, None, :]
    return torch.softmax(scores.masked_fill(~kept, -torch.inf), dim=-1).nan_to_num(0.0) @ value


def inner(program: Program, names: list[str], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Values of the graph by name."""
    graph = Graph(
        program.graph.name, program.graph.inputs, program.graph.params, program.graph.nodes, tuple(names),
        program.graph.sizes,
    )  # fmt: skip
    return tuple(Program(graph, program.weights).module()(*inputs))


def test_it_keeps_its_promises_on_a_layer_and_on_models(layer: Program, target: Target) -> None:
    for pass_ in (SPARSE, SparseAttention(block=32, patterns=("skip", DIAGONAL)), SparseAttention()):
        check_pass(pass_, layer, target)


def test_it_keeps_its_promises_with_lengths_and_with_text(hunyuan: Program, cogvideo: Program, target: Target) -> None:
    few = SparseAttention(block=16, patterns=("skip", "diagonal(density=0.8)", "multi-diagonal(density=0.8)"))
    for program in (hunyuan, cogvideo):
        assert few.choices(program.graph, target)
        check_pass(few, program, target)


GROUPED = """\
  %y.heads0: i64[2] = intarsia.integers(runs="0:1*1,3:1*1")
  %y.query0: f32[2, 2, 64, 4] = aten.index_select(self=%q, dim=1, index=%y.heads0)
  %y.key0: f32[2, 2, 64, 4] = aten.index_select(self=%k, dim=1, index=%y.heads0)
  %y.value0: f32[2, 2, 64, 4] = aten.index_select(self=%v, dim=1, index=%y.heads0)
  %y.part0: f32[2, 2, 64, 4] = intarsia.block_sparse_attention(query=%y.query0, key=%y.key0, value=%y.value0, \
lengths=None, blocks="4:0-1;1;1-3;3", order=None, block_q=16, block_k=16, scale=0.4)
  %y.heads1: i64[1] = intarsia.integers(runs="2:1*1")
  %y.query1: f32[2, 1, 64, 4] = aten.index_select(self=%q, dim=1, index=%y.heads1)
  %y.key1: f32[2, 1, 64, 4] = aten.index_select(self=%k, dim=1, index=%y.heads1)
  %y.value1: f32[2, 1, 64, 4] = aten.index_select(self=%v, dim=1, index=%y.heads1)
  %y.part1: f32[2, 1, 64, 4] = aten.scaled_dot_product_attention(query=%y.query1, key=%y.key1, value=%y.value1, \
scale=0.4)
  %y.heads2: i64[1] = intarsia.integers(runs="1:1*1")
  %y.query2: f32[2, 1, 64, 4] = aten.index_select(self=%q, dim=1, index=%y.heads2)
  %y.key2: f32[2, 1, 64, 4] = aten.index_select(self=%k, dim=1, index=%y.heads2)
  %y.value2: f32[2, 1, 64, 4] = aten.index_select(self=%v, dim=1, index=%y.heads2)
  %y.part2: f32[2, 1, 64, 4] = aten.zeros_like(self=%y.query2)
  %y.joined: f32[2, 4, 64, 4] = aten.cat(tensors=[%y.part0, %y.part1, %y.part2], dim=1)
  %y.places: i64[4] = intarsia.integers(runs="0:1*1,3:1*1,2:1*1,1:1*1")
  %y.placed: f32[2, 4, 64, 4] = aten.index_select(self=%y.joined, dim=1, index=%y.places)
  %y.turned: f32[2, 64, 4, 4] = aten.transpose.int(self=%y.placed, dim0=1, dim1=2)
  %y.rows: f32[2, 64, 4, 4] = aten.contiguous(self=%y.turned)
  %y: f32[2, 4, 64, 4] = aten.transpose.int(self=%y.rows, dim0=1, dim1=2)
"""


def test_heads_are_grouped_by_pattern_and_put_back(layer: Program, target: Target) -> None:
    changed = SPARSE.run(layer.graph, target, on(DIAGONAL, "skip", "dense", DIAGONAL))
    text = str(changed)
    start, end = text.index("  %y.heads0"), text.index("  %rows:")
    assert text[start:end] == GROUPED


def test_one_pattern_for_all_heads_takes_no_head_apart(layer: Program, target: Target) -> None:
    ops = [node.op for node in SPARSE.run(layer.graph, target, on(*[DIAGONAL] * 4)).nodes]
    assert ops == [
        n.op.replace("aten.scaled_dot_product_attention", "intarsia.block_sparse_attention") for n in layer.graph.nodes
    ]
    skipped = SPARSE.run(layer.graph, target, on(*["skip"] * 4))
    assert skipped.producers["y"].op == "aten.zeros_like"
    assert not Program(skipped, layer.weights).module()(*example_inputs(skipped))[0].any()


@pytest.mark.parametrize(
    "options",
    [
        (DIAGONAL, "dense", "skip", "multi-diagonal(density=0.5)"),
        (STRIPE, STRIPE, DIAGONAL, DIAGONAL),
        ("skip", "radial(density=0.6)", "dense", "skip"),
        (
            "sliding-tile(window=(1, 2, 2), tile=(2, 2, 2))",
            "multi-diagonal(density=0.25)",
            STRIPE,
            "random(density=0.5)",
        ),
        ("multi-diagonal(density=0.25)",) * 4,
    ],
)
def test_each_head_gets_exactly_its_mask(layer: Program, target: Target, options: tuple[str, ...]) -> None:
    (site,) = sites(layer.graph)
    inputs = example_inputs(layer.graph)
    changed = apply(planned(layer.graph, on(*options)), layer.graph, target)
    (found,) = inner(Program(changed, layer.weights), ["y"], inputs)
    mask = attended(site, on(*options), 16)
    assert torch.allclose(found, oracle(layer, site, inputs, mask), atol=1e-5)
    assert found.stride() == inner(layer, ["y"], inputs)[0].stride()
    for head, option in enumerate(options):
        assert bool(mask[head].all()) == (option == "dense")


def test_heads_that_name_a_mean_mix_the_mean_of_their_values_in(layer: Program, target: Target) -> None:
    (site,) = sites(layer.graph)
    inputs = example_inputs(layer.graph)
    options = on("diagonal(density=0.5, mean=0.3)", "skip(mean=1)", "skip(mean=0.5)", "diagonal(density=0.5)")
    changed = Program(SPARSE.run(layer.graph, target, options), layer.weights)
    (found,) = inner(changed, ["y"], inputs)
    plain = oracle(layer, site, inputs, attended(site, options, 16))
    plain[:, 1:3] = 0
    (value,) = inner(layer, [site.value], inputs)
    shares = torch.tensor([0.3, 1, 0.5, 0])[:, None, None]
    assert torch.allclose(found, (1 - shares) * plain + shares * value.mean(2, keepdim=True), atol=1e-5)


def without_video() -> Graph:
    """The layer on tokens of unknown origin."""
    given = "  input %video: f32[2, 4, 4, 4, 4]\n  param %patch: f32[16, 4, 1, 1, 1]"
    text = LAYER.replace(given, "  input %tokens: f32[2, 64, 16]")
    lines = [line for line in text.splitlines() if not line.startswith(("  %grid", "  %flat", "  %tokens"))]
    return Graph.parse("\n".join(lines) + "\n")


def planned(graph: Graph, chosen: Mapping[str, str], notation: str = "sparse-attention(block=16)") -> Plan:
    return Plan(graph.fingerprint, "null", (Phase((Step(notation, chosen),)),))


@pytest.mark.parametrize("model", ["hunyuan", "cogvideo"])
@pytest.mark.parametrize("fused", [False, True])
def test_key_lengths_and_text_tokens_are_kept(
    model: str, fused: bool, target: Target, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(model)
    if fused:
        program = Program(FuseKernels(everywhere=True).run(program.graph, target, {}), program.weights)
    site = sites(program.graph)[0]
    options = ("diagonal(density=0.8)", "skip", "dense", "multi-diagonal(density=0.8)")
    chosen = dict(zip(places(site), options[: site.heads], strict=False))
    changed = Program(SPARSE.run(program.graph, target, chosen), program.weights)
    mask = attended(site, chosen, 16)
    text = torch.arange(site.layout.tokens)
    text = (text < site.layout.before) | (text >= site.layout.before + site.layout.video)
    assert site.layout.before + site.layout.after > 0
    assert mask[0][:, text].all()
    assert mask[0][text].all()
    inputs = example_inputs(program.graph)
    (found,) = inner(changed, [site.name], inputs)
    assert torch.allclose(found, oracle(program, site, inputs, mask), atol=1e-4)
    calls = [node for node in changed.graph.nodes if node.op == "intarsia.block_sparse_attention"]
    assert len(calls) == len([option for option in set(options[: site.heads]) if "diagonal" in option])
    assert all((call.args["lengths"] is None) == (model == "cogvideo") for call in calls)


def test_options_that_are_not_listed_but_fit_are_taken(layer: Program, target: Target) -> None:
    options = on(
        STRIPE, "diagonal(density=0.61)", "random(density=0.5)", "sliding-tile(window=(1, 2, 2), tile=(2, 2, 2))"
    )
    assert not set(options.values()) & set(SPARSE.choices(layer.graph, target)["y#0"])
    changed = apply(planned(layer.graph, options), layer.graph, target)
    assert [node.op for node in changed.nodes].count("intarsia.block_sparse_attention") == 4


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("vertical-stripe(density=0.5, columns='9')", "columns '9' go beyond the 4 blocks of keys"),
        ("vertical-stripe(density=0.5, columns='0-3')", "more than the 0.5 asked for"),
        ("vertical-stripe(density=0.5, columns='x')", "columns is 'x'"),
        ("diagonal(density=0.1)", "more than the 0.1 asked for"),
        ("diagonal(density=1.5)", "density is 1.5"),
        ("diagonal", "density must be given"),
        ("zigzag(density=0.5)", "zigzag"),
        ("diagonal(density=", "expected 'name(key=value, ...)'"),
        ("i8", "i8"),
        ("./absent.py:Mine", "there is no file absent.py"),
    ],
)
def test_options_that_do_not_fit_are_one_line(layer: Program, target: Target, option: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        apply(planned(layer.graph, on("dense", option)), layer.graph, target)
    assert "%y#1" in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(PlanError) as caught:
        SPARSE.run(layer.graph, target, on("dense", option))
    assert says in str(caught.value)


def test_a_place_that_is_no_head_is_one_line(layer: Program, target: Target) -> None:
    for place in ("y#4", "y", "z#0"):
        with pytest.raises(PlanError, match=f"nothing to choose at %{place}"):
            check_chosen(SPARSE, layer.graph, target, {place: DIAGONAL})
        with pytest.raises(PlanError, match=f"%{place} is no head of self-attention over video tokens"):
            SPARSE.run(layer.graph, target, {place: DIAGONAL})
        assert SPARSE.run(layer.graph, target, {place: "dense"}) is layer.graph


def test_a_plan_made_for_other_sizes_is_refused(layer: Program, target: Target) -> None:
    larger = Graph.parse(
        LAYER.replace("f32[2, 4, 4, 4, 4]", "f32[2, 4, 5, 4, 4]")
        .replace("16, 4, 4, 4]", "16, 5, 4, 4]")
        .replace("64", "80")
    )
    plan = planned(layer.graph, on(STRIPE))
    with pytest.raises(PlanError, match="the plan was made for"):
        apply(plan, larger, target)
    moved = Plan(larger.fingerprint, plan.target, plan.phases)
    assert apply(moved, larger, target).producers["y.part0"].args["blocks"] != ""
    beyond = planned(larger, on("vertical-stripe(density=0.9, columns='4')"))
    assert apply(beyond, larger, target) != larger
    with pytest.raises(PlanError, match="go beyond the 4 blocks"):
        apply(Plan(layer.graph.fingerprint, plan.target, beyond.phases), layer.graph, target)


def test_a_graph_without_video_attention_offers_nothing_and_a_plan_for_it_is_refused(target: Target) -> None:
    graph = Graph.parse(PICTURES)
    assert SPARSE.choices(graph, target) == {}
    assert SPARSE.refusals(graph, target) == {}
    assert SPARSE.run(graph, target, {}) is graph
    with pytest.raises(PlanError, match="nothing to choose at %conv#0"):
        apply(planned(graph, {"conv#0": DIAGONAL}), graph, target)


def test_tokens_of_unknown_origin_are_refused_until_a_layout_is_given(hunyuan: Program, target: Target) -> None:
    graph = without_video()
    assert SPARSE.choices(graph, target) == {}
    (reason,) = SPARSE.refusals(graph, target).values()
    assert "not frames x height x width of a video" in reason
    assert SPARSE.choices(hunyuan.graph, target).keys().isdisjoint(SPARSE.refusals(hunyuan.graph, target))
    given = SparseAttention(block=16, tokens="tokens(frames=4, height=4, width=4)")
    assert set(given.choices(graph, target)) == set(on("", "", "", ""))
    check_pass(given, Program(graph, {p.name: torch.eye(16) for p in graph.params}), target)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("tokens(frames=3, height=4, width=4)", "48 tokens; the attention of layer has 64"),
        ("tokens(frames=4, height=4, width=4, before=2)", "66 tokens"),
        ("frames(4)", "found 'frames(4)'"),
        ("tokens(frames=4, height=4)", "width"),
        ("tokens(frames=0, height=4, width=4)", "frames"),
    ],
)
def test_a_layout_by_hand_that_is_wrong_is_one_line(target: Target, tokens: str, says: str) -> None:
    graph = without_video()
    with pytest.raises((UsageError, SpecError)) as caught:
        find_pass(f'sparse-attention(tokens="{tokens}")').choices(graph, target)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layout_by_hand_that_the_graph_contradicts_is_refused(layer: Program, target: Target) -> None:
    with pytest.raises(UsageError, match=r"the graph shows tokens\(frames=4, height=4, width=4\).*leave tokens out"):
        SparseAttention(tokens="tokens(frames=2, height=8, width=4)").choices(layer.graph, target)


@pytest.mark.parametrize(
    ("notation", "says"),
    [
        ("sparse-attention(block=48)", "block is 48; it is a power of two of at least 16, or 0"),
        ("sparse-attention(block=8)", "block is 8"),
        ("sparse-attention(block=-16)", "block is -16"),
        ("sparse-attention(block=16.0)", "block takes a int"),
        ("sparse-attention(patterns='skip')", "patterns takes a tuple"),
        ("sparse-attention(patterns=(1,))", "patterns is (1,); it is a tuple of texts such as ('skip',)"),
        ("sparse-attention(density=0.5)", "unknown key 'density'"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(notation: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        find_pass(notation)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_block_is_the_largest_that_cuts_the_sequence_into_thirty_two(layer: Program) -> None:
    layout = sites(layer.graph)[0].layout
    sizes = {frames: SparseAttention().block_of(type(layout)(frames, 16, 16)) for frames in (1, 2, 4, 8, 16, 64)}
    assert sizes == {1: 16, 2: 16, 4: 32, 8: 64, 16: 128, 64: 128}
    assert SparseAttention(block=256).block_of(layout) == 256


def test_a_pattern_that_nobody_knows_is_told_before_any_graph_is_looked_at() -> None:
    with pytest.raises(UsageError, match=r"pattern 'zigzag' is unknown\. Known: dense, diagonal"):
        SparseAttention(patterns=("skip", "zigzag"))


def test_patterns_that_fit_nowhere_are_refusals_with_their_reasons(layer: Program, target: Target) -> None:
    narrow = SparseAttention(block=16, patterns=("diagonal(density=0.1)",))
    assert narrow.choices(layer.graph, target) == {}
    assert set(narrow.refusals(layer.graph, target)) == set(on("", "", "", ""))
    reason = narrow.refusals(layer.graph, target)["y#0"]
    assert "more than the 0.1 asked for" in reason
    assert "\n" not in reason
    none = SparseAttention(patterns=())
    assert set(none.refusals(layer.graph, target).values()) == {"no patterns are given"}
    check_pass(none, layer, target)
    wide = SparseAttention(block=16, patterns=("diagonal(density=0.1)", "skip", DIAGONAL))
    assert set(wide.choices(layer.graph, target).values()) == {("dense", "skip", DIAGONAL)}
    assert wide.refusals(layer.graph, target) == {}
