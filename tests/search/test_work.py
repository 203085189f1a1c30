"""What a call does is counted by hand and compared."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from intarsia.ir.errors import InvalidGraph
from intarsia.ir.exported import trace
from intarsia.ir.graph import Graph
from intarsia.search.work import CLASSES, attention_sites, node_work, sizes_of, summary, weight_bytes


def work(line: str, header: str = "input %x: f32[2, 8, 16]\n param %w: f32[32, 16]") -> tuple[float, int]:
    graph = Graph.parse(f"graph g {{\n {header}\n {line}\n return %y\n}}")
    found = node_work(graph.nodes[-1], graph, {})
    assert found is not None
    return found.flops, found.bytes


def test_counts_two_operations_for_each_weight_and_row_of_a_linear_layer():
    flops, moved = work("%y: f32[2, 8, 32] = aten.linear(input=%x, weight=%w, bias=None)")
    assert flops == 2 * (2 * 8) * 16 * 32
    assert moved == 4 * (2 * 8 * 16 + 32 * 16 + 2 * 8 * 32)


def test_counts_a_named_size_at_its_value_and_names_it_when_it_has_none():
    graph = Graph.parse("""graph g {
      size N in [1, 64]
      input %x: f32[N, 16]
      param %w: f32[4, 16]
      %y: f32[N, 4] = aten.linear(input=%x, weight=%w)
      return %y
    }""")
    assert summary(graph, {"N": 10}).flops == 2 * 10 * 4 * 16
    with pytest.raises(InvalidGraph, match="size N has no value"):
        summary(graph)


@pytest.mark.parametrize(
    ("line", "header", "flops"),
    [
        ("%y: f32[3, 5, 7] = aten.bmm(self=%a, mat2=%b)",
         "input %a: f32[3, 5, 4]\n input %b: f32[3, 4, 7]", 2 * 3 * 5 * 7 * 4),
        ("%y: f32[5, 7] = aten.addmm(self=%c, mat1=%a, mat2=%b)",
         "input %a: f32[5, 4]\n input %b: f32[4, 7]\n input %c: f32[7]", 2 * 5 * 7 * 4),
        ("%y: f32[2, 6, 4, 4] = aten.conv2d(input=%a, weight=%b, groups=3)",
         "input %a: f32[2, 3, 6, 6]\n param %b: f32[6, 1, 3, 3]", 2 * (2 * 6 * 4 * 4) * 9),
        ("%y: f32[2, 6, 8] = aten.conv_transpose1d(input=%a, weight=%b, stride=[2])",
         "input %a: f32[2, 3, 4]\n param %b: f32[3, 6, 2]", 2 * (2 * 3 * 4) * 6 * 2),
        ('%y: f32[5, 7] = aten.einsum(equation="ij,jk->ik", tensors=[%a, %b])',
         "input %a: f32[5, 4]\n input %b: f32[4, 7]", 2 * 5 * 7 * 4),
    ],
)  # fmt: skip
def test_counts_products_as_loops_over_all_indices_would(line: str, header: str, flops: int):
    assert work(line, header)[0] == flops


def test_counts_scores_and_weighted_values_of_attention_and_only_the_triangle_of_causal_attention():
    header = "input %q: f16[2, 4, 10, 8]\n input %k: f16[2, 4, 10, 8]\n input %v: f16[2, 4, 10, 16]"
    call = "%y: f16[2, 4, 10, 16] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v"
    assert work(f"{call})", header)[0] == 2 * 8 * 10 * 10 * (8 + 16)
    assert work(f"{call}, is_causal=True)", header)[0] == 2 * 8 * 55 * (8 + 16)


@pytest.mark.parametrize(
    "line",
    [
        "%y: f32[16, 16] = aten.view(self=%x, size=[16, 16])",
        "%y: f32[2, 8, 16] = aten.type_as(self=%x, other=%x)",
        "%y: f32[2, 8, 16] = aten.dropout(input=%x, p=0.1, train=False)",
        "%y: f32[2, 8, 8], %z: f32[2, 8, 8] = aten.split.Tensor(self=%x, split_size=8, dim=2)",
        "%y: int = aten.sym_size.int(self=%x, dim=0)",
    ],
)
def test_views_and_numbers_do_nothing(line: str):
    assert work(line) == (0, 0)


def test_pointwise_operators_copies_and_casts_move_bytes_and_multiply_nothing():
    once = 4 * 2 * 8 * 16
    assert work("%y: f32[2, 8, 16] = aten.relu(self=%x)") == (0, 2 * once)
    assert work("%y: f32[2, 8, 16] = aten.add.Tensor(self=%x, other=%x)") == (0, 2 * once)
    assert work("%y: f32[2, 8, 16] = aten.clone(self=%x)") == (0, 2 * once)
    assert work("%y: f16[2, 8, 16] = aten.to.dtype(self=%x, dtype=torch.float16)") == (0, once + once // 2)


def test_our_own_linear_reads_its_weight_in_eight_bits():
    header = "input %x: f32[8, 16]\n param %q: i8[32, 16]\n param %s: f32[32]"
    flops, moved = work("%y: f32[8, 32] = intarsia.linear_i8(input=%x, weight=%q, scale=%s, bias=None)", header)
    assert flops == 2 * 8 * 16 * 32
    assert moved == 4 * 8 * 16 + 32 * 16 + 4 * 32 + 4 * 8 * 32


def test_an_operator_of_others_is_listed_and_its_bytes_are_counted():
    graph = Graph.parse("graph g {\n input %x: f32[8]\n %y: f32[8] = theirs.magic(x=%x)\n return %y\n}")
    assert node_work(graph.nodes[0], graph, {}) is None
    found = summary(graph)
    assert (found.unknown, found.bytes) == (("theirs.magic",), 64)


def test_weights_are_counted_as_they_are_once_nodes_without_inputs_have_run():
    graph = Graph.parse("""graph g {
      input %x: f32[8, 16]
      param %w: f32[32, 16]
      %q: i8[32, 16], %s: f32[32] = intarsia.quantize_rows(weight=%w)
      %y: f32[8, 32] = intarsia.linear_i8(input=%x, weight=%q, scale=%s, bias=None)
      return %y
    }""")
    assert weight_bytes(graph) == 32 * 16 + 4 * 32
    found = summary(graph)
    assert found.parameters == 32 * 16
    assert found.flops_by_class["linear"] == found.flops == 2 * 8 * 16 * 32
    assert set(found.flops_by_class) == set(CLASSES)


SELF_AND_CROSS = """graph g {
  input %x: f32[1, 6, 8]
  input %memory: f32[1, 6, 8]
  input %table: f32[1, 1, 6, 4]
  param %wq: f32[8, 8]
  param %wk: f32[8, 8]
  param %norm: f32[8]
  %nq: f32[1, 6, 8] = aten.layer_norm(input=%x, normalized_shape=[8], weight=%norm)
  %q: f32[1, 6, 8] = aten.linear(input=%nq, weight=%wq)
  %q4: f32[1, 6, 2, 4] = aten.view(self=%q, size=[1, 6, 2, 4])
  %qh: f32[1, 2, 6, 4] = aten.transpose.int(self=%q4, dim0=1, dim1=2)
  %qr: f32[1, 2, 6, 4] = aten.mul.Tensor(self=%qh, other=%table)
  %k: f32[1, 6, 8] = aten.linear(input=SOURCE, weight=%wk)
  %k4: f32[1, 6, 2, 4] = aten.view(self=%k, size=[1, 6, 2, 4])
  %kh: f32[1, 2, 6, 4] = aten.transpose.int(self=%k4, dim0=1, dim1=2)
  %y: f32[1, 2, 6, 4] = aten.scaled_dot_product_attention(query=%qr, key=%kh, value=%kh)
  return %y
}"""


@pytest.mark.parametrize(("source", "kind"), [("%nq", "self"), ("%x", "self"), ("%memory", "cross")])
def test_tells_self_from_cross_attention_by_data_flow_though_the_token_counts_agree(source: str, kind: str):
    graph = Graph.parse(SELF_AND_CROSS.replace("SOURCE", source))
    (site,) = attention_sites(graph)
    assert (site.batch, site.heads, site.queries, site.keys, site.head_dim, site.kind) == (1, 2, 6, 6, 4, kind)
    assert summary(graph).flops_by_class[f"{kind}-attention"] == 4 * 2 * 6 * 6 * 4


def test_joint_attention_over_two_concatenated_streams_is_self_attention():
    lines = ["graph g {", " input %a: f32[1, 4, 8]", " input %b: f32[1, 2, 8]", " param %w: f32[8, 8]"]
    for part in ("q", "k"):
        lines += [
            f" %{part}a: f32[1, 4, 8] = aten.linear(input=%a, weight=%w)",
            f" %{part}b: f32[1, 2, 8] = aten.linear(input=%b, weight=%w)",
            f" %{part}: f32[1, 6, 8] = aten.cat(tensors=[%{part}a, %{part}b], dim=1)",
        ]
    lines += [" %y: f32[1, 6, 8] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%k)", " return %y", "}"]
    (site,) = attention_sites(Graph.parse("\n".join(lines)))
    assert site.kind == "self"


class Fused(nn.Module):
    """Attention whose query, key and value come from one projection, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_one_projection_for_query_key_and_value_is_self_attention():
    graph = trace(Fused().eval(), {"x": torch.randn(1, 6, 8)}).graph
    assert [site.kind for site in attention_sites(graph)] == ["self"]


