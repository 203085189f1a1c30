from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from intarsia.backends.base import Engine
from intarsia.backends.onnx import OnnxBackend
from intarsia.ir.execute import to_module
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.kernels.block_sparse_attention.table import BlockTable

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TARGET = Target("null", "a machine for tests", "null", "none", {"f32": 1e12}, 1e11, 2**30, 1e-6)


@dataclass(frozen=True)
class Case:
    """One call of block-sparse attention in a graph of its own."""

    blocks: NDArray[np.bool_]
    queries: int
    keys: int
    block: tuple[int, int] = (16, 16)
    order: str | None = None
    lengths: tuple[int, ...] | None = None
    batch: int | str = 1
    scale: float | None = None

    def lines(self, name: str) -> str:
        """Inputs ``q``, ``k``, ``v`` and ``n`` of this name, and the call ``y``."""
        order = "None" if self.order is None else f'"{self.order}"'
        query, key = (f"f32[{self.batch}, 2, {tokens}, 8]" for tokens in (self.queries, self.keys))
        inputs = {"q": query, "k": key, "v": key} | ({"n": f"i64[{self.batch}]"} if self.lengths else {})
        return "".join(f"  input %{slot}.{name}: {type_}\n" for slot, type_ in inputs.items()) + (
            f"  %y.{name}: {query} = intarsia.block_sparse_attention(query=%q.{name}, key=%k.{name}, value=%v.{name}, "
            f'lengths={f"%n.{name}" if self.lengths else None}, blocks="{BlockTable.of(self.blocks)}", order={order}, '
            f"block_q={self.block[0]}, block_k={self.block[1]}, scale={self.scale})\n"
        )


def graph_of(cases: Sequence[Case]) -> Graph:
    """All calls beside each other, by their numbers."""
    lines = "".join(case.lines(str(number)) for number, case in enumerate(cases)).splitlines(keepends=True)
    lines.sort(key=lambda line: not line.startswith("  input"))
    size = "  size N in [1, 8]\n" if any(case.batch == "N" for case in cases) else ""
    answers = ", ".join(f"%y.{number}" for number in range(len(cases)))
    return Graph.parse(f"graph attends {{\n{size}{''.join(lines)}  return {answers}\n}}\n")


HEADS = """graph heads {
  input %q: f32[1, 4, 96, 8]
  input %k: f32[1, 4, 96, 8]
  input %v: f32[1, 4, 96, 8]
  %y.heads0: i64[2] = intarsia.integers(runs="0:2*2")
  %y.query0: f32[1, 2, 96, 8] = aten.index_select(self=%q, dim=1, index=%y.heads0)
  %y.key0: f32[1, 2, 96, 8] = aten.index_select(self=%k, dim=1, index=%y.heads0)
  %y.value0: f32[1, 2, 96, 8] = aten.index_select(self=%v, dim=1, index=%y.heads0)
  %y.part0: f32[1, 2, 96, 8] = intarsia.block_sparse_attention(query=%y.query0, key=%y.key0, value=%y.value0, \
lengths=None, blocks="6:2*0-1;2*2-3;2*4-5", order="0:24*1+4*24", block_q=16, block_k=16, scale=None)
  %y.heads1: i64[1] = intarsia.integers(runs="1:1*1")
  %y.query1: f32[1, 1, 96, 8] = aten.index_select(self=%q, dim=1, index=%y.heads1)
  %y.key1: f32[1, 1, 96, 8] = aten.index_select(self=%k, dim=1, index=%y.heads1)
  %y.value1: f32[1, 1, 96, 8] = aten.index_select(self=%v, dim=1, index=%y.heads1)
  %y.part1: f32[1, 1, 96, 8] = aten.scaled_dot_product_attention(query=%y.query1, key=%y.key1, value=%y.value1)
  %y.heads2: i64[1] = intarsia.integers(runs="3:1*1")
  %y.query2: f32[1, 1, 96, 8] = aten.index_select(self=%q, dim=1, index=%y.heads2)
  %y.part2: f32[1, 1, 96, 8] = aten.zeros_like(self=%y.query2)
  %y.joined: f32[1, 4, 96, 8] = aten.cat(tensors=[%y.part0, %y.part1, %y.part2], dim=1)
  %y.places: i64[4] = intarsia.integers(runs="0:1*1,2:1*1,1:1*1,3:1*1")
  %y: f32[1, 4, 96, 8] = aten.index_select(self=%y.joined, dim=1, index=%y.places)
  return %y
}
"""
"""Heads 0 and 2 see near frames, head 1 everything, head 3 nothing: what the pass sparse-attention writes."""


