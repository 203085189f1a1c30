"""Heads of one pattern stand side by side in the weights, and what a graph computes stays the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from intarsia.ir.execute import check_types
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.program import Program, example_inputs, materialize, split_constant
from intarsia.ir.rewrite import rewrite
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.conformance import check_pass
from intarsia.passes.fuse_heads import FuseHeads
from intarsia.passes.fuse_kernels import FuseKernels
from intarsia.passes.quantize_linear import QuantizeLinear
from intarsia.search.work import summary

GOLDEN = Path(__file__).parent.parent / "golden"

ATTENTION = "aten.scaled_dot_product_attention"

DENSE, SPARSE, SKIP = "dense", "sparse", "skip"

Groups = Sequence[tuple[str, Sequence[int]]]

SMALL = """graph small {
  input %x: f32[2, 5, 8]
  param %to_q.weight: f32[12, 8]
  param %to_q.bias: f32[12]
  param %to_k.weight: f32[12, 8]
  param %to_v.weight: f32[12, 8]
  param %to_out.weight: f32[8, 12]
  param %to_out.bias: f32[8]
  %q: f32[2, 5, 12] = aten.linear(input=%x, weight=%to_q.weight, bias=%to_q.bias)
  %q.view: f32[2, 5, 3, 4] = aten.view(self=%q, size=[2, 5, 3, 4])
  %q.heads: f32[2, 3, 5, 4] = aten.permute(self=%q.view, dims=[0, 2, 1, 3])
  %k: f32[2, 5, 12] = aten.linear(input=%x, weight=%to_k.weight, bias=None)
  %k.view: f32[2, 5, 3, 4] = aten.view(self=%k, size=[2, 5, 3, 4])
  %k.heads: f32[2, 3, 5, 4] = aten.permute(self=%k.view, dims=[0, 2, 1, 3])
  %v: f32[2, 5, 12] = aten.linear(input=%x, weight=%to_v.weight, bias=None)
  %v.view: f32[2, 5, 3, 4] = aten.view(self=%v, size=[2, 5, 3, 4])
  %v.heads: f32[2, 3, 5, 4] = aten.permute(self=%v.view, dims=[0, 2, 1, 3])
  %y: f32[2, 3, 5, 4] = aten.scaled_dot_product_attention(query=%q.heads, key=%k.heads, value=%v.heads)
  %y.permute: f32[2, 5, 3, 4] = aten.permute(self=%y, dims=[0, 2, 1, 3])
  %y.view: f32[2, 5, 12] = aten.reshape(self=%y.permute, shape=[2, 5, 12])
  %o: f32[2, 5, 8] = aten.linear(input=%y.view, weight=%to_out.weight, bias=%to_out.bias)
  return %o
}
"""

FUSED = """graph small {
  input %x: f32[2, 5, 8]
  param %to_q.weight: f32[12, 8]
  param %to_q.bias: f32[12]
  param %to_k.weight: f32[12, 8]
  param %to_v.weight: f32[12, 8]
  param %to_out.weight: f32[8, 12]
  param %to_out.bias: f32[8]
  %q.order: i64[12] = intarsia.integers(runs="0:4*1,8:4*1,4:4*1")
  %q.weight: f32[12, 8] = aten.index_select(self=%to_q.weight, dim=0, index=%q.order)
  %q.bias: f32[12] = aten.index_select(self=%to_q.bias, dim=0, index=%q.order)
  %q: f32[2, 5, 12] = aten.linear(input=%x, weight=%q.weight, bias=%q.bias)
  %q.view: f32[2, 5, 3, 4] = aten.view(self=%q, size=[2, 5, 3, 4])
  %q.heads: f32[2, 3, 5, 4] = aten.permute(self=%q.view, dims=[0, 2, 1, 3])
  %k.weight: f32[12, 8] = aten.index_select(self=%to_k.weight, dim=0, index=%q.order)
  %k: f32[2, 5, 12] = aten.linear(input=%x, weight=%k.weight, bias=None)
  %k.view: f32[2, 5, 3, 4] = aten.view(self=%k, size=[2, 5, 3, 4])
  %k.heads: f32[2, 3, 5, 4] = aten.permute(self=%k.view, dims=[0, 2, 1, 3])
  %v.weight: f32[12, 8] = aten.index_select(self=%to_v.weight, dim=0, index=%q.order)
  %v: f32[2, 5, 12] = aten.linear(input=%x, weight=%v.weight, bias=None)
  %v.view: f32[2, 5, 3, 4] = aten.view(self=%v, size=[2, 5, 3, 4])
  %v.heads: f32[2, 3, 5, 4] = aten.permute(self=%v.view, dims=[0, 2, 1, 3])
  %y.query0: f32[2, 2, 5, 4] = aten.slice.Tensor(self=%q.heads, dim=1, start=0, end=2)
  %y.key0: f32[2, 2, 5, 4] = aten.slice.Tensor(self=%k.heads, dim=1, start=0, end=2)
  %y.value0: f32[2, 2, 5, 4] = aten.slice.Tensor(self=%v.heads, dim=1, start=0, end=2)
  %y.part0: f32[2, 2, 5, 4] = aten.scaled_dot_product_attention(query=%y.query0, key=%y.key0, value=%y.value0)
  %y.query1: f32[2, 1, 5, 4] = aten.slice.Tensor(self=%q.heads, dim=1, start=2, end=3)
  %y.key1: f32[2, 1, 5, 4] = aten.slice.Tensor(self=%k.heads, dim=1, start=2, end=3)
  %y.value1: f32[2, 1, 5, 4] = aten.slice.Tensor(self=%v.heads, dim=1, start=2, end=3)
  %y.part1: f32[2, 1, 5, 4] = aten.scaled_dot_product_attention(query=%y.query1, key=%y.key1, value=%y.value1)
  %y.part0.tokens: f32[2, 5, 2, 4] = aten.transpose.int(self=%y.part0, dim0=1, dim1=2)
  %y.part1.tokens: f32[2, 5, 1, 4] = aten.transpose.int(self=%y.part1, dim0=1, dim1=2)
  %y.tokens: f32[2, 5, 3, 4] = aten.cat(tensors=[%y.part0.tokens, %y.part1.tokens], dim=2)
  %y: f32[2, 3, 5, 4] = aten.transpose.int(self=%y.tokens, dim0=1, dim1=2)
  %y.permute: f32[2, 5, 3, 4] = aten.permute(self=%y, dims=[0, 2, 1, 3])
  %y.view: f32[2, 5, 12] = aten.reshape(self=%y.permute, shape=[2, 5, 12])
  %o.weight: f32[8, 12] = aten.index_select(self=%to_out.weight, dim=1, index=%q.order)
  %o: f32[2, 5, 8] = aten.linear(input=%y.view, weight=%o.weight, bias=%to_out.bias)
  return %o
}
"""


def grouped(graph: Graph, groups: Callable[[Node], Groups]) -> Graph:
    """The graph with every attention in groups of heads, as ``sparse-attention`` leaves it."""

    def rule(node: Node) -> Sequence[Node] | None:
        if node.op == "aten.view" and is_of_attention(node.ref("self"), graph):  # which lies otherwise once joined
            return (replace(node, op="aten.reshape", args={"self": node.args["self"], "shape": node.args["size"]}),)
        return apart(node, groups(node), graph) if node.op == ATTENTION and one_mask(node, graph) else None

    return rewrite(graph, rule)


def is_of_attention(name: str, graph: Graph) -> bool:
    node = graph.producers.get(name)
    while node is not None and node.op in ("aten.permute", "aten.transpose.int"):
        node = graph.producers.get(node.ref("self"))
    return node is not None and node.op == ATTENTION


def one_mask(node: Node, graph: Graph) -> bool:
    """Whether attention masks all heads alike, or not at all."""
    mask = node.args.get("attn_mask")
    return not isinstance(mask, Ref) or graph.type(mask.name).shape[1] == 1


def apart(node: Node, groups: Groups, graph: Graph) -> Sequence[Node] | None:
    if not groups:
        return None
    if len(groups) == 1:
        return (part(node, groups[0][0], node.args, node.outputs[0], graph),)
    made: list[Node] = []
    for number, (pattern, heads) in enumerate(groups):
        index = Value(f"{node.name}.heads{number}", TensorType("i64", (len(heads),)))
        made.append(Node("intarsia.integers", {"runs": str(TokenOrder.of(heads))}, (index,)))
        operands: dict[str, Arg] = {}
        for role in ("query", "key", "value"):
            taken = Value(f"{node.name}.{role}{number}", some(graph.type(node.ref(role)), len(heads)))
            made.append(
                Node("aten.index_select", {"self": node.args[role], "dim": 1, "index": Ref(index.name)}, (taken,))
            )
            operands[role] = Ref(taken.name)
        result = Value(f"{node.name}.part{number}", some(node.type, len(heads)))
        made.append(part(node, pattern, operands, result, graph))
    return [*made, *joined(node, [head for _, heads in groups for head in heads], len(groups))]


def some(type_: TensorType, heads: int) -> TensorType:
    return replace(type_, shape=(type_.shape[0], heads, *type_.shape[2:]))


def part(node: Node, pattern: str, operands: Mapping[str, Arg], result: Value, graph: Graph) -> Node:
    if pattern == SKIP:
        return Node("aten.zeros_like", {"self": operands["query"]}, (result,))
    if pattern == DENSE or node.args.get("attn_mask") is not None:
        return replace(node, args={**node.args, **operands}, outputs=(result,))
    queries, keys = (graph.type(node.ref(role)).shape[2] for role in ("query", "key"))
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    allowed = [[row % 2 == 0 or column == 0 for column in range(-(-keys // 16))] for row in range(-(-queries // 16))]
    table = BlockTable.of(torch.tensor(allowed).numpy())
    args = {"query": operands["query"], "key": operands["key"], "value": operands["value"], "lengths": None}
    sparse = {**args, "blocks": str(table), "order": None, "block_q": 16, "block_k": 16, "scale": None}
    return Node("intarsia.block_sparse_attention", sparse, (result,))


def joined(node: Node, heads: Sequence[int], count: int) -> Sequence[Node]:
    parts = tuple(Ref(f"{node.name}.part{number}") for number in range(count))
    value, index = (
        Value(f"{node.name}.joined", node.type),
        Value(f"{node.name}.places", TensorType("i64", (len(heads),))),
    )
    places = sorted(range(len(heads)), key=heads.__getitem__)
    return (
        Node("aten.cat", {"tensors": parts, "dim": 1}, (value,)),
        Node("intarsia.integers", {"runs": str(TokenOrder.of(places))}, (index,)),
        Node("aten.index_select", {"self": Ref(value.name), "dim": 1, "index": Ref(index.name)}, node.outputs),
    )


def shuffled(seed: int, *, skipped: int) -> Callable[[Node], Groups]:
    """Two groups of random heads and some skipped ones, differently at each attention."""
    random = Random(seed)

    def groups(node: Node) -> Groups:
        heads = node.type.shape[1]
        assert isinstance(heads, int)
        order = random.sample(range(heads), heads)
        kept, cut = order[skipped:], random.randint(1, heads - skipped - 1)
        parts = [(DENSE, sorted(kept[:cut])), (SPARSE, sorted(kept[cut:])), (SKIP, sorted(order[:skipped]))]
        return sorted((one for one in parts if one[1]), key=lambda one: (one[0] == SKIP, one[1]))

    return groups


def always(*groups: tuple[str, Sequence[int]]) -> Callable[[Node], Groups]:
    return lambda node: groups


def error(before: Program, after: Program, dtype: torch.dtype) -> float:
    """Largest difference of the outputs, relative to the largest output, both computed in ``dtype``."""
    results = []
    for program in (before, materialize(in_dtype(after, dtype))):
        run = in_dtype(program, dtype)
        with torch.no_grad():
            results.append(run.module()(*example_inputs(run.graph)))
    pairs = zip(*results, strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)


def in_dtype(program: Program, dtype: torch.dtype) -> Program:
    """The program with ``dtype`` in place of f32."""
    name = next(name for name, found in DTYPES.items() if found == dtype)
    text = str(program.graph).replace("f32[", f"{name}[").replace("torch.float32", str(dtype))
    weights = {
        key: value.to(dtype) if value.dtype == torch.float32 else value for key, value in program.weights.items()
    }
    return Program(Graph.parse(text), weights)


def gathers(graph: Graph) -> list[str]:
    """What is still gathered at each run."""
    _, dynamic = split_constant(graph)
    return [node.name for node in dynamic if node.op == "aten.index_select"]


def fused(graph: Graph, target: Target) -> Graph:
    """The fused graph, checked."""
    assert FuseHeads().refusals(graph, target) == {}
    after = FuseHeads().run(graph, target, {})
    check_types(after)
    assert gathers(after) == []
    assert FuseHeads().run(after, target, {}) == after
    return after


MODELS = ("wan-mini", "cogvideox-mini", "hunyuanvideo-mini", "ltx-mini")


@pytest.fixture(scope="module")
def models(wan_mini: Program) -> dict[str, Program]:
    """The small models, traced once: norms over all heads, of each head, two streams, an MLP beside, tables by head."""
    from intarsia.flow import trace

    return {name: wan_mini if name == "wan-mini" else trace(name) for name in MODELS}


def test_rows_and_columns_of_weights_take_the_order_of_the_groups(target: Target) -> None:
    before = grouped(Graph.parse(SMALL), always((DENSE, (0, 2)), (DENSE, (1,))))
    assert str(fused(before, target)) == FUSED


def test_skipped_heads_have_no_rows_and_no_columns(target: Target) -> None:
    after = fused(grouped(Graph.parse(SMALL), always((SPARSE, (0, 2)), (SKIP, (1,)))), target)
    assert {node.name: str(node.type) for node in after.nodes if "weight" in node.name or node.op == "aten.linear"} == {
        "q.weight": "f32[8, 8]",
        "q": "f32[2, 5, 8]",
        "k.weight": "f32[8, 8]",
        "k": "f32[2, 5, 8]",
        "v.weight": "f32[8, 8]",
        "v": "f32[2, 5, 8]",
        "o.weight": "f32[8, 8]",
        "o": "f32[2, 5, 8]",
    }
    assert after.producers["y"].op == "intarsia.block_sparse_attention"
    assert list(after.find("aten.cat", "aten.slice.Tensor", "aten.zeros_like")) == []


def test_a_projection_of_nothing_is_its_bias(target: Target) -> None:
    after = fused(grouped(Graph.parse(SMALL), always((SKIP, (0, 1, 2)))), target)
    assert (
        str(after)
        == """graph small {
  input %x: f32[2, 5, 8]
  param %to_out.bias: f32[8]
  %o: f32[2, 5, 8] = aten.expand_as(self=%to_out.bias, other=%x)
  return %o
}
"""
    )


def test_groups_that_stand_in_order_need_no_other_weights(target: Target) -> None:
    after = fused(grouped(Graph.parse(SMALL), always((DENSE, (0,)), (SPARSE, (1, 2)))), target)
    assert [node.ref("weight") for node in after.find("aten.linear")] == [
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.weight",
    ]


def test_one_pattern_for_all_heads_leaves_the_graph_alone(target: Target) -> None:
    graph = grouped(Graph.parse(SMALL), always((SPARSE, (0, 1, 2))))
    assert FuseHeads().run(graph, target, {}) is graph


@pytest.mark.parametrize(
    ("name", "skipped"), [("wan-mini", 1), *((name, count) for name in MODELS[1:] for count in (0, 1, 2))]
)
def test_models_compute_the_same_but_for_the_order_of_a_sum(
    name: str, skipped: int, models: dict[str, Program], target: Target
) -> None:
    weights = models[name].weights
    before = grouped(models[name].graph, shuffled(skipped, skipped=skipped))
    after = fused(before, target)
    assert error(Program(before, weights), Program(after, weights), torch.float64) < 1e-12
    # Sums over the heads' channels in another order: half a unit of 2**-23 each time, through all layers.
    assert error(Program(before, weights), Program(after, weights), torch.float32) < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_models_that_skip_all_heads_here_and_there_compute_the_same(
    name: str, models: dict[str, Program], target: Target
) -> None:
    some_heads = shuffled(5, skipped=1)
    turn = iter(range(100))

    def groups(node: Node) -> Groups:
        heads = node.type.shape[1]
        assert isinstance(heads, int)
        return [(SKIP, range(heads))] if next(turn) % 2 else some_heads(node)

    before = grouped(models[name].graph, groups)
    after = fused(before, target)
    assert list(after.find("aten.expand_as")) or name == "hunyuanvideo-mini"
    pair = Program(before, models[name].weights), Program(after, models[name].weights)
    assert error(*pair, torch.float64) < 1e-12


def test_weights_left_as_they_were_would_be_seen(with_weights: Callable[[Graph], Program], target: Target) -> None:
    program = with_weights(Graph.parse(SMALL))
    before = grouped(program.graph, always((DENSE, (0, 2)), (SPARSE, (1,))))
    after = fused(before, target)
    wrong = rewrite(
        after,
        lambda node: (replace(node, args={**node.args, "weight": Ref("to_out.weight")}),) if node.name == "o" else None,
    )
    assert error(replace(program, graph=before), replace(program, graph=after), torch.float32) < 1e-6
    assert error(replace(program, graph=before), replace(program, graph=wrong), torch.float32) > 1e-2


@pytest.mark.parametrize(
    ("name", "projections"),
    [("wan-mini", 2), ("cogvideox-mini", 4), ("hunyuanvideo-mini", 4), ("ltx-mini", 2)],
)
def test_skipped_heads_lose_their_share_of_the_projections(
    name: str, projections: int, models: dict[str, Program], target: Target
) -> None:
    """All four of a layer where heads are normed alone; value's and the output's where all are normed together."""
    before = grouped(models[name].graph, always((DENSE, (1, 3)), (SKIP, (0, 2))))
    share = 0.0
    for site in models[name].graph.find(ATTENTION):
        batch, heads, queries, channels = map(int, site.type.shape)
        tokens = projections // 2 * (queries + int(models[name].graph.type(site.ref("key")).shape[2]))
        width = heads * channels  # of the hidden state too
        share += batch * tokens * width * width if one_mask(site, models[name].graph) else 0
    lost = summary(before).flops_by_class["linear"] - summary(fused(before, target)).flops_by_class["linear"]
    assert lost == share


def test_every_promise_of_a_pass_is_kept(models: dict[str, Program], target: Target) -> None:
    program = models["cogvideox-mini"]
    graph = grouped(program.graph, shuffled(3, skipped=1))
    check_pass(FuseHeads(), replace(program, graph=graph), target, error=1e-10)


QKV = """graph qkv {
  input %x: f32[2, 5, 8]
  param %qkv.weight: f32[43, 8]
  param %qkv.bias: f32[43]
  param %gate.weight: f32[12, 8]
  param %norm.weight: f32[4]
  param %out.weight: f32[8, 19]
  %qkv: f32[2, 5, 43] = aten.linear(input=%x, weight=%qkv.weight, bias=%qkv.bias)
  %parts.0: f32[2, 5, 36], %parts.1: f32[2, 5, 7] = aten.split_with_sizes(self=%qkv, split_sizes=[36, 7], dim=-1)
  %apart: f32[2, 5, 3, 3, 4] = aten.view(self=%parts.0, size=[2, 5, 3, 3, 4])
  %first: f32[3, 2, 3, 5, 4] = aten.permute(self=%apart, dims=[2, 0, 3, 1, 4])
  %q: f32[2, 3, 5, 4], %k: f32[2, 3, 5, 4], %v: f32[2, 3, 5, 4] = aten.unbind.int(self=%first, dim=0)
  %qn: f32[2, 3, 5, 4] = aten.rms_norm(input=%q, normalized_shape=[4], weight=%norm.weight, eps=1e-06)
  %y: f32[2, 3, 5, 4] = aten.scaled_dot_product_attention(query=%qn, key=%k, value=%v)
  %gate: f32[2, 5, 12] = aten.linear(input=%x, weight=%gate.weight, bias=None)
  %open: f32[2, 5, 12] = aten.sigmoid(self=%gate)
  %back: f32[2, 5, 3, 4] = aten.transpose.int(self=%y, dim0=1, dim1=2)
  %flat: f32[2, 5, 12] = aten.reshape(self=%back, shape=[2, 5, 12])
  %gated: f32[2, 5, 12] = aten.mul.Tensor(self=%open, other=%flat)
  %mlp: f32[2, 5, 7] = aten.gelu(self=%parts.1)
  %both: f32[2, 5, 19] = aten.cat(tensors=[%mlp, %gated], dim=-1)
  %o: f32[2, 5, 8] = aten.linear(input=%both, weight=%out.weight, bias=None)
  return %o
}
"""


@pytest.mark.parametrize(
    "groups",
    [
        ((DENSE, (1,)), (SPARSE, (0, 2))),
        ((DENSE, (2,)), (SPARSE, (0,)), (SKIP, (1,))),
        ((SPARSE, (2, 0)), (SKIP, (1,))),
        ((SKIP, (0, 1, 2)),),
    ],
)
def test_one_projection_of_everything_and_a_gate_are_permuted_too(
    groups: Groups, with_weights: Callable[[Graph], Program], target: Target
) -> None:
    program = with_weights(Graph.parse(QKV))
    before = replace(program, graph=grouped(program.graph, always(*groups)))
    after = replace(program, graph=fused(before.graph, target))
    assert error(before, after, torch.float64) < 1e-12


def test_rows_of_three_projections_and_of_an_mlp_stay_in_one_weight(target: Target) -> None:
    after = fused(grouped(Graph.parse(QKV), always((SPARSE, (2, 0)), (SKIP, (1,)))), target)
    assert after.producers["qkv.order"].args["runs"] == "8:4*1,0:4*1,20:4*1,12:4*1,32:4*1,24:4*1,36:7*1"
    assert after.producers["parts.0"].args["split_sizes"] == (24, 7)
    assert after.producers["o.weight"].type.shape == (8, 15)


NORMED = SMALL.replace(
    "  %o: f32[2, 5, 8] = aten.linear(input=%y.view",
    "  %norm: f32[2, 5, 12] = aten.layer_norm(input=%y.view, normalized_shape=[12], weight=%n.weight)\n"
    "  %o: f32[2, 5, 8] = aten.linear(input=%norm",
).replace("  param %to_out.bias", "  param %n.weight: f32[12]\n  param %to_out.bias")


def test_a_norm_after_attention_keeps_the_zeros_of_skipped_heads(
    with_weights: Callable[[Graph], Program], target: Target
) -> None:
    program = with_weights(Graph.parse(NORMED))
    before = replace(program, graph=grouped(program.graph, always((SPARSE, (2,)), (DENSE, (1,)), (SKIP, (0,)))))
    after = replace(program, graph=fused(before.graph, target))
    assert [node.type.shape[1] for node in after.graph.find("aten.zeros_like")] == [1]
    assert error(before, after, torch.float64) < 1e-12


def test_a_weight_that_others_read_too_stays_as_it_is_for_them(
    with_weights: Callable[[Graph], Program], target: Target
) -> None:
    text = SMALL.replace("  return %o", "  %again: f32[12] = aten.relu(self=%to_q.bias)\n  return %o, %again")
    program = with_weights(Graph.parse(text))
    before = replace(program, graph=grouped(program.graph, always((SPARSE, (2,)), (DENSE, (0, 1)))))
    after = replace(program, graph=fused(before.graph, target))
    assert error(before, after, torch.float64) < 1e-12


def altered(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


REFUSED = {
    "an unknown operator": (
        altered(
            SMALL,
            "self=%v, size=[2, 5, 3, 4])",
            "self=%sum, size=[2, 5, 3, 4])",
        ).replace("  %v.view", "  %sum: f32[2, 5, 12] = aten.cumsum(self=%v, dim=2)\n  %v.view"),
        "%sum: aten.cumsum has no rule that says where it leaves the heads of %sum",
    ),
    "a query that goes out": (
        altered(SMALL, "return %o", "return %o, %q"),
        "%q belongs to the graph's interface, whose heads stay as they are",
    ),
    "a query that another attention reads": (
        altered(
            SMALL,
            "  return %o",
            "  %z: f32[2, 3, 5, 4] = aten.scaled_dot_product_attention(query=%q.heads, key=%e, value=%e)\n"
            "  return %o, %z",
        ).replace("  param %to_q.weight", "  input %e: f32[2, 3, 5, 4]\n  param %to_q.weight"),
        "%z: %q.heads goes through another attention too",
    ),
    "a key without a projection": (
        altered(
            SMALL, "%k.view: f32[2, 5, 3, 4] = aten.view(self=%k,", "%k.view: f32[2, 5, 3, 4] = aten.view(self=%u,"
        ).replace("  param %to_q.weight", "  input %u: f32[2, 5, 12]\n  param %to_q.weight"),
        "%u belongs to the graph's interface, whose heads stay as they are",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_heads_whose_way_is_unclear_stay_where_they_are(what: str, target: Target) -> None:
    text, reason = REFUSED[what]
    graph = grouped(Graph.parse(text), lambda node: [(SPARSE, (2,)), (DENSE, (0, 1))] if node.name == "y" else [])
    assert FuseHeads().refusals(graph, target) == {"y": reason}
    assert FuseHeads().run(graph, target, {}) is graph


def test_a_part_that_is_looked_at_from_elsewhere_is_refused(target: Target) -> None:
    graph = grouped(Graph.parse(SMALL), always((SPARSE, (2,)), (DENSE, (0, 1))))
    graph = replace(graph, outputs=(*graph.outputs, "y.part0"))
    assert FuseHeads().refusals(graph, target) == {"y": "%y.part0, which is of some heads only, is used elsewhere too"}


def test_all_heads_skipped_before_a_norm_over_them_is_refused(target: Target) -> None:
    graph = grouped(Graph.parse(NORMED), always((SKIP, (0, 1, 2))))
    assert FuseHeads().refusals(graph, target) == {"y": "all heads are skipped, and a norm after attention needs them"}


def test_permuted_weights_can_be_quantized(models: dict[str, Program], target: Target) -> None:
    program = models["cogvideox-mini"]
    graph = fused(grouped(program.graph, shuffled(1, skipped=0)), target)
    place = "transformer_blocks.0.attn1.to_q.linear"
    assert graph.producers[place].ref("weight") == f"{place}.weight"
    assert QuantizeLinear().choices(graph, target)[place] == QuantizeLinear().choices(program.graph, target)[place]
    after = QuantizeLinear().run(graph, target, {place: "i8"})
    check_types(after)
    kept = materialize(replace(program, graph=after))
    assert kept.graph.producers[place].op == "intarsia.linear_i8"
    assert error(replace(program, graph=graph), replace(program, graph=after), torch.float32) < 0.05


@pytest.mark.parametrize("skipped", [0, 2])
def test_norms_with_rotation_are_fused_afterwards_as_before(
    skipped: int, models: dict[str, Program], target: Target
) -> None:
    program = models["wan-mini"]
    graph = fused(grouped(program.graph, shuffled(2, skipped=skipped)), target)
    kernels = FuseKernels(everywhere=True)
    plain, after = (kernels.run(one, target, {}) for one in (program.graph, graph))
    check_types(after)
    assert len(list(after.find("intarsia.norm_rope"))) == len(list(plain.find("intarsia.norm_rope"))) == 12
    assert error(replace(program, graph=graph), replace(program, graph=after), torch.float32) < 1e-5


@pytest.mark.parametrize("name", ["cogvideox-mini", "wan-mini"])
def test_what_sparse_attention_leaves_is_fused(name: str, models: dict[str, Program], target: Target) -> None:
    from intarsia.passes.sparse_attention import SparseAttention

    program, sparse, random = models[name], SparseAttention(), Random(4)
    chosen = {place: random.choice(options) for place, options in sparse.choices(program.graph, target).items()}
    before = sparse.run(program.graph, target, chosen)
    assert gathers(before)
    after = fused(before, target)
    assert error(replace(program, graph=before), replace(program, graph=after), torch.float64) < 1e-12


def test_a_view_of_the_joined_result_lies_as_attentions_own(
    with_weights: Callable[[Graph], Program], target: Target
) -> None:
    program = with_weights(
        Graph.parse(SMALL.replace("aten.reshape(self=%y.permute, shape", "aten.view(self=%y.permute, size"))
    )
    groups = ((DENSE, (0, 2)), (DENSE, (1,)))
    before = rewrite(program.graph, lambda node: apart(node, groups, program.graph) if node.op == ATTENTION else None)
    after = fused(before, target)
    assert after.producers["y.view"].op == "aten.view"
    assert error(program, replace(program, graph=after), torch.float64) < 1e-12


def test_all_heads_skipped_under_a_call_that_looks_at_their_result_is_refused(target: Target) -> None:
    text = altered(SMALL, "return %o", "%type: f32[2, 5, 8] = aten.type_as(self=%x, other=%y.view)\n  return %o, %type")
    graph = grouped(Graph.parse(text), always((SKIP, (0, 1, 2))))
    reason = "all heads are skipped, and it is not known what %type gives then"
    assert FuseHeads().refusals(graph, target) == {"y": reason}


def test_heads_that_are_not_put_back_in_their_places_are_no_site(target: Target) -> None:
    graph = grouped(Graph.parse(SMALL), always((DENSE, (0, 2)), (DENSE, (1,))))
    turned = Node("intarsia.integers", {"runs": "2:1*1,0:2*1"}, graph.producers["y.places"].outputs)
    graph = rewrite(graph, lambda node: (turned,) if node.name == "y.places" else None)
    assert FuseHeads().run(graph, target, {}) is graph


def test_sizes_may_have_names(target: Target) -> None:
    graph = Graph.parse((GOLDEN / "wan-block-dynamic.clean.graph").read_text())
    after = fused(grouped(graph, always((DENSE, (1,)), (SKIP, (0,)))), target)
    assert [str(node.type) for node in after.find(ATTENTION)] == ["f32[batch, 1, frames*height*width, 16]"] * 2
