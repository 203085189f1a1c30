"""What counts as a float operator or a division between a network's inputs and its outputs."""

from __future__ import annotations

import pytest

from intarsia.ir.graph import Graph
from intarsia.passes.integer_only import integer_only

INTEGERS = """graph g {{
  size N in [1, inf]
  input %x: f32[N, 2, 4, 4]
  param %w: f32[2]
  %rows: int = aten.sym_size.int(self=%x, dim=0)
  %moved: f32[N, 2, 16] = aten.view(self=%x, size=[%rows, 2, 16])
  %codes: i8[N, 2, 16] = intarsia.quantize_static(input=%moved, scale=0.1, low=-128, high=127)
  %relu: i8[N, 2, 16] = aten.relu(self=%codes)
  %constant: f32[2] = aten.exp(self=%w)
{body}
  %back: f32[N, 2, 16] = intarsia.dequantize_static(input=%end, scale=0.1, dtype=torch.float32)
  %out: f32[N, 32] = aten.flatten.using_ints(self=%back, start_dim=1)
  return %out
}}
"""


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("%end: i8[N, 2, 16] = aten.relu(self=%relu)", ()),
        (
            "%end: i8[N, 2, 16] = aten.floor_divide(self=%relu, other=%relu)",
            ("%end: aten.floor_divide divides; lower-integer multiplies and shifts",),
        ),
        (
            "%f: f32[N, 2, 16] = intarsia.dequantize_static(input=%relu, scale=0.1, dtype=torch.float32)\n"
            "  %end: i8[N, 2, 16] = intarsia.quantize_static(input=%f, scale=0.2, low=-128, high=127)",
            ("%end: intarsia.quantize_static requantizes %f through float",),
        ),
        (
            "%f: f32[N, 2, 16] = intarsia.dequantize_static(input=%relu, scale=0.1, dtype=torch.float32)\n"
            "  %s: f32[N, 2, 16] = aten.softmax.int(self=%f, dim=-1)\n"
            "  %v: f32[N, 2, 16] = aten.clone(self=%s)\n"
            "  %end: i8[N, 2, 16] = intarsia.quantize_static(input=%v, scale=0.2, low=-128, high=127)",
            (
                "%s: aten.softmax.int is in float; integer-islands has an integer form",
                "%v: aten.clone is computed in float: not all that it reads comes in integers",
            ),
        ),
    ],
)
def test_only_what_computes_with_floats_between_the_ends_is_listed(body: str, lines: tuple[str, ...]) -> None:
    assert integer_only(Graph.parse(INTEGERS.format(body=f"  {body}"))) == lines


def test_a_float_network_is_no_integer_network(mlp: Graph) -> None:
    assert integer_only(mlp) == (
        "%up: aten.linear is kept in float: its input, weight or result is on no integer grid",
        "%relu: aten.relu is computed in float: not all that it reads comes in integers",
        "%down: aten.linear is kept in float: its input, weight or result is on no integer grid",
        "%head: aten.linear is kept in float: its input, weight or result is on no integer grid",
    )


def test_an_average_that_cannot_be_one_says_why() -> None:
    graph = Graph.parse("""graph g {
  input %x: f32[1, 2, 5, 5]
  %y: f32[1, 2, 2, 2] = aten.adaptive_avg_pool2d(self=%x, output_size=[2, 2])
  return %y
}
""")
    reason = "an average of 5x5 to 2x2 has no integer form: its windows differ in size"
    assert integer_only(graph) == (f"%y: aten.adaptive_avg_pool2d: {reason}",)
