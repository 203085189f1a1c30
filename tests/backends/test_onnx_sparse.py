from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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

    @property
    def graph(self) -> Graph:
        size = f"  size {self.batch} in [1, 8]\n" if isinstance(self.batch, str) else ""
        order = "None" if self.order is None else f'"{self.order}"'
        lengths, given = ("", "None") if self.lengths is None else (f"  input %n: i64[{self.batch}]\n", "%n")
        query, key = (f"f32[{self.batch}, 2, {tokens}, 8]" for tokens in (self.queries, self.keys))
        return Graph.parse(
            f"graph attends {{\n{size}  input %q: {query}\n  input %k: {key}\n  input %v: {key}\n{lengths}"
            f"  %y: {query} = intarsia.block_sparse_attention(query=%q, key=%k, value=%v, lengths={given}, "
            f'blocks="{BlockTable.of(self.blocks)}", order={order}, block_q={self.block[0]}, block_k={self.block[1]}, '
            f"scale={self.scale})\n  return %y\n}}\n"
        )


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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_as_the_reference_does(case: Case, tmp_path: Path) -> None:
    engine, program = engine_of(case, tmp_path)
    inputs = inputs_of(case, program.graph)
    assert largest_difference(engine(*inputs)[0], to_module(program.graph, {})(*inputs)) < 2e-6


def engine_of(case: Case, folder: Path):  # type: ignore[no-untyped-def]
    program = materialize(Program(case.graph, {}))
    backend = OnnxBackend()
    return backend.load(folder, backend.build(program, TARGET, folder).files), program


def inputs_of(case: Case, graph: Graph) -> tuple[torch.Tensor, ...]:
    count = len(case.lengths) if case.lengths and isinstance(case.batch, str) else 3
    inputs = example_inputs(graph, {"N": count} if isinstance(case.batch, str) else {})
    return inputs if case.lengths is None else (*inputs[:3], torch.tensor(case.lengths))


def largest_difference(found: torch.Tensor, expected: object) -> float:
    (tensor,) = expected if isinstance(expected, tuple) else (expected,)
    assert found.shape == tensor.shape
    return float((found - tensor).abs().max())