def wan_14b(layers: int) -> Graph:
    """Wan 2.1 14B with few layers, at 480x832x81: 32,760 tokens, 512 tokens of text; on the meta device."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        module = diffusers.WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=layers, in_channels=16,
            out_channels=16, text_dim=4096, freq_dim=256, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            patch_size=(1, 2, 2),
        ).to(torch.bfloat16).eval()  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16),
            "timestep": torch.empty(1, dtype=torch.float32),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16),
        }
    return trace(module, inputs, static={"return_dict": False}).graph


def test_wan_14b_agrees_with_the_published_formula_of_its_operations():
    layers, tokens, width, text, hidden = 2, 32_760, 5_120, 512, 13_824
    graph = wan_14b(layers)
    sites = Counter((s.batch, s.heads, s.queries, s.keys, s.head_dim, s.kind) for s in attention_sites(graph))
    assert sites == {(1, 40, tokens, tokens, 128, "self"): layers, (1, 40, tokens, text, 128, "cross"): layers}

    found = summary(graph)
    attention = 4 * tokens**2 * width * layers
    per_token = layers * (
        6 * width**2 + 2 * width * hidden
    )  # q, k, v, o; q, o of the cross attention; the two of the FFN
    assert found.flops_by_class["self-attention"] == attention
    assert found.flops_by_class["cross-attention"] == 4 * tokens * text * width * layers
    formula = attention + 2 * tokens * per_token
    assert found.flops - found.flops_by_class["cross-attention"] == pytest.approx(formula, rel=5e-3)


def test_named_sizes_are_read_off_inputs_through_the_expressions_that_name_them():
    graph = Graph.parse("""graph g {
      size H in [1, 64]
      size N in [1, 64]
      input %x: f32[N, 4*H]
      input %y: f32[H + 1, N*H]
      return %x
    }""")
    assert sizes_of(graph, (torch.zeros(3, 20), torch.zeros(6, 15))) == {"N": 3, "H": 5}


def test_a_graph_of_three_thousand_nodes_is_summed_up_in_well_under_a_second():
    graph = Graph.parse(SELF_AND_CROSS.replace("SOURCE", "%nq"))
    nodes = list(graph.nodes)
    for index in range(375):
        suffix = {value.name: f"{value.name}.{index}" for node in graph.nodes for value in node.outputs}
        nodes += [_renamed(node, suffix) for node in graph.nodes]
    large = replace(graph, nodes=tuple(nodes))
    assert len(large.nodes) > 3000
    start = time.process_time()
    summary(large)
    assert time.process_time() - start < 1.0


def _renamed(node, names):
    from intarsia.ir.graph import Ref

    args = {k: Ref(names.get(a.name, a.name)) if isinstance(a, Ref) else a for k, a in node.args.items()}
    return replace(node, args=args, outputs=tuple(replace(v, name=names[v.name]) for v in node.outputs))
