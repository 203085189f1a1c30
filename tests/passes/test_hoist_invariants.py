"""What a prompt alone tells is cut off from what each step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia import subject as subjects
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.base import find_pass
from intarsia.passes.hoist_invariants import HoistInvariants
from intarsia.passes.quantize_linear import QuantizeLinear

GOLDEN = Path(__file__).parent.parent / "golden"

CROSS = """graph cross {
  input %x: f32[2, 8, 4]
  input %timestep: f32[2]
  input %text: f32[2, 3, 4]
  input %scale: f32[2, 1, 1]
  param %w: f32[4, 4]
  %k: f32[2, 3, 4] = aten.linear(input=%text, weight=%w)
  %v: f32[2, 3, 4] = aten.mul.Tensor(self=%k, other=%scale)
  %q: f32[2, 8, 4] = aten.linear(input=%x, weight=%w)
  %time: f32[2, 1, 1] = aten.view(self=%timestep, size=[2, 1, 1])
  %timed: f32[2, 8, 4] = aten.mul.Tensor(self=%q, other=%time)
  %y: f32[2, 8, 4] = aten.scaled_dot_product_attention(query=%timed, key=%k, value=%v)
  return %y
}
"""


def test_what_the_text_alone_tells_is_the_first_segment() -> None:
    once, step = HoistInvariants().split(Graph.parse(CROSS))
    assert (
        str(once)
        == """graph cross.0 {
  input %text: f32[2, 3, 4]
  input %scale: f32[2, 1, 1]
  param %w: f32[4, 4]
  %k: f32[2, 3, 4] = aten.linear(input=%text, weight=%w)
  %v: f32[2, 3, 4] = aten.mul.Tensor(self=%k, other=%scale)
  return %k, %v
}
"""
    )
    assert [value.name for value in step.inputs] == ["x", "timestep", "k", "v"]
    assert [node.name for node in step.nodes] == ["q", "time", "timed", "y"]


def test_an_input_named_as_changing_is_left_to_the_step() -> None:
    pass_ = find_pass("hoist-invariants(changing=('timestep', 'scale'))")
    once, step = pass_.split(Graph.parse(CROSS))
    assert [value.name for value in once.inputs] == ["text"]
    assert step.nodes[0].name == "v"


def test_a_graph_that_knows_no_time_has_a_sample_all_the_same() -> None:
    graph = Graph.parse(CROSS.replace("%timestep", "%level"))
    once, step = HoistInvariants().split(graph)
    assert "time" in [node.name for node in once.nodes]
    assert step.inputs[0].name == "x"


JOINT = CROSS.replace("%k: f32[2, 3, 4] = aten.linear(input=%text", "%k: f32[2, 8, 4] = aten.linear(input=%x")
ALONE = """graph alone {
  input %x: f32[4]
  param %w: f32[4]
  %y: f32[4] = aten.mul.Tensor(self=%x, other=%w)
  return %y
}
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (JOINT.replace("%v: f32[2, 3, 4]", "%v: f32[2, 8, 4]"), "by what %text, %scale alone tells"),
        (ALONE, "by what anything else tells, for %x change"),
    ],
)
def test_a_graph_with_nothing_to_hoist_is_one_line(text: str, says: str, target: Target) -> None:
    graph = Graph.parse(text)
    with pytest.raises(Unsupported, match=says) as caught:
        HoistInvariants().split(graph)
    assert "\n" not in str(caught.value)
    assert HoistInvariants().refusals(graph, target) == {graph.name: str(caught.value)}


def run_both(whole: Program, segments: tuple[Graph, ...]) -> None:
    """The segments, one after the other, are the graph bit for bit."""
    inputs = example_inputs(whole.graph)
    table = dict(zip((value.name for value in whole.graph.inputs), inputs, strict=True))
    with torch.no_grad():
        expected = whole.module()(*inputs)
        for graph in segments:
            verify(graph)
            answer = Program(graph, whole.weights).module()(*(table[value.name] for value in graph.inputs))
            table |= dict(zip(graph.outputs, answer, strict=True))
    for name, value in zip(whole.graph.outputs, expected, strict=True):
        assert torch.equal(table[name], value)


HOISTED = {"cogvideox-mini": 1, "hunyuanvideo-mini": 57, "ltx-mini": 23}


@pytest.mark.parametrize("model", HOISTED)
def test_small_models_are_cut_without_changing_a_bit(model: str, target: Target) -> None:
    pytest.importorskip("diffusers")
    program = subjects.resolve(model).program
    run_both(made := materialize(program), HoistInvariants().split(made.graph))
    told = HoistInvariants().refusals(program.graph, target)
    assert told[model].startswith(f"no choice: {HOISTED[model]} of ")
    crossing = [
        name for name, reason in told.items() if reason.endswith("keys and values are computed once for each prompt")
    ]
    assert len(crossing) == {"cogvideox-mini": 0, "hunyuanvideo-mini": 1, "ltx-mini": 2}[model]


def test_keys_and_values_of_cross_attention_in_wan_run_once(wan_mini: Program, target: Target) -> None:
    made = materialize(wan_mini)
    once, step = HoistInvariants().split(made.graph)
    run_both(made, (once, step))
    assert [value.name for value in once.inputs] == ["encoder_hidden_states"]
    assert len(once.outputs) == 2 * 6
    assert not any("attn2.to_k" in param.name or "text_embedder" in param.name for param in step.params)


def test_it_goes_with_active_tokens_and_quantized_layers(wan_mini: Program, target: Target) -> None:
    layer = "blocks.0.attn2.to_k.linear"
    graph = QuantizeLinear(min_rows=1).run(wan_mini.graph, target, {layer: "i8"})
    made = materialize(Program(ActiveTokens(caches="linear").run(graph, target, {}), wan_mini.weights))
    once, step = HoistInvariants().split(made.graph)
    run_both(made, (once, step))
    assert [value.name for value in once.inputs] == ["encoder_hidden_states"]
    assert once.producers[layer].op == "intarsia.linear_i8"
    assert {"active", "elapsed", "rate"} <= {value.name for value in step.inputs}


def test_where_the_batch_is_open_only_shapes_are_left_to_the_step(target: Target) -> None:
    graph = find_pass("clean").run(Graph.parse((GOLDEN / "wan-block-dynamic.traced.graph").read_text()), target, {})
    once, _ = HoistInvariants().split(graph)
    assert once.outputs == ("blocks.0.attn2.to_v.linear", "blocks.0.attn2.norm_k.rms_norm")
    told = HoistInvariants().refusals(graph, target)
    assert told["blocks.0.attn2.scaled_dot_product_attention"].endswith("computed once for each prompt")
