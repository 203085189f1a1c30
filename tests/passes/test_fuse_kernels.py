from collections import Counter
from pathlib import Path

import pytest

from intarsia.flow import explain, trace
from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import Target, load_target
from intarsia.passes.base import find_pass
from intarsia.passes.cast_floats import CastFloats
from intarsia.passes.conformance import check_pass
from intarsia.passes.fuse_kernels import FuseKernels

GOLDEN = Path(__file__).parent.parent / "golden"
EVERYWHERE = FuseKernels(everywhere=True)
ROUNDING = 1e-10  # a relative error of 1e-5, squared


def kernels_of(graph: Graph) -> dict[str, int]:
    names = (node.op.removeprefix("intarsia.") for node in graph.nodes if node.op.startswith("intarsia."))
    return dict(Counter(names))


def reasons(program: Program, target: Target) -> Counter[str]:
    """Reasons that the program's places share, without the names in them."""
    told = FuseKernels().refusals(program.graph, target).values()
    return Counter(" ".join(word for word in reason.split() if not word.startswith("%")) for reason in told)


def test_wan_fuses_everything_that_a_block_does_besides_its_products(wan_mini: Program, target: Target) -> None:
    fused = EVERYWHERE.run(wan_mini.graph, target, {})
    assert kernels_of(fused) == {"attention": 12, "gated_residual": 12, "modulated_norm": 13, "norm_rope": 12}
    assert FuseKernels().refusals(wan_mini.graph, target) == {}
    check_pass(EVERYWHERE, wan_mini, target, error=ROUNDING)
    check_pass(FuseKernels(), wan_mini, target)


def test_wan_in_sixteen_bits_fuses_the_same(wan_mini: Program, target: Target) -> None:
    cast = CastFloats("bf16").run(wan_mini.graph, target, {})
    assert kernels_of(EVERYWHERE.run(cast, target, {})) == kernels_of(EVERYWHERE.run(wan_mini.graph, target, {}))


@pytest.mark.parametrize("trace_name", ["wan-block-bf16", "wan-block-dynamic"])
def test_a_block_with_islands_of_f32_or_named_sizes_fuses_the_same(trace_name: str, target: Target) -> None:
    graph = Graph.parse((GOLDEN / f"{trace_name}.clean.graph").read_text())
    fused = EVERYWHERE.run(graph, target, {})
    assert kernels_of(fused) == {"attention": 2, "gated_residual": 2, "modulated_norm": 3, "norm_rope": 2}


def test_cogvideox_fuses_all_but_its_layer_norms_of_heads(target: Target) -> None:
    program = trace("cogvideox-mini")
    check_pass(EVERYWHERE, program, target, error=ROUNDING)
    fused = EVERYWHERE.run(program.graph, target, {})
    assert kernels_of(fused) == {"attention": 2, "gated_residual": 7, "modulated_norm": 9}
    assert reasons(program, target) == {"is a layer norm; intarsia.norm_rope computes RMS norms": 4}


def test_hunyuanvideo_fuses_attention_with_lengths_and_refuses_norms_of_heads(target: Target) -> None:
    program = trace("hunyuanvideo-mini")
    check_pass(EVERYWHERE, program, target, error=ROUNDING)
    fused = EVERYWHERE.run(program.graph, target, {})
    lengths = {node.args["lengths"] for node in fused.find("intarsia.attention")}
    assert len(lengths) == 1
    assert lengths != {None}
    refused = FuseKernels().refusals(program.graph, target)
    assert {place for place in refused if place.endswith("attention")} == {
        place for place in refused if "token_refiner" in place
    }
    assert all("norms each head's" in reason for place, reason in refused.items() if place.endswith(("add", "add_1")))


def test_ltx_fuses_attention_and_gates_and_refuses_rms_norms_and_masks(target: Target) -> None:
    program = trace("ltx-mini")
    check_pass(EVERYWHERE, program, target, error=ROUNDING)
    fused = EVERYWHERE.run(program.graph, target, {})
    assert kernels_of(fused) == {"attention": 2, "gated_residual": 4, "modulated_norm": 1}
    refused = FuseKernels().refusals(program.graph, target)
    assert sum("is an RMS norm" in reason for reason in refused.values()) == 4
    assert sum("every head alike" in reason for reason in refused.values()) == 4
    assert sum("added to the scores" in reason for reason in refused.values()) == 2


def test_only_the_chosen_places_change(wan_mini: Program, target: Target) -> None:
    place = "blocks.3.attn1.scaled_dot_product_attention"
    assert FuseKernels().choices(wan_mini.graph, target)[place] == ("keep", "fuse")
    assert kernels_of(FuseKernels().run(wan_mini.graph, target, {place: "fuse"})) == {"attention": 1}
    assert FuseKernels().run(wan_mini.graph, target, {place: "keep"}) is wan_mini.graph


def test_fusing_everywhere_leaves_nothing_to_choose_and_prints_so(wan_mini: Program, target: Target) -> None:
    assert EVERYWHERE.choices(wan_mini.graph, target) == {}
    assert find_pass(str(EVERYWHERE)) == EVERYWHERE
    assert str(EVERYWHERE) == "fuse-kernels(everywhere=True)"


def test_an_answer_that_cannot_be_is_refused_with_the_reason(mlp: Graph, wan_mini: Program, target: Target) -> None:
    with pytest.raises(PlanError, match="fuse-kernels: %up cannot be fused: nothing there looks like a pattern"):
        FuseKernels().run(mlp, target, {"up": "fuse"})
    with pytest.raises(PlanError, match="fuse-kernels: %up offers keep, fuse; the plan asks for split"):
        FuseKernels().run(mlp, target, {"up": "split"})


def test_explain_needs_no_plan_to_say_what_is_offered_and_what_not(tmp_path: Path) -> None:
    path = tmp_path / "block.graph"
    path.write_text((GOLDEN / "wan-block-bf16.clean.graph").read_text())
    told = explain(path, passes=("fuse-kernels",), target="h100")
    rows = {row.place: row for row in told.rows}
    norm, attention = rows["blocks.0.type_as"], rows["blocks.0.attn1.scaled_dot_product_attention"]
    assert [option.option for option in norm.options] == ["keep", "fuse"]
    assert norm.options[1].seconds < 0
    assert norm.why.startswith("kept; fuse would save 0 bytes and ")
    assert attention.options == ()
    assert attention.why.startswith("a head has 16 channels; on a GPU intarsia.attention takes ")


def test_explain_without_plan_or_pass_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"explain takes a plan \(--plan\), or passes and a machine"):
        explain(GOLDEN / "wan-block-bf16.clean.graph", passes=("fuse-kernels",))


def test_gpus_are_asked_for_their_own_limits(wan_mini: Program) -> None:
    assert FuseKernels().refusals(wan_mini.graph, load_target("h100")) == {}
