"""How long layers take in so many bits: by the target's roofline, or timed alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.passes.lower_integer import LowerInteger
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.quantize_integer_layers import KEEP
from intarsia.passes.quantize_integer_ranges import take_ranges
from intarsia.search.bit_counts import PRODUCTS
from intarsia.search.roofline import node_cost

Price = Callable[[Node, Program], float]
"""Measured seconds of one call of a program whose weights are computed."""


def layer_seconds(
    calibrated: Program, target: Target, options: Mapping[str, Sequence[str]], price: Price | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of one call of each layer with each of its options, by the roofline unless there is a price.

    The product alone, its input in integers already, as it is where all layers have such bits. Sizes that a graph
    leaves open are their least.
    """
    found: dict[str, dict[str, float]] = {layer: {} for layer in options}
    for option in dict.fromkeys(option for offered in options.values() for option in offered):
        graph, products = _products(calibrated.graph, target, option)
        program = materialize(Program(graph, calibrated.weights)) if price else calibrated
        sizes = {size.name: max(size.minimum, 1) for size in graph.sizes}
        for layer, offered in options.items():
            if option in offered:
                node = products[layer]
                found[layer][option] = price(node, program) if price else node_cost(node, graph, target, sizes).seconds
    return found


def _products(calibrated: Graph, target: Target, option: str) -> tuple[Graph, Mapping[str, Node]]:
    """The graph with the option wherever a layer takes it, eight bits elsewhere, and its products by layer."""
    if option == KEEP:
        plain = take_ranges(calibrated).graph
        return plain, plain.producers
    rounding = QuantizeInteger()
    offered = rounding.choices(calibrated, target)
    chosen = {name: option if option in options else "w8a8" for name, options in offered.items()}
    graph = LowerInteger().run(rounding.run(calibrated, target, chosen), target, {})
    by_codes = {node.ref("weight"): node for node in graph.find(*PRODUCTS)}
    return graph, {name: by_codes[f"{name}.codes"] for name in chosen}
