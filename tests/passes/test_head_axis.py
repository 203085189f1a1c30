"""Each rule tells the truth: permuting the heads as it says and then calling is calling and then permuting."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs
from intarsia.passes import head_axis
from intarsia.passes.head_axis import carried
from intarsia.passes.head_blocks import HeadAxis, reshaped
from intarsia.passes.head_place import Place
from intarsia.passes.head_trace import Surroundings, trace_heads

HEADS, ORDER = 4, (2, 0, 3, 1)

MERGED, OWN = HeadAxis(2, 6), HeadAxis(2, 1)

CALLS = {
    "linear, rows": (
        "x: f32[2, 5, 8]; w: f32[24, 8]; b: f32[24]",
        "%y: f32[2, 5, 24] = aten.linear(input=%x, weight=%w, bias=%b)",
        ("y", MERGED),
        {"w": HeadAxis(0, 6), "b": HeadAxis(0, 6), "y": MERGED},
    ),
    "linear, columns": (
        "x: f32[2, 5, 24]; w: f32[8, 24]; b: f32[8]",
        "%y: f32[2, 5, 8] = aten.linear(input=%x, weight=%w, bias=%b)",
        ("x", MERGED),
        {"x": MERGED, "w": HeadAxis(1, 6)},
    ),
    "linear of each head": (
        "x: f32[2, 5, 4, 6]; w: f32[3, 6]",
        "%y: f32[2, 5, 4, 3] = aten.linear(input=%x, weight=%w, bias=None)",
        ("y", OWN),
        {"x": OWN, "y": OWN},
    ),
    "view that cuts": (
        "x: f32[2, 5, 24]",
        "%y: f32[2, 5, 4, 3, 2] = aten.view(self=%x, size=[2, 5, 4, 3, 2])",
        ("x", MERGED),
        {"y": OWN},
    ),
    "view that joins": (
        "x: f32[2, 5, 4, 6]",
        "%y: f32[10, 24] = aten.view(self=%x, size=[10, 24])",
        ("x", OWN),
        {"y": HeadAxis(1, 6)},
    ),
    "view of rotary pairs over all heads": (
        "x: f32[2, 5, 24]",
        "%y: f32[2, 5, 12, 2] = aten.view(self=%x, size=[2, 5, 12, 2])",
        ("y", HeadAxis(2, 3)),
        {"x": MERGED},
    ),
    "view of query, key and value at once": (
        "x: f32[2, 5, 72]",
        "%y: f32[2, 5, 3, 4, 6] = aten.view(self=%x, size=[2, 5, 3, 4, 6])",
        ("y", HeadAxis(3, 1)),
        {"x": HeadAxis(2, 6, (0, 24, 48))},
    ),
    "reshape that joins batch and heads": (
        "x: f32[2, 4, 5, 6]",
        "%y: f32[8, 5, 6] = aten.reshape(self=%x, shape=[8, 5, 6])",
        ("x", HeadAxis(1, 1)),
        {"y": HeadAxis(0, 1, (0, 4))},
    ),
    "unsafe view": (
        "x: f32[2, 5, 4, 6]",
        "%y: f32[2, 5, 24] = aten._unsafe_view(self=%x, size=[2, 5, 24])",
        ("y", MERGED),
        {"x": OWN},
    ),
    "unflatten": (
        "x: f32[2, 5, 24]",
        "%y: f32[2, 5, 4, 6] = aten.unflatten.int(self=%x, dim=-1, sizes=[4, 6])",
        ("y", OWN),
        {"x": MERGED},
    ),
    "flatten": (
        "x: f32[2, 5, 4, 6]",
        "%y: f32[2, 5, 24] = aten.flatten.using_ints(self=%x, start_dim=2, end_dim=3)",
        ("x", OWN),
        {"y": MERGED},
    ),
    "unsqueeze": (
        "x: f32[2, 5, 4, 6]",
        "%y: f32[2, 1, 5, 4, 6] = aten.unsqueeze(self=%x, dim=1)",
        ("x", OWN),
        {"y": HeadAxis(3, 1)},
    ),
    "permute": (
        "x: f32[2, 5, 4, 6]",
        "%y: f32[4, 2, 5, 6] = aten.permute(self=%x, dims=[2, 0, 1, 3])",
        ("y", HeadAxis(0, 1)),
        {"x": OWN},
    ),
    "transpose": (
        "x: f32[2, 5, 4, 6]",
        "%y: f32[2, 4, 5, 6] = aten.transpose.int(self=%x, dim0=1, dim1=-2)",
        ("x", OWN),
        {"y": HeadAxis(1, 1)},
    ),
    "slice of tokens": (
        "x: f32[2, 5, 24]",
        "%y: f32[2, 3, 24] = aten.slice.Tensor(self=%x, dim=1, start=-3, end=9223372036854775807)",
        ("x", MERGED),
        {"x": MERGED, "y": MERGED},
    ),
    "slice of a key out of query, key and value": (
        "x: f32[2, 5, 72]",
        "%y: f32[2, 5, 24] = aten.slice.Tensor(self=%x, dim=-1, start=24, end=48)",
        ("x", HeadAxis(2, 6, (0, 24, 48))),
        {"y": MERGED},
    ),
    "split into query and the rest": (
        "x: f32[2, 5, 79]",
        "%y: f32[2, 5, 24], %z: f32[2, 5, 55] = aten.split_with_sizes(self=%x, split_sizes=[24, 55], dim=2)",
        ("x", HeadAxis(2, 6, (0, 24, 48))),
        {"y": MERGED, "z": HeadAxis(2, 6, (0, 24))},
    ),
    "split into equal parts": (
        "x: f32[2, 5, 48]",
        "%y: f32[2, 5, 24], %z: f32[2, 5, 24] = aten.split.Tensor(self=%x, split_size=24, dim=-1)",
        ("x", HeadAxis(2, 6, (0, 24))),
        {"y": MERGED, "z": MERGED},
    ),
    "chunk": (
        "x: f32[2, 5, 48]",
        "%y: f32[2, 5, 24], %z: f32[2, 5, 24] = aten.chunk(self=%x, chunks=2, dim=2)",
        ("x", HeadAxis(2, 6, (24,))),
        {"z": MERGED},
    ),
    "cat of text and video tokens": (
        "x: f32[2, 5, 24]; t: f32[2, 3, 24]",
        "%y: f32[2, 8, 24] = aten.cat(tensors=[%t, %x], dim=1)",
        ("x", MERGED),
        {"x": MERGED, "t": MERGED, "y": MERGED},
    ),
    "cat of attention and MLP": (
        "x: f32[2, 5, 24]; m: f32[2, 5, 7]",
        "%y: f32[2, 5, 31] = aten.cat(tensors=[%m, %x], dim=-1)",
        ("x", MERGED),
        {"y": HeadAxis(2, 6, (7,))},
    ),
    "unbind of pairs": (
        "x: f32[2, 4, 3, 2]",
        "%y: f32[2, 4, 3], %z: f32[2, 4, 3] = aten.unbind.int(self=%x, dim=-1)",
        ("y", HeadAxis(1, 1)),
        {"x": HeadAxis(1, 1), "y": HeadAxis(1, 1), "z": HeadAxis(1, 1)},
    ),
    "unbind of query and key": (
        "x: f32[2, 2, 4, 3]",
        "%y: f32[2, 4, 3], %z: f32[2, 4, 3] = aten.unbind.int(self=%x, dim=0)",
        ("x", HeadAxis(2, 1)),
        {"x": HeadAxis(2, 1), "y": HeadAxis(1, 1), "z": HeadAxis(1, 1)},
    ),
    "select": (
        "x: f32[3, 2, 4, 6]",
        "%y: f32[2, 4, 6] = aten.select.int(self=%x, dim=0, index=1)",
        ("y", HeadAxis(1, 1)),
        {"x": HeadAxis(2, 1), "y": HeadAxis(1, 1)},
    ),
    "stack": (
        "x: f32[2, 5, 12]; z: f32[2, 5, 12]",
        "%y: f32[2, 5, 12, 2] = aten.stack(tensors=[%x, %z], dim=-1)",
        ("x", HeadAxis(2, 3)),
        {"x": HeadAxis(2, 3), "z": HeadAxis(2, 3), "y": HeadAxis(2, 3)},
    ),
    "rotated tokens written back": (
        "x: f32[2, 4, 5, 6]; z: f32[2, 4, 3, 6]",
        "%y: f32[2, 4, 5, 6] = aten.slice_scatter(self=%x, src=%z, dim=2, start=2, end=9223372036854775807)",
        ("y", HeadAxis(1, 1)),
        dict.fromkeys("xyz", HeadAxis(1, 1)),
    ),
    "tokens by an index": (
        "x: f32[2, 4, 2, 6]; i: i64[3]",
        "%y: f32[2, 4, 3, 6] = aten.index_select(self=%x, dim=2, index=%i)",
        ("x", HeadAxis(1, 1)),
        {"y": HeadAxis(1, 1)},
    ),
    "norm over all heads": (
        "x: f32[2, 5, 24]; w: f32[24]",
        "%y: f32[2, 5, 24] = aten.rms_norm(input=%x, normalized_shape=[24], weight=%w, eps=1e-06)",
        ("x", MERGED),
        {"x": MERGED, "y": MERGED, "w": HeadAxis(0, 6)},
    ),
    "norm of each head": (
        "x: f32[2, 4, 5, 6]; w: f32[6]; b: f32[6]",
        "%y: f32[2, 4, 5, 6] = aten.layer_norm(input=%x, normalized_shape=[6], weight=%w, bias=%b)",
        ("y", HeadAxis(1, 1)),
        {"x": HeadAxis(1, 1), "y": HeadAxis(1, 1)},
    ),
    "norm over heads and channels": (
        "x: f32[2, 5, 4, 6]; w: f32[4, 6]; b: f32[4, 6]",
        "%y: f32[2, 5, 4, 6] = aten.layer_norm(input=%x, normalized_shape=[4, 6], weight=%w, bias=%b)",
        ("w", HeadAxis(0, 1)),
        {"x": OWN, "y": OWN, "w": HeadAxis(0, 1), "b": HeadAxis(0, 1)},
    ),
    "mean over channels": (
        "x: f32[2, 4, 5, 6]",
        "%y: f32[2, 4, 6] = aten.mean.dim(self=%x, dim=[2])",
        ("y", HeadAxis(1, 1)),
        {"x": HeadAxis(1, 1), "y": HeadAxis(1, 1)},
    ),
    "mean over heads": (
        "x: f32[2, 5, 24]",
        "%y: f32[2, 5, 1] = aten.mean.dim(self=%x, dim=[-1], keepdim=True)",
        ("x", MERGED),
        {},
    ),
    "sum": (
        "x: f32[2, 4, 5, 6]",
        "%y: f32[4, 5, 1] = aten.sum.dim_IntList(self=%x, dim=[0], keepdim=False)",
        ("x", HeadAxis(1, 1)),
        {"x": HeadAxis(1, 1), "y": HeadAxis(0, 1)},
    ),
    "largest": (
        "x: f32[2, 4, 5, 6]",
        "%y: f32[2, 4, 5, 1] = aten.amax(self=%x, dim=[-1], keepdim=True)",
        ("x", HeadAxis(1, 1)),
        {"x": HeadAxis(1, 1), "y": HeadAxis(1, 1)},
    ),
    "product with tables that are alike for all heads": (
        "x: f32[2, 5, 4, 6]; c: f32[1, 5, 1, 6]",
        "%y: f32[2, 5, 4, 6] = aten.mul.Tensor(self=%x, other=%c)",
        ("x", OWN),
        {"x": OWN, "y": OWN},
    ),
    "product with tables of each head": (
        "x: f32[2, 5, 24]; c: f32[5, 24]",
        "%y: f32[2, 5, 24] = aten.mul.Tensor(self=%x, other=%c)",
        ("y", MERGED),
        {"x": MERGED, "y": MERGED, "c": HeadAxis(1, 6)},
    ),
    "expand": (
        "x: f32[2, 5, 1, 6]",
        "%y: f32[2, 5, 4, 6] = aten.expand(self=%x, size=[2, 5, 4, -1])",
        ("y", OWN),
        {"y": OWN},
    ),
    "copy": (
        "x: f32[2, 4, 6]; z: f32[4, 6]",
        "%y: f32[2, 4, 6] = aten.copy(self=%x, src=%z)",
        ("y", HeadAxis(1, 1)),
        {"x": HeadAxis(1, 1), "y": HeadAxis(1, 1), "z": HeadAxis(0, 1)},
    ),
    "norm and rotation in one kernel": (
        "x: f32[2, 5, 24]; w: f32[24]; c: f32[5, 3]; s: f32[5, 3]",
        "%y: f32[2, 5, 4, 6] = intarsia.norm_rope(input=%x, weight=%w, cos=%c, sin=%s, heads=4, eps=1e-06)",
        ("y", OWN),
        {"x": MERGED, "y": OWN, "w": HeadAxis(0, 6)},
    ),
    **{
        op: (
            "x: f32[2, 5, 24]",
            f"%y: f32[2, 5, 24] = aten.{op}(self=%x{args})",
            ("y", MERGED),
            {"x": MERGED, "y": MERGED},
        )
        for op, args in {
            "_to_copy": ", dtype=torch.float32",
            "alias": "",
            "clone": "",
            "contiguous": "",
            "detach": "",
            "gelu": "",
            "to.dtype": ", dtype=torch.float32",
            "zeros_like": "",
        }.items()
    },
    "type of another value": (
        "x: f32[2, 5, 24]; z: f32[3]",
        "%y: f32[2, 5, 24] = aten.type_as(self=%x, other=%z)",
        ("x", MERGED),
        {"x": MERGED, "y": MERGED},
    ),
}

REFUSING = {"aten.scaled_dot_product_attention", "intarsia.attention", "intarsia.block_sparse_attention"}

UNDEFINED = {"aten.empty_like"}
"""What holds no values that could be compared; its rule is that of ``zeros_like``."""


def one_call(inputs: str, call: str) -> Graph:
    values = "\n".join(f"  input %{value.strip()}" for value in inputs.split(";"))
    results = ", ".join(part.partition(":")[0].strip() for part in call.partition(" = ")[0].split("],"))
    return Graph.parse(f"graph one {{\n{values}\n  {call}\n  return {results}\n}}\n")


def permuted(tensor: Tensor, axis: HeadAxis | None) -> Tensor:
    if axis is None:
        return tensor
    entries = axis.entries(ORDER, HEADS, tensor.shape[axis.axis])
    return tensor.index_select(axis.axis, torch.tensor(entries))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_permuted_heads_gives_permuted_heads(name: str) -> None:
    inputs, call, (value, axis), expected = CALLS[name]
    graph = one_call(inputs, call)
    found = carried(Place(graph.nodes[0], graph, value, axis, HEADS))
    assert not isinstance(found, str), found
    assert found.axes == expected
    axes: Mapping[str, HeadAxis] = {value: axis, **found.axes}
    given = example_inputs(graph)
    moved = [permuted(tensor, axes.get(input.name)) for input, tensor in zip(graph.inputs, given, strict=True)]
    run = Program(graph, {}).module()
    for result, before, after in zip(graph.outputs, run(*given), run(*moved), strict=True):
        torch.testing.assert_close(after, permuted(before, axes.get(result)))


def test_every_rule_has_an_example() -> None:
    seen = {one_call(inputs, call).nodes[0].op for inputs, call, _, _ in CALLS.values()}
    assert set(head_axis._RULES) - seen == REFUSING | UNDEFINED


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("norm over all heads", True),
        ("norm over heads and channels", True),
        ("mean over heads", True),
        ("norm and rotation in one kernel", True),
        ("norm of each head", False),
        ("mean over channels", False),
        ("linear, rows", False),
    ],
)
def test_only_what_mixes_heads_needs_all_of_them(name: str, whole: bool) -> None:
    inputs, call, (value, axis), _ = CALLS[name]
    graph = one_call(inputs, call)
    found = carried(Place(graph.nodes[0], graph, value, axis, HEADS))
    assert not isinstance(found, str)
    assert found.whole is whole


@pytest.mark.parametrize(
    ("inputs", "call", "axis", "reason"),
    [
        (
            "x: f32[2, 5, 24]",
            "%y: f32[2, 5, 2, 2, 6] = aten.view(self=%x, size=[2, 5, 2, 2, 6])",
            MERGED,
            "aten.view from [2, 5, 24] to [2, 5, 2, 2, 6] does not keep the 4 heads together",
        ),
        (
            "x: f32[2, 5, 24]",
            "%y: f32[2, 5, 12] = aten.slice.Tensor(self=%x, dim=2, start=6, end=18)",
            MERGED,
            "aten.slice.Tensor cuts between the 4 heads of %x",
        ),
        (
            "x: f32[2, 5, 24]",
            "%y: f32[2, 5, 12] = aten.slice.Tensor(self=%x, dim=2, start=0, end=24, step=2)",
            MERGED,
            "aten.slice.Tensor takes entries of the heads' axis from 0 in steps of 2",
        ),
        (
            "x: f32[2, 5, 4, 6]",
            "%y: f32[2, 5, 6] = aten.select.int(self=%x, dim=2, index=0)",
            OWN,
            "aten.select.int takes the heads of %x apart",
        ),
        (
            "x: f32[2, 5, 4, 6]; i: i64[2]",
            "%y: f32[2, 5, 2, 6] = aten.index_select(self=%x, dim=2, index=%i)",
            OWN,
            "aten.index_select takes single heads of %x",
        ),
        (
            "x: f32[2, 5, 4, 6]; z: f32[2, 5, 1, 6]",
            "%y: f32[2, 5, 4, 6] = aten.slice_scatter(self=%x, src=%z, dim=2, start=0, end=1)",
            OWN,
            "aten.slice_scatter writes into the heads' axis",
        ),
        (
            "x: f32[2, 5, 24]; c: f32[5, 2]; s: f32[5, 2]",
            "%y: f32[2, 5, 6, 4] = intarsia.norm_rope(input=%x, weight=None, cos=%c, sin=%s, heads=6, eps=1e-06)",
            MERGED,
            "intarsia.norm_rope is of 6 heads, attention of 4",
        ),
        (
            "x: f32[2, 5, 24]",
            "%y: f32[2, 5, 24] = aten.cumsum(self=%x, dim=2)",
            MERGED,
            "aten.cumsum has no rule that says where it leaves the heads of %x",
        ),
        (
            "x: f32[2, 4, 5, 6]",
            "%y: f32[2, 4, 5, 6] = aten.scaled_dot_product_attention(query=%x, key=%x, value=%x)",
            HeadAxis(1, 1),
            "%x goes through another attention too",
        ),
    ],
)
def test_a_call_that_loses_the_heads_is_refused(inputs: str, call: str, axis: HeadAxis, reason: str) -> None:
    graph = one_call(inputs, call)
    assert carried(Place(graph.nodes[0], graph, "x", axis, HEADS)) == reason


def test_heads_within_named_tokens_are_not_followed() -> None:
    assert reshaped(HeadAxis(2, 1), (2, "N", 4, 6), (2, "N*4", 6), 4) is None


def test_axes_of_one_entry_are_in_nobodys_way() -> None:
    assert reshaped(HeadAxis(2, 6), (1, 5, 24), (1, 5, 1, 4, 1, 6), 4) == HeadAxis(3, 1)


def test_two_ways_to_lie_are_no_proof() -> None:
    graph = Graph.parse(
        """graph two {
  input %x: f32[2, 5, 8]
  param %w: f32[16, 8]
  param %v: f32[3, 4]
  %p: f32[2, 5, 16] = aten.linear(input=%x, weight=%w, bias=None)
  %q: f32[2, 5, 4, 4] = aten.view(self=%p, size=[2, 5, 4, 4])
  %t: f32[2, 5, 4, 4] = aten.transpose.int(self=%q, dim0=2, dim1=3)
  %y: f32[2, 5, 4, 4] = aten.add.Tensor(self=%q, other=%t)
  %z: f32[2, 5, 4, 3] = aten.linear(input=%y, weight=%v, bias=None)
  return %z
}
"""
    )
    reason = trace_heads(Surroundings(graph), {"q": OWN}, 4, frozenset())
    assert isinstance(reason, str)
    assert "would lie in two ways, as blocks of 1 along axis" in reason


def test_what_comes_in_or_goes_out_keeps_its_heads() -> None:
    graph = Graph.parse(
        "graph way {\n  input %x: f32[2, 5, 24]\n"
        "  %q: f32[2, 5, 4, 6] = aten.view(self=%x, size=[2, 5, 4, 6])\n  return %q\n}\n"
    )
    reason = "%q belongs to the graph's interface, whose heads stay as they are"
    assert trace_heads(Surroundings(graph), {"q": OWN}, 4, frozenset()) == reason


def test_values_that_no_call_connects_are_on_different_paths() -> None:
    graph = Graph.parse(
        """graph paths {
  input %x: f32[2, 5, 8]
  param %a: f32[24, 8]
  param %b: f32[24, 8]
  param %n: f32[24]
  %q: f32[2, 5, 24] = aten.linear(input=%x, weight=%a, bias=None)
  %m: f32[2, 5, 24] = aten.rms_norm(input=%q, normalized_shape=[24], weight=%n, eps=1e-06)
  %v: f32[2, 5, 24] = aten.linear(input=%x, weight=%b, bias=None)
  %y: f32[2, 5, 24] = intarsia.none(self=%m, other=%v)
  return %y
}
"""
    )
    paths = trace_heads(Surroundings(graph), {"m": MERGED, "v": MERGED}, 4, {"y"})
    assert not isinstance(paths, str)
    assert {frozenset(path.axes): path.whole for path in paths} == {frozenset("qm"): True, frozenset("v"): False}
    assert {use for path in paths for use in path.weights} == {("q", "a"), ("m", "n"), ("v", "b")}