def band(rows: int, columns: int, width: int) -> NDArray[np.bool_]:
    middle = np.arange(rows)[:, None] * columns // rows
    found: NDArray[np.bool_] = abs(np.arange(columns)[None] - middle) <= width
    return found


def stripe(rows: int, columns: int) -> NDArray[np.bool_]:
    return np.broadcast_to(np.arange(columns) % 4 == 0, (rows, columns))


def radial(rows: int, frame: int) -> NDArray[np.bool_]:
    """Blocks of near frames whole, of further ones ever thinner: rows of many different counts."""
    place = np.arange(rows)
    apart = abs(place[:, None] // frame - place[None] // frame)
    found: NDArray[np.bool_] = abs(place[:, None] % frame - place[None] % frame) * 2**apart <= frame
    return found


def with_empty_rows(blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    found = blocks.copy()
    found[1::3] = False
    return found


CASES = {
    "a stripe that all queries share": Case(stripe(8, 8), 128, 128),
    "a stripe of more queries than a step takes": Case(stripe(40, 8), 630, 128),
    "a band": Case(band(12, 12, 2), 192, 192),
    "a band of ragged ends": Case(band(12, 12, 2), 185, 179, block=(16, 15)),
    "frames side by side in another order": Case(band(10, 10, 1), 160, 160, order="0:36*1+4*36,144:16*1"),
    "an order that is none": Case(band(10, 10, 1), 160, 160, order="0:160*1"),
    "another order with ragged ends": Case(band(10, 10, 1), 155, 155, order="0:5*1+31*5"),
    "rows of many counts": Case(radial(24, 6), 384, 384),
    "rows of nearly equal counts": Case(np.tri(32, dtype=bool), 512, 512),
    "rows that attend to nothing": Case(with_empty_rows(band(9, 9, 1)), 140, 144),
    "nothing at all": Case(np.zeros((4, 4), bool), 64, 60),
    "text that sees everything": Case(np.vstack([band(10, 12, 1), np.ones((2, 12), bool)]), 192, 192),
    "everything": Case(np.ones((4, 4), bool), 60, 60),
    "more keys than queries": Case(band(4, 12, 3), 60, 180),
    "more queries than keys": Case(band(12, 3, 1), 190, 40),
    "blocks of unlike sizes": Case(band(6, 12, 2), 190, 95, block=(32, 8)),
    "one query and one key": Case(np.ones((1, 1), bool), 1, 1),
    "a scale": Case(band(8, 8, 1), 128, 128, scale=0.7),
    "two in a batch": Case(band(8, 8, 1), 128, 128, batch=2),
    "a batch of any size": Case(radial(12, 4), 190, 190, batch="N"),
    "lengths": Case(band(8, 8, 1), 128, 128, batch=2, lengths=(100, 30)),
    "lengths in another order": Case(band(8, 8, 1), 128, 128, order="0:32*1+4*32", batch=2, lengths=(128, 37)),
    "lengths of a shared stripe": Case(stripe(8, 8), 128, 128, batch=3, lengths=(128, 65, 0)),
    "lengths of nearly equal counts": Case(np.tri(32, dtype=bool), 512, 512, batch="N", lengths=(500, 0)),
    "lengths and rows that attend to nothing": Case(with_empty_rows(band(9, 9, 1)), 140, 144, batch=1, lengths=(70,)),
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, float]:
    """How far one engine of all cases is from their references."""
    cases = list(CASES.values())
    program, folder = Program(graph_of(cases), {}), tmp_path_factory.mktemp("cases")
    engine = engine_of(program, folder)
    inputs = inputs_of(cases, program.graph, count=2)
    expected = to_module(program.graph, {})(*inputs)
    return dict(zip(CASES, map(largest_difference, engine(*inputs), expected), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_reference_does(name: str, differences: Mapping[str, float]) -> None:
    assert differences[name] < 2e-6


def test_a_batch_of_any_size_takes_every_size(tmp_path: Path) -> None:
    case = Case(radial(12, 4), 190, 190, batch="N", lengths=(190, 3, 100, 0, 64))
    program = Program(graph_of([case]), {})
    engine = engine_of(program, tmp_path)
    for count in (1, 2, 5):
        inputs = inputs_of([case], program.graph, count=count)
        (expected,) = to_module(program.graph, {})(*inputs)
        assert largest_difference(engine(*inputs)[0], expected) < 2e-6


@pytest.mark.parametrize(
    "name", ["a stripe of more queries than a step takes", "a band", "another order with ragged ends", "lengths"]
)
def test_scores_of_few_queries_exist_at_a_time_and_only_of_blocks_in_the_table(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    engine_of(Program(graph_of([case]), {}), tmp_path)
    steps = steps_of(tmp_path / "model.onnx")
    assert max(queries * keys for _, queries, keys in steps) < case.queries * case.keys / 2
    pairs = BlockTable.of(case.blocks).pairs(case.queries, case.keys, *case.block)
    assert pairs <= sum(count * queries * keys for count, queries, keys in steps) <= 1.15 * pairs


def test_no_tensor_of_a_large_model_has_an_axis_for_queries_and_one_for_keys(tmp_path: Path) -> None:
    engine_of(Program(graph_of([Case(band(32, 38, 3), 500, 600)]), {}), tmp_path)
    for graph in graphs_of(inferred(tmp_path / "model.onnx")):
        for value in (*graph.value_info, *graph.output):
            assert not {500, 600} <= {dim.dim_value for dim in value.type.tensor_type.shape.dim}


def test_heads_of_several_patterns_answer_as_the_references_do(tmp_path: Path) -> None:
    program = materialize(Program(Graph.parse(HEADS), {}))
    engine = engine_of(program, tmp_path)
    inputs = example_inputs(program.graph)
    (expected,) = to_module(program.graph, program.weights)(*inputs)
    assert largest_difference(engine(*inputs)[0], expected) < 2e-6


def test_calls_with_equal_tables_share_their_indices(tmp_path: Path) -> None:
    case = CASES["frames side by side in another order"]
    engine_of(Program(graph_of([case]), {}), tmp_path)
    once = indices_of(tmp_path / "model.onnx")
    engine_of(Program(graph_of([case, case]), {}), tmp_path)
    assert once
    assert indices_of(tmp_path / "model.onnx") == once


def engine_of(program: Program, folder: Path) -> Engine:
    backend = OnnxBackend()
    return backend.load(folder, backend.build(program, TARGET, folder).files)


def inputs_of(cases: Sequence[Case], graph: Graph, *, count: int) -> tuple[torch.Tensor, ...]:
    """Random inputs, the first ``count`` of a batch of any size, and the lengths that the cases say."""
    lengths = {f"n.{number}": case.lengths for number, case in enumerate(cases) if case.lengths}
    given = {
        name: torch.tensor(found[:count] if "N" in str(graph.type(name)) else found) for name, found in lengths.items()
    }
    inputs = example_inputs(graph, {"N": count} if graph.sizes else {})
    return tuple(given.get(value.name, tensor) for value, tensor in zip(graph.inputs, inputs, strict=True))


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def inferred(path: Path) -> Any:
    return onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)


def graphs_of(model: Any) -> Iterator[Any]:
    """The graph and the bodies of its scans."""
    yield model.graph
    for node in model.graph.node:
        yield from (attribute.g for attribute in node.attribute if attribute.name == "body")


def steps_of(path: Path) -> list[tuple[int, int, int]]:
    """Of each Scan: how many steps it takes, and the queries and keys of the attention that a step computes."""
    model = inferred(path)
    counts = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    scans = [node for node in model.graph.node if node.op_type == "Scan"]
    found = []
    for scan, body in zip(scans, list(graphs_of(model))[1:], strict=True):
        known = {value.name: value for graph in (model.graph, body) for value in graph.value_info}
        (attention,) = (node for node in body.node if node.op_type == "Attention")
        query, key = (known[name].type.tensor_type.shape.dim[2].dim_value for name in attention.input[:2])
        found.append((counts[scan.input[0]], query, key))
    assert found
    return found


def indices_of(path: Path) -> set[str]:
    return {tensor.name for tensor in onnx.load(path).graph.initializer if tensor.name.startswith("indices.")}
