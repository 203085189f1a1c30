"""Engines give integer softmax, norms, functions and products to the bit as they are defined, extremes included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.backends.base import Backend
from intarsia.backends.onnx import OnnxBackend
from intarsia.backends.tensorrt import TensorrtBackend
from intarsia.backends.triton import TritonBackend
from intarsia.backends.tvm import TvmBackend
from intarsia.ir.execute import type_of
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.program import Program
from intarsia.ir.target import load_target
from intarsia.kernels.integers import golden_islands as golden

KINDS = {8: torch.int8, 16: torch.int16}
ENDS = {8: (-128, 127), 16: (-(2**15), 2**15 - 1)}

Case = tuple[str, dict[str, Tensor], dict[str, Any]]
"""An operator, its tensors, those called ``input`` and ``other`` being activations, and its numbers."""


def rows(bits: int, count: int) -> Tensor:
    """Random rows, rows all alike, one-hot rows, ties at the top, and neighbours of the extremes."""
    low, high = ENDS[bits]
    found = torch.randint(low, high + 1, (9, count), generator=torch.Generator().manual_seed(count))
    found[1], found[2], found[3] = low, high, 0
    found[4], found[5] = low, high
    found[4, 0], found[5, -1] = high, low
    found[6, ::2], found[6, 1::2] = low, high
    found[7] = found[7] >> 3
    found[8] = 1
    found[8, 0] = 2
    return found.to(KINDS[bits])


def ends(bits: int) -> dict[str, int]:
    return dict(zip(("low", "high"), ENDS[bits], strict=True))


def functions() -> Iterator[Case]:
    for bits, result, scale in ((8, 8, 0.05), (16, 8, 0.1), (16, 16, 1e-4)):
        table = torch.ops.intarsia.function_table("gelu", 9 / ENDS[bits][1], scale, bits)
        every = torch.arange(ENDS[bits][0], ENDS[bits][1] + 1, bits * bits // 60).to(KINDS[bits])
        yield "intarsia.apply_table", {"input": every, "table": table}, ends(result)


def softmaxes() -> Iterator[Case]:
    for bits in KINDS:
        for step, count in ((0.01, 40), (2e-5, 300)):
            table = torch.ops.intarsia.exponentials(step, bits)
            for result in KINDS:
                shift = 31 - math.frexp(ENDS[result][1])[1]
                numbers = {"multiplier": ENDS[result][1] << shift, "shift": shift}
                yield (
                    "intarsia.integer_softmax",
                    {"input": rows(bits, count), "table": table},
                    {**numbers, **ends(result)},
                )


def norms() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for bits, count, centered in (
        (8, 40, True),
        (16, 40, False),
        (16, 32_768, True),
    ):
        weight, bias = (torch.randn(count, generator=generator) for _ in "wb")
        for result, epsilon in ((8, 1), (16, 2**61), (16, 12345)):
            numbers = torch.ops.intarsia.norm_numbers(weight, bias, 4 / ENDS[result][1], count)
            tensors = dict(zip(("weight", "bias", "shift"), numbers, strict=True))
            given = {"epsilon": epsilon, "centered": centered, **ends(result)}
            yield "intarsia.integer_norm", {"input": rows(bits, count), **tensors}, given


def products() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(2)
    for leading, (m, k, n), shift, result in (
        ((), (5, 24, 7), 41, 8),
        ((2, 3), (9, 16, 9), 36, 16),
        ((2,), (1, 1, 1), 38, 8),
    ):
        one, other = (
            torch.randint(-128, 128, (*leading, *shape), generator=generator).to(torch.int8)
            for shape in ((m, k), (k, n))
        )
        yield (
            "intarsia.matmul_i8i8",
            {"input": one, "other": other},
            {"multiplier": 2**30 + 3, "shift": shift, **ends(result)},
        )
    least = torch.full((2, 4096), -128).to(torch.int8)
    given = {"multiplier": 2**31 - 1, "shift": 49, **ends(8)}
    yield "intarsia.matmul_i8i8", {"input": least, "other": least.t().contiguous()}, given


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "functions": functions, "softmaxes": softmaxes, "norms": norms, "products": products,
}  # fmt: skip


def program_of(cases: list[Case]) -> tuple[Program, list[Tensor], list[Tensor]]:
    """One program of all calls, its inputs, and what is defined."""
    nodes: list[Node] = []
    given: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    expected: list[Tensor] = []
    for index, (op, tensors, numbers) in enumerate(cases):
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        expected.append(torch.from_numpy(np.ascontiguousarray(golden.OPERATORS[op](**arrays, **numbers))))
        names = {key: f"{key}{index}" for key in tensors}
        for key, tensor in tensors.items():
            (given if key in ("input", "other") else weights)[names[key]] = tensor
        args: dict[str, Arg] = {**{key: Ref(name) for key, name in names.items()}, **numbers}
        nodes.append(Node(op, args, (Value(f"y{index}", type_of(expected[-1])),)))
    inputs, params = (tuple(Value(name, type_of(one)) for name, one in held.items()) for held in (given, weights))
    graph = Graph("g", inputs, params, tuple(nodes), tuple(node.name for node in nodes))
    return Program(graph, weights), list(given.values()), expected


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("backend", [OnnxBackend(), TvmBackend()], ids=["onnx", "tvm"])
def test_an_engine_gives_what_is_defined(backend: Backend, family: str, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnx", "tvm": "tvm"}[backend.name])
    kernels.register()
    cases = list(CASES[family]())
    program, inputs, expected = program_of(cases)
    target = load_target("cpu-avx2")
    found = backend.load(tmp_path, backend.build(program, target, tmp_path).files)(*inputs)
    for (op, tensors, numbers), one, other in zip(cases, found, expected, strict=True):
        assert one.dtype == other.dtype, (op, numbers)
        assert torch.equal(one, other), (op, tensors["input"].shape, numbers, int((one != other).sum()))
    assert sum(one.unique().numel() > 20 for one in expected) >= 1


def test_tensorrt_says_what_to_leave_out() -> None:
    kernels.register()
    program, _, _ = program_of([next(functions())])
    reason = TensorrtBackend().why_not(program.graph.nodes[0], program.graph, load_target("h200"))
    assert reason is not None
    assert reason.startswith("TensorRT has no shifts for intarsia.apply_table; leave integer-islands out of the plan")


def test_the_triton_backend_runs_them_through_pytorch() -> None:
    kernels.register()
    for family in CASES.values():
        program, _, _ = program_of([next(family())])
        target = load_target("h200")
        assert TritonBackend().why_not(program.graph.nodes[0], program.graph, target) is None
