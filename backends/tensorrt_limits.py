"""What TensorRT does not take of a graph, and the extents that an engine is built for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from intarsia.backends.onnx import OnnxBackend
from intarsia.backends.tensorrt_integers import ON_INTEGERS, PRODUCTS, takes_i16
from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.sizes import evaluate
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.op import OPS

TYPES = ("f32", "f16", "bf16", "f8e4m3", "i64", "i32", "i8", "u8", "b1")
"""Element types that TensorRT has."""

LACKS: Mapping[str, str] = {
    "aten.bitwise_left_shift": "BitShift",
    "aten.bitwise_right_shift": "BitShift",
    "aten.__lshift__": "BitShift",
    "aten.__rshift__": "BitShift",
    "aten.bitwise_and": "BitwiseAnd",
    "aten.bitwise_or": "BitwiseOr",
    "aten.bitwise_xor": "BitwiseXor",
    "aten.bitwise_not": "BitwiseNot",
    "aten.linalg_det": "Det",
    "aten._fft_r2c": "DFT",
    "aten._fft_c2c": "DFT",
    "aten._fft_c2r": "DFT",
    "aten.im2col": "Im2Col",
    "aten.col2im": "Col2Im",
    "aten.affine_grid_generator": "AffineGrid",
    "aten.multinomial": "Multinomial",
    "aten.bernoulli": "Bernoulli",
}
"""Operators of PyTorch whose ONNX operator NVIDIA's parser does not have; on booleans the bitwise ones are others."""

ISLANDS = ("intarsia.apply_table", "intarsia.integer_softmax", "intarsia.integer_norm", "intarsia.matmul_i8i8")
"""What the pass ``integer-islands`` puts in place of floats."""

_ON_BOOLEANS = ("aten.bitwise_and", "aten.bitwise_or", "aten.bitwise_xor", "aten.bitwise_not")
_DYADIC = ("weight", "bias", "multiplier", "shift", "other_multiplier", "other_shift")


def why_not(node: Node, graph: Graph, target: Target) -> str | None:
    """An element type or an operator that TensorRT lacks, on this target or at all; None if it takes the call."""
    from intarsia.backends.tensorrt_model import SCALINGS

    dtypes = list(_dtypes(node, graph))
    if takes_i16(node) and not _shows_i16(node, graph):
        dtypes = [dtype for dtype in dtypes if dtype != "i16"]
    if reason := _no_type(node, dtypes):
        return reason
    if "f8e4m3" in dtypes and _capability(target.architecture) < 89:
        return f"f8e4m3 needs sm_89 or later, and {target.name} is {target.architecture}; use i8 or f16"
    lacking = LACKS.get(".".join(node.op.split(".")[:2]))
    if lacking and not (node.op.startswith(_ON_BOOLEANS) and set(dtypes) == {"b1"}):
        return f"TensorRT has no {lacking}; compute it before, where its inputs are constant, or use backend onnx"
    if node.op in PRODUCTS:
        params = {param.name for param in graph.params}
        given = [key for key in _DYADIC if node.args.get(key) is not None]
        computed = [key for key in given if node.ref(key) not in params]
        return f"{computed[0]} is computed at run time; materialize the program first" if computed else None
    if node.op in ON_INTEGERS and "i8" in dtypes:
        return None
    return None if node.op in (*SCALINGS, *OPS) else OnnxBackend().why_not(node, graph, target)


def _no_type(node: Node, dtypes: list[str]) -> str | None:
    """An element type that TensorRT lacks, or all that an integer island computes in."""
    if node.op in ISLANDS:
        return (
            f"TensorRT has no shifts for {node.op}; leave integer-islands out of the plan, or use backend onnx or tvm"
        )
    bad = next((dtype for dtype in dtypes if dtype not in TYPES), None)
    if bad is None:
        return None
    return f"TensorRT has no {bad}, only {', '.join(TYPES)}; cast before, such as with pass cast-floats"


def _shows_i16(node: Node, graph: Graph) -> bool:
    """Whether 16-bit integers that the call reads or gives go in or out of the engine, which has no such type."""
    outside = {*graph.outputs, *(value.name for value in graph.inputs)}
    touched = [graph.values[name] for name in node.inputs] + list(node.outputs)
    return any(one.name in outside and isinstance(one.type, TensorType) and one.type.dtype == "i16" for one in touched)


def _capability(architecture: str) -> int:
    """89 for ``sm_89``; 0 for what is no NVIDIA GPU."""
    digits = architecture.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def _dtypes(node: Node, graph: Graph) -> Iterator[str]:
    """Element types of what a call reads and gives, weights excepted: they are stored as their operator wants them."""
    params = {param.name for param in graph.params}
    values = [graph.values[name] for name in node.inputs if name not in params]
    return (value.type.dtype for value in (*values, *node.outputs) if isinstance(value.type, TensorType))


def sizes_of(text: str) -> dict[str, int]:
    """Sizes by name from ``"N=8, H=32"``."""
    try:
        pairs = (part.split("=") for part in text.split(",") if part.strip())
        return {name.strip(): int(extent) for name, extent in pairs}
    except ValueError as error:
        raise ValueError(f"typical is {text!r}; sizes are written 'N=8, H=32'") from error


def profile(graph: Graph, typical: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Least, typical and largest extents of every input with named sizes.

    Raises:
        UsageError: ``typical`` names no size of the graph, or an extent outside its range.
        Unsupported: A size has no upper bound.
    """
    sizes = {size.name: size for size in graph.sizes}
    if unknown := sorted(typical.keys() - sizes.keys()):
        raise UsageError(f"tensorrt: typical names {unknown[0]}; sizes of {graph.name}: {', '.join(sizes) or 'none'}")
    if endless := [size.name for size in graph.sizes if size.maximum is None]:
        raise Unsupported(
            f"backend tensorrt cannot take {graph.name}:",
            [f"size {name} has no upper bound, and an engine is built for a range; give it one" for name in endless],
        )
    least = {name: size.minimum for name, size in sizes.items()}
    largest = {name: size.maximum or size.minimum for name, size in sizes.items()}
    chosen = {**largest, **typical}
    if outside := [str(size) for name, size in sizes.items() if not least[name] <= chosen[name] <= largest[name]]:
        raise UsageError(f"tensorrt: typical is outside of {', '.join(outside)}")
    ranges = {"min": least, "opt": chosen, "max": largest}
    return {
        value.name: {key: [evaluate(dim, at) for dim in value.type.shape] for key, at in ranges.items()}
        for value in graph.inputs
        if isinstance(value.type, TensorType) and any(isinstance(dim, str) for dim in value.type.shape)
    }
