"""Time from first principles: the slower of computing and of moving bytes, and the time to start the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import split_constant
from intarsia.ir.target import Target
from intarsia.kernels.base import Work, moved_bytes
from intarsia.search.work import node_work, weight_bytes


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one call costs.

    Attributes:
        seconds: Launch time, and the larger of the times to compute and to move.
        flops: Operations of matrix products.
        bytes: Bytes moved.
        bound: What it waits for: ``compute``, ``memory``, ``launch``, or ``nothing`` for a view.
    """

    seconds: float
    flops: float
    bytes: int
    bound: str


@dataclass(frozen=True)
class Prediction:
    """What one call of a graph costs on a target.

    Attributes:
        seconds: Time of one call, all nodes one after the other, none fused with another.
        bytes: Memory that the weights take.
        nodes: Every node that runs, by name.
    """

    seconds: float
    bytes: int
    nodes: Mapping[str, NodeCost]


def predict(graph: Graph, target: Target, sizes: Mapping[str, int] | None = None) -> Prediction:
    """Time and weight memory of one call; nodes that need no input have run at build and cost nothing.

    Nothing is fused: every call reads its inputs from memory and writes its outputs there. That bounds an engine
    that runs node by node from below, not one that fuses. InvalidGraph if a named size is missing.
    """
    sizes = sizes or {}
    _, dynamic = split_constant(graph)
    nodes = {node.name: node_cost(node, graph, target, sizes) for node in dynamic}
    seconds = sum(cost.seconds for cost in nodes.values())
    return Prediction(seconds, weight_bytes(graph, sizes), MappingProxyType(nodes))


def node_cost(node: Node, graph: Graph, target: Target, sizes: Mapping[str, int]) -> NodeCost:
    """What one call costs: launch + max(flops / peak, bytes / bandwidth). Source: Williams et al., Roofline, 2009."""
    work = node_work(node, graph, sizes) or Work(0.0, "f32", moved_bytes(node, graph, sizes))
    if not work.flops and not work.bytes:
        return NodeCost(0.0, 0.0, 0, "nothing")
    computing, moving = work.flops / peak(target, work.dtype), work.bytes / target.bandwidth
    longest = max(computing, moving)
    bound = "launch" if longest < target.launch else "compute" if computing > moving else "memory"
    return NodeCost(target.launch + longest, work.flops, work.bytes, bound)


def peak(target: Target, dtype: str) -> float:
    """FLOP/s of products in ``dtype``; an element type that the machine does not multiply is converted to f32."""
    return target.flops.get(dtype, target.flops["f32"])
