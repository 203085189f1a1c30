import pytest

from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.passes.merge_duplicates import MergeDuplicates


def graph_of(*lines: str, output: str) -> Graph:
    body = "".join(f"  {line}\n" for line in lines)
    return Graph.parse(f"graph g {{\n  input %x: f32[4]\n{body}  return %{output}\n}}\n")


def test_the_first_of_equal_calls_stays_and_repetitions_of_users_go_too(target: Target) -> None:
    graph = graph_of(
        "%a: f32[4] = aten.relu(self=%x)",
        "%b: f32[4] = aten.relu(self=%x)",
        "%c: f32[4] = aten.exp(self=%a)",
        "%d: f32[4] = aten.exp(self=%b)",
        "%e: f32[4] = aten.add.Tensor(self=%c, other=%d)",
        output="e",
    )
    expected = graph_of(
        "%a: f32[4] = aten.relu(self=%x)",
        "%c: f32[4] = aten.exp(self=%a)",
        "%e: f32[4] = aten.add.Tensor(self=%c, other=%c)",
        output="e",
    )
    assert MergeDuplicates().run(graph, target, {}) == expected


def test_all_outputs_of_a_repetition_are_renamed(target: Target) -> None:
    graph = graph_of(
        "%a: f32[2], %b: f32[2] = aten.split.Tensor(self=%x, split_size=2)",
        "%c: f32[2], %d: f32[2] = aten.split.Tensor(self=%x, split_size=2)",
        "%e: f32[2] = aten.add.Tensor(self=%a, other=%d)",
        output="e",
    )
    changed = MergeDuplicates().run(graph, target, {})
    assert changed.nodes[1].inputs == ("a", "b")


def test_an_output_that_is_a_repetition_names_the_first(target: Target) -> None:
    graph = graph_of("%a: f32[4] = aten.relu(self=%x)", "%b: f32[4] = aten.relu(self=%x)", output="b")
    assert MergeDuplicates().run(graph, target, {}).outputs == ("a",)


@pytest.mark.parametrize("op", ["aten.rand_like", "aten.bernoulli", "aten.randn_like"])
def test_random_calls_are_never_merged(op: str, target: Target) -> None:
    graph = graph_of(
        f"%a: f32[4] = {op}(self=%x)",
        f"%b: f32[4] = {op}(self=%x)",
        "%c: f32[4] = aten.add.Tensor(self=%a, other=%b)",
        output="c",
    )
    assert MergeDuplicates().run(graph, target, {}) is graph


def test_operators_of_other_libraries_are_never_merged(target: Target) -> None:
    graph = graph_of("%a: f32[4] = acme.noise(self=%x)", "%b: f32[4] = acme.noise(self=%x)", output="b")
    assert MergeDuplicates().run(graph, target, {}) is graph


@pytest.mark.parametrize(("one", "other"), [("1", "1.0"), ("1", "True"), ("0.0", "-0.0"), ("1", "2")])
def test_arguments_that_only_look_alike_are_not_merged(one: str, other: str, target: Target) -> None:
    graph = graph_of(
        f"%a: f32[4] = aten.mul.Tensor(self=%x, other={one})",
        f"%b: f32[4] = aten.mul.Tensor(self=%x, other={other})",
        "%c: f32[4] = aten.add.Tensor(self=%a, other=%b)",
        output="c",
    )
    assert MergeDuplicates().run(graph, target, {}) is graph
