"""Operators of our own, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, cast

import torch

from intarsia.ir.graph import Graph, Node
from intarsia.ir.operators import resolve
from intarsia.ir.target import Target
from intarsia.kernels.base import Operator, Work

OPERATORS: dict[str, str] = {
    "intarsia.quantize_rows": "intarsia.kernels.linear_i8.op",
    "intarsia.linear_i8": "intarsia.kernels.linear_i8.op",
    "intarsia.quantize_groups": "intarsia.kernels.linear_i4.op",
    "intarsia.linear_i4": "intarsia.kernels.linear_i4.op",
    "intarsia.unpack_i4": "intarsia.kernels.linear_i4.op",
    "intarsia.linear_i8i8": "intarsia.kernels.linear_i8i8.op",
    "intarsia.conv2d_i8i8": "intarsia.kernels.conv2d_i8i8.op",
    "intarsia.quantize_static": "intarsia.kernels.integers.op",
    "intarsia.dequantize_static": "intarsia.kernels.integers.op",
    "intarsia.requantize": "intarsia.kernels.integers.op",
    "intarsia.add_requantized": "intarsia.kernels.add_requantized.op",
    "intarsia.avg_pool2d_i8": "intarsia.kernels.avg_pool2d_i8.op",
    "intarsia.quantize_channels": "intarsia.kernels.integer_weights.op",
    "intarsia.dyadic": "intarsia.kernels.integer_weights.op",
    "intarsia.exact_dyadic": "intarsia.kernels.integer_weights.op",
    "intarsia.quantize_bias": "intarsia.kernels.integer_weights.op",
    "intarsia.function_table": "intarsia.kernels.integer_functions.op",
    "intarsia.apply_table": "intarsia.kernels.integer_functions.op",
    "intarsia.exponentials": "intarsia.kernels.integer_islands.op",
    "intarsia.integer_softmax": "intarsia.kernels.integer_islands.op",
    "intarsia.norm_numbers": "intarsia.kernels.integer_islands.op",
    "intarsia.integer_norm": "intarsia.kernels.integer_islands.op",
    "intarsia.matmul_i8i8": "intarsia.kernels.matmul_i8i8.op",
    "intarsia.calibrated": "intarsia.kernels.calibrated.op",
    "intarsia.fake_quantize": "intarsia.kernels.fake_quantize.op",
    "intarsia.fake_quantize_channels": "intarsia.kernels.fake_quantize.op",
    "intarsia.fake_quantize_bias": "intarsia.kernels.fake_quantize.op",
    "intarsia.attention": "intarsia.kernels.attention.op",
    "intarsia.block_sparse_attention": "intarsia.kernels.block_sparse_attention.op",
    "intarsia.integers": "intarsia.kernels.block_sparse_attention.op",
    "intarsia.block_mask": "intarsia.kernels.block_sparse_attention.mask_op",
    "intarsia.block_tables": "intarsia.kernels.block_sparse_attention.tables_op",
    "intarsia.block_sparse_attention_tables": "intarsia.kernels.block_sparse_attention.tables_op",
    "intarsia.norm_rope": "intarsia.kernels.norm_rope.op",
    "intarsia.modulated_norm": "intarsia.kernels.modulated_norm.op",
    "intarsia.gated_residual": "intarsia.kernels.gated_residual.op",
}
"""Operators that come with Intarsia, by name; others join by entry points of the group ``intarsia.kernels``."""

GROUP = "intarsia.kernels"


def register() -> None:
    """Register all operators, ours and those of entry points, with PyTorch; once, however often it is called."""
    operators()


@lru_cache(maxsize=1)
def operators() -> Mapping[str, Operator]:
    """The contract of every operator by the operator's name, ours first."""
    found = {name: cast(Operator, importlib.import_module(path)) for name, path in OPERATORS.items()}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        found.setdefault(point.name, point.load())
    return found


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """Why the call cannot stand in ``graph`` for ``target``; None if it can, or if the operator is not ours."""
    contract = operators().get(node.op)
    return None if contract is None else contract.why_not(node, graph, target)


def work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work | None:
    """What the call ``node`` does for these sizes; None if the operator is not ours."""
    contract = operators().get(node.op)
    return None if contract is None else contract.work(node, graph, sizes)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """What each operator is in plain PyTorch, a table for ``torch.export.ExportedProgram.run_decompositions``."""
    references = {op: contract.REFERENCES[op] for op, contract in operators().items() if op in contract.REFERENCES}
    return {cast(torch._ops.OpOverload, resolve(op)): function for op, function in references.items()}
