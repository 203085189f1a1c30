"""How far typed ONNX is from the exact integers that it stands for, in steps of what the network gives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from intarsia.backends.null import NullEngine
from intarsia.backends.tensorrt_reference import ReferenceEngine
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs

SEED = 1


def difference(program: Program, model: Path) -> dict[str, float] | None:
    """Share of the outputs' codes that differ from exact integers, and the largest difference in steps.

    Exact integers are what the operators' definitions give in eager PyTorch; the other side is the typed ONNX on the
    CPU, one call of each on the same random inputs. None where no output is a code or what ``dequantize_static`` makes
    of one. TensorRT's own kernels round as the typed ONNX says, but sum in another order: on a GPU ``verify`` measures.
    """
    steps = {number: step for number, name in enumerate(program.graph.outputs) if (step := _step(name, program.graph))}
    if not steps:
        return None
    inputs = example_inputs(program.graph, seed=SEED)
    found, exact = ReferenceEngine(model)(*inputs), NullEngine(program)(*inputs)
    apart = torch.cat([_apart(found[number], exact[number], step) for number, step in steps.items()])
    return {"codes_differing": float((apart > 0).double().mean()), "largest_step": float(apart.max())}


def _step(output: str, graph: Graph) -> float | None:
    """What one step of an output's codes is; None for an output that has none."""
    node = graph.producers.get(output)
    if node is None:
        return None
    if node.op == "intarsia.dequantize_static":
        scale = node.args["scale"]
        assert isinstance(scale, float)
        return scale
    return 1.0 if graph.type(output).dtype in ("i8", "i32") else None


def _apart(found: Tensor, exact: Tensor, step: float) -> Tensor:
    return ((found.double() - exact.double()) / step).round().abs().flatten()
