"""How much work a call does: floating-point operations of matrix products, and bytes moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType

from torch import Tensor

from intarsia import kernels
from intarsia.ir.graph import Arg, Graph, Node, Ref
from intarsia.ir.operators import schema
from intarsia.ir.program import split_constant
from intarsia.ir.sizes import evaluate, names
from intarsia.ir.types import TensorType
from intarsia.kernels.base import Work, moved_bytes
from intarsia.search.origins import sources

CLASSES = ("self-attention", "cross-attention", "linear", "convolution", "other")
"""What calls are told apart as; ``other`` are norms, pointwise operators, copies and products of two activations."""

ATTENTION = frozenset(
    {
        "aten.scaled_dot_product_attention",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
    }
)
CONVOLUTIONS = frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"})
TRANSPOSED = frozenset({"aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"})
PRODUCTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "aten.mm": ("self", "mat2"),
        "aten.bmm": ("self", "mat2"),
        "aten.matmul": ("self", "other"),
        "aten.addmm": ("mat1", "mat2"),
        "aten.baddbmm": ("batch1", "batch2"),
        "aten.linear": ("input", "weight"),
    }
)
"""Matrix products by the names of their two factors; the last axis of the first is summed over."""

_FREE = frozenset({"aten._unsafe_view", "aten.empty", "aten.empty.memory_format", "aten.empty_like", "aten.dropout"})
_COPIES = frozenset({"aten.contiguous", "aten.reshape"})
_CASTS = frozenset({"aten.type_as", "aten._to_copy", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device"})
_NUMBERS = ("operator.", "math.", "torch.")


@dataclass(frozen=True)
class AttentionSite:
    """One attention call: ``heads`` heads of ``head_dim``, ``queries`` x ``keys`` scores each, ``batch`` times.

    Attributes:
        kind: ``self`` if the queries attend to the tokens they come from, ``cross`` otherwise.
    """

    name: str
    heads: int
    queries: int
    keys: int
    head_dim: int
    batch: int
    kind: str


@dataclass(frozen=True)
class WorkSummary:
    """What one call of the graph does, by class of operator.

    Attributes:
        flops_by_class: Operations of matrix products, by class; a multiply-add counts two.
        bytes_by_class: Bytes moved when every call reads its inputs and writes its outputs once, by class.
        parameters: Elements of all parameters of the graph.
        weight_bytes: Bytes of the weights that are left once the nodes without inputs have run.
        unknown: Operators of others about whose products nothing is known; counted as moving bytes only.
    """

    flops_by_class: Mapping[str, float]
    bytes_by_class: Mapping[str, int]
    parameters: int
    weight_bytes: int
    unknown: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Operations of all matrix products."""
        return sum(self.flops_by_class.values())

    @property
    def bytes(self) -> int:
        """Bytes moved by all calls."""
        return sum(self.bytes_by_class.values())


def summary(graph: Graph, sizes: Mapping[str, int] | None = None) -> WorkSummary:
    """What one call does for these sizes; InvalidGraph if a named size is missing."""
    sizes = sizes or {}
    kinds = {site.name: f"{site.kind}-attention" for site in attention_sites(graph, sizes)}
    constant, dynamic = split_constant(graph)
    weights = {value.name for node in constant for value in node.outputs} | {param.name for param in graph.params}
    flops = dict.fromkeys(CLASSES, 0.0)
    moved = dict.fromkeys(CLASSES, 0)
    unknown: dict[str, None] = {}
    for node in dynamic:
        work = node_work(node, graph, sizes)
        if work is None:
            unknown[node.op] = None
            work = Work(0.0, "f32", moved_bytes(node, graph, sizes))
        label = kinds.get(node.name) or _class(node, work, weights)
        flops[label] += work.flops
        moved[label] += work.bytes
    parameters = sum(param.type.elements(sizes) for param in graph.params if isinstance(param.type, TensorType))
    return WorkSummary(
        MappingProxyType(flops), MappingProxyType(moved), parameters, weight_bytes(graph, sizes), tuple(unknown)
    )


def attention_sites(graph: Graph, sizes: Mapping[str, int] | None = None) -> tuple[AttentionSite, ...]:
    """All attention calls in execution order, for these sizes."""
    sizes = sizes or {}
    return tuple(_site(node, graph, sizes) for node in graph.nodes if is_attention(node))


def is_attention(node: Node) -> bool:
    """Whether the call is attention: PyTorch's, or one of ours with query, key and value."""
    return node.op in ATTENTION or (node.op.startswith("intarsia.") and node.args.keys() >= {"query", "key", "value"})


def _site(node: Node, graph: Graph, sizes: Mapping[str, int]) -> AttentionSite:
    query, key = (_shape(graph, node.ref(arg), sizes) for arg in ("query", "key"))
    asked, seen = (sources(graph, node.ref(arg), sizes) for arg in ("query", "key"))
    return AttentionSite(
        name=node.name,
        heads=query[-3] if len(query) > 2 else 1,
        queries=query[-2],
        keys=key[-2],
        head_dim=query[-1],
        batch=prod(query[:-3]),
        kind="self" if asked <= seen else "cross",
    )


