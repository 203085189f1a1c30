"""Graphs as text: what they look like, that they read back exactly, and where a broken one is broken."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from intarsia.ir.errors import ParseError
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.sizes import Size
from intarsia.ir.types import BITS, ScalarType, TensorType

TINY = """\
graph tiny {
  size N in [2, 64]
  input %x: f32[N, 8]
  param %fc.weight: f32[4, 8]
  %fc.linear: f32[N, 4] = aten.linear(input=%x, weight=%fc.weight, bias=None)  # model.py:12
  %relu: f32[N, 4] = aten.relu(self=%fc.linear)
  return %relu
}
"""


def test_a_graph_prints_one_line_for_each_size_input_parameter_and_node() -> None:
    graph = Graph(
        name="tiny",
        inputs=(Value("x", TensorType("f32", ("N", 8))),),
        params=(Value("fc.weight", TensorType("f32", (4, 8))),),
        nodes=(
            Node(
                "aten.linear",
                {"input": Ref("x"), "weight": Ref("fc.weight"), "bias": None},
                (Value("fc.linear", TensorType("f32", ("N", 4))),),
                "model.py:12",
            ),
            Node("aten.relu", {"self": Ref("fc.linear")}, (Value("relu", TensorType("f32", ("N", 4))),)),
        ),
        outputs=("relu",),
        sizes=(Size("N", 2, 64),),
    )
    assert str(graph) == TINY
    assert Graph.parse(TINY) == graph


def test_the_source_is_read_back_but_is_no_part_of_the_identity() -> None:
    with_source = Graph.parse(TINY)
    without = Graph.parse(TINY.replace("  # model.py:12", ""))
    assert with_source.nodes[0].source == "model.py:12"
    assert without.nodes[0].source == ""
    assert with_source == without
    assert with_source.fingerprint == without.fingerprint


@pytest.mark.parametrize(
    ("printed", "arg"),
    [
        ("-inf", -math.inf),
        ("inf", math.inf),
        ("nan", math.nan),
        ("1e-05", 1e-5),
        ("-0.0", -0.0),
        ("[]", ()),
        ("[[1, 2], [], [%x]]", ((1, 2), (), (Ref("x"),))),
        ("complex[1.0, -2.5]", 1 - 2.5j),
        ("True", True),
        ("None", None),
        ("torch.float32", Symbol("torch.float32")),
        ('"None"', "None"),
        ('"a \\"quoted\\" %word # with\\nlines\\u2028"', 'a "quoted" %word # with\nlines\u2028'),
    ],
)
def test_an_argument_prints_and_reads_back_as_itself(printed: str, arg: Arg) -> None:
    node = Node("aten.op", {"value": arg}, (Value("y", TensorType("f32", ())),))
    graph = Graph("one", (Value("x", TensorType("f32", ())),), (), (node,), ("y",))
    assert f"aten.op(value={printed})" in str(graph)
    assert Graph.parse(str(graph)) == graph
    assert repr(Graph.parse(str(graph)).nodes[0].args["value"]) == repr(arg)


# JSON joins two code points that make a surrogate pair; every other text, lone surrogates included, stays as it is.
hostile = st.one_of(
    st.text(max_size=12),
    st.text(
        alphabet=st.sampled_from(list("ab.%#\"'\\\n\r\t\0\x1c\x85\u2028\u2029 ={}[](),:-_\ud800\udfff😀")), max_size=12
    ),
    st.sampled_from(["", "return", "None", "inf", "graph", "size", "0", "-1", "blocks.0.to_q", "}", "a b", "%x", "#"]),
).filter(lambda text: json.loads(json.dumps(text)) == text)
dims = st.one_of(
    st.integers(0, 2**40), st.sampled_from(["N", "2*N", "(N//2)*(M//2)", "max(1, (N + 1)//2)", "mod(N, 3)"])
)
types = st.one_of(
    st.builds(TensorType, st.sampled_from(sorted(BITS)), st.lists(dims, max_size=4).map(tuple)),
    st.sampled_from(["int", "float", "bool"]).map(ScalarType),
)
args = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.just(math.nan),
        st.complex_numbers(allow_nan=False),
        hostile,
        hostile.map(Ref),
        st.sampled_from(["torch.float32", "torch.contiguous_format", "torch.strided"]).map(Symbol),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)
values = st.builds(Value, hostile, types)
nodes = st.builds(
    Node,
    hostile,
    st.dictionaries(hostile, args, max_size=3),
    st.lists(values, min_size=1, max_size=3).map(tuple),
    hostile,
)
sizes = st.builds(Size, st.sampled_from(["N", "M", "batch_1"]), st.integers(0, 9), st.none() | st.integers(9, 99))
graphs = st.builds(
    Graph,
    hostile,
    st.lists(values, max_size=3).map(tuple),
    st.lists(values, max_size=3).map(tuple),
    st.lists(nodes, max_size=4).map(tuple),
    st.lists(hostile, max_size=3).map(tuple),
    st.lists(sizes, max_size=2).map(tuple),
)


@given(graphs)
def test_any_graph_reads_back_exactly_whatever_its_names_are(graph: Graph) -> None:
    text = str(graph)
    again = Graph.parse(text)
    assert again == graph
    assert hash(again) == hash(graph)
    assert again.fingerprint == graph.fingerprint
    assert str(Graph.parse(str(again))) == str(again)


@given(graphs)
def test_printed_text_is_one_line_for_each_thing_and_plain_ascii_without_sources(graph: Graph) -> None:
    bare = replace(graph, nodes=tuple(replace(node, source="") for node in graph.nodes))
    text = str(bare)
    assert text.isascii()
    parts = len(graph.sizes) + len(graph.inputs) + len(graph.params) + len(graph.nodes)
    assert len(text.splitlines()) == parts + 3


FRAGMENTS = ["1E5", "1_", "complex[", "[", "]", "=", "%", '"', "\\", "9" * 5000]


@given(st.data())
def test_damaged_text_is_either_a_graph_or_a_parse_error_with_a_line(data: st.DataObject) -> None:
    text = str(data.draw(graphs)) if data.draw(st.booleans()) else TINY
    at = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 5))
    inserted = data.draw(st.text(max_size=3) | st.sampled_from(FRAGMENTS))
    damaged = text[:at] + inserted + text[at + length :]
    try:
        graph = Graph.parse(damaged)
    except ParseError as refused:
        message = str(refused)
    else:
        assert Graph.parse(str(graph)) == graph or "nan" in damaged
        return
    assert message.startswith("line ")


@given(st.text())
def test_text_that_is_no_graph_is_a_parse_error(text: str) -> None:
    assume("graph" not in text)
    with pytest.raises(ParseError, match=r"^line 1"):
        Graph.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected 'graph NAME {', found an empty text"),
        ("grpah g {\n}\n", "line 1, column 1: expected 'graph', found 'grpah g {'"),
        ("graph g\n}\n", "line 1, column 8: expected '{', found 'the end of the line'"),
        ("graph g {\n  input %x: f33[2]\n  return %x\n}\n", "line 2, column 13: expected a type such as f32[2, N]"),
        ("graph g {\n  input %x f32[2]\n}\n", "line 2, column 12: expected ':', found 'f32[2]'"),
        ("graph g {\n  return %x\n", "line 2, column 1: expected a closing '}', found 'return %x'"),
        ("graph g {\n}\n", "line 2, column 1: expected a line 'return %...' before the closing '}', found '}'"),
        ("graph g {\n  return %x\n  return %x\n}\n", "line 3, column 1: expected '}' after 'return'"),
        ("graph g {\n  %y: f32[2] = aten.relu(self=%x\n  return %y\n}\n", "line 2, column 33: expected ','"),
        ("graph g {\n  %y: f32[2] = aten.relu(self)\n  return %y\n}\n", "line 2, column 30: expected '='"),
        ("graph g {\n  %y: f32[2] = aten.relu(self=%x) $\n  return %y\n}\n", "line 2, column 35: expected the end"),
        ("graph g {\n  %y: f32[2] = f(a=1, a=2)\n  return %y\n}\n", "each argument once; a is given twice"),
        ("graph g {\n  %y: f32[2] = f(a=1E+)\n  return %y\n}\n", "line 2, column 21: expected ','"),
        ("graph g {\n  %y: f32[2] = f(a=complex[1])\n  return %y\n}\n", "expected a complex number such as"),
        ("graph g {\n  %y: f32[2] = f(a=complex[1, torch.x])\n  return %y\n}\n", "expected a complex number such as"),
        (
            'graph g {\n  %y: f32[2] = f(a="\\x")\n  return %y\n}\n',
            "line 2, column 20: expected a string with JSON escapes",
        ),
        ("graph g {\n  size N in [1, many]\n  return\n}\n", "line 2, column 8: expected 'NAME in [minimum, maximum]'"),
        ("graph g {\n  output %x\n  return\n}\n", "line 2, column 3: expected size, input, param, return or a node"),
    ],
)
def test_a_parse_error_gives_line_column_what_was_expected_and_what_was_found(text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        Graph.parse(text)
    assert message in str(caught.value)


def test_blank_lines_and_comments_after_a_statement_are_allowed() -> None:
    text = TINY.replace("  return", "\n  return").replace("[N, 8]\n", "[N, 8]  # pixels\n", 1)
    assert Graph.parse(text + "\n\n") == Graph.parse(TINY)


def test_numbers_may_be_written_as_python_writes_them() -> None:
    text = "graph g {\n  %y: f32[] = f(a=1E5, b=1_000, c=-2, d=1., e=-1e-3)\n  return %y\n}\n"
    assert dict(Graph.parse(text).nodes[0].args) == {"a": 1e5, "b": 1000, "c": -2, "d": 1.0, "e": -1e-3}