def weight_bytes(graph: Graph, sizes: Mapping[str, int] | None = None) -> int:
    """Bytes of all weights that a call reads once the nodes without inputs have run, each weight counted once."""
    constant, dynamic = split_constant(graph)
    needed = {name for node in dynamic for name in node.inputs} | set(graph.outputs)
    held = (*graph.params, *(value for node in constant for value in node.outputs))
    return sum(v.type.bytes(sizes) for v in held if v.name in needed and isinstance(v.type, TensorType))


def sizes_of(graph: Graph, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The named sizes that these inputs, in the graph's order, have; an expression is solved for its only name."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        assert isinstance(value.type, TensorType)
        for dim, extent in zip(value.type.shape, tensor.shape, strict=True):
            for name in names(dim) if len(names(dim)) == 1 else ():
                fitting = (size for size in range(extent + 1) if evaluate(dim, {name: size}) == extent)
                sizes.setdefault(name, next(fitting, extent))
    return sizes


def node_work(node: Node, graph: Graph, sizes: Mapping[str, int]) -> Work | None:
    """What one call does for these sizes; None for an operator that is neither PyTorch's nor ours.

    Views and numbers do nothing; pointwise operators, norms and copies have no products but move bytes.
    """
    if node.op.startswith(_NUMBERS):
        return Work(0.0, "f32", 0)
    if node.op.startswith("intarsia."):
        return kernels.work(node, graph, sizes)
    if not node.op.startswith("aten."):
        return None
    if is_free(node, graph):
        return Work(0.0, _dtype(node), 0)
    return Work(_flops(node, graph, sizes), _factor_dtype(node, graph), moved_bytes(node, graph, sizes))


def is_free(node: Node, graph: Graph) -> bool:
    """Whether the call moves nothing: a view, a cast to the same type, dropout outside training, a number."""
    if not any(isinstance(value.type, TensorType) for value in node.outputs):
        return True
    if node.op in _CASTS:
        return graph.values[node.inputs[0]].type == node.outputs[0].type
    if node.op in _FREE:
        return not node.args.get("train", False)
    return node.op not in _COPIES and _is_view(node.op)


@lru_cache(maxsize=4096)
def _is_view(op: str) -> bool:
    found = schema(op)
    return found is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in found.returns)


def _flops(node: Node, graph: Graph, sizes: Mapping[str, int]) -> float:
    if node.op in PRODUCTS:
        return 2.0 * node.type.elements(sizes) * _shape(graph, node.ref(PRODUCTS[node.op][0]), sizes)[-1]
    if node.op in ATTENTION:
        return _attention_flops(node, graph, sizes)
    if node.op == "aten.einsum":
        return _einsum_flops(node, graph, sizes)
    if node.op in TRANSPOSED or (node.op == "aten.convolution" and node.args.get("transposed")):
        weight = _shape(graph, node.ref("weight"), sizes)
        return 2.0 * graph.type(node.ref("input")).elements(sizes) * prod(weight[1:])
    if node.op in CONVOLUTIONS:
        return 2.0 * node.type.elements(sizes) * prod(_shape(graph, node.ref("weight"), sizes)[1:])
    return 0.0


def _attention_flops(node: Node, graph: Graph, sizes: Mapping[str, int]) -> float:
    query, key, value = (_shape(graph, node.ref(arg), sizes) for arg in ("query", "key", "value"))
    queries, keys = query[-2], key[-2]
    pairs = queries * keys
    if node.args.get("is_causal"):
        square = min(queries, keys)
        pairs = square * (square + 1) // 2 + (queries - square) * keys
    return 2.0 * prod(query[:-2]) * pairs * (query[-1] + value[-1])


def _einsum_flops(node: Node, graph: Graph, sizes: Mapping[str, int]) -> float:
    """Two operations for every combination of index values; exact for two factors without ellipsis."""
    factors = [ref.name for ref in _refs(node.args["tensors"])]
    if len(factors) < 2:
        return 0.0
    inputs = str(node.args["equation"]).replace(" ", "").split("->")[0].split(",")
    extents: dict[str, int] = {}
    for letters, name in zip(inputs, factors, strict=True):
        extents.update(zip(reversed(letters.replace("...", "")), reversed(_shape(graph, name, sizes)), strict=False))
    return 2.0 * prod(extents.values())


def _class(node: Node, work: Work, weights: set[str]) -> str:
    if node.op in CONVOLUTIONS or node.op in TRANSPOSED:
        return "convolution"
    return "linear" if work.flops and any(name in weights for name in node.inputs) else "other"


def _factor_dtype(node: Node, graph: Graph) -> str:
    for arg in (*PRODUCTS.get(node.op, ()), "query", "input"):
        value = node.args.get(arg)
        if isinstance(value, Ref):
            return graph.type(value.name).dtype
    return _dtype(node)


def _dtype(node: Node) -> str:
    found = node.outputs[0].type
    return found.dtype if isinstance(found, TensorType) else "f32"


def _shape(graph: Graph, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(evaluate(dim, sizes) for dim in graph.type(name).shape)


def _refs(arg: Arg) -> Iterator[Ref]:
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from _refs(item)
