"""Layers that may become integer products: in which bits, why not, and which share the input that they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.program import split_constant
from intarsia.passes.quantize_integer_grids import why_no_grid
from intarsia.passes.quantize_integer_ranges import Ranged, take_ranges
from intarsia.passes.quantize_integer_roles import LAYERS, addends, bounds, keeps_grid, source, window

KEEP = "keep"

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
"""Bits of the weight and of the input, by option."""

LARGEST_SUM = 2**31 - 1

LARGEST_PRODUCTS = 2**30
"""What the products of a layer may sum up to, so that the same again is left of int32 for its bias."""


@dataclass(frozen=True)
class Place:
    """A layer, with the reason against every option that it does not offer."""

    node: Node
    reasons: dict[str, str]

    @property
    def offers(self) -> tuple[str, ...]:
        """The options besides keeping that the layer takes."""
        return tuple(option for option in BITS if option not in self.reasons)

    @property
    def refusal(self) -> str:
        """Why the layer offers nothing, in one line."""
        return "; ".join(dict.fromkeys(self.reasons.values()))


def places(ranged: Ranged) -> Iterator[Place]:
    """Every convolution and linear layer, in execution order."""
    graph = ranged.graph
    constant, _ = split_constant(graph)
    weights = {param.name for param in graph.params} | {value.name for node in constant for value in node.outputs}
    later, earlier = _behind_layers(graph), _before_layers(graph)
    for node in graph.find(*LAYERS):
        if node.name in weights:
            continue
        if reason := _why_no_layer(node, ranged, weights):
            yield Place(node, dict.fromkeys(BITS, reason))
            continue
        reasons = {}
        ends = "first" if node.ref("input") not in later else "last" if node.name not in earlier else ""
        for option, (weight_bits, input_bits) in BITS.items():
            if ends and weight_bits < 8:
                reasons[option] = f"the {ends} layer stays in 8 bits (HAWQ-V3, bit_config.py)"
            elif option == "w4a8" and node.op != "aten.linear":
                reasons[option] = "w4a8 is for linear layers; a convolution has w8a8 and w4a4"
            elif reason := why_sum_overflows(node, graph, weight_bits=weight_bits, largest=largest_code(input_bits)):
                reasons[option] = reason
        yield Place(node, reasons)


def ties(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Groups of layers that read the same input, which is quantized once for all, so that their bits should agree.

    So a residual unit's downsampling convolution is tied to its first convolution. Source: HAWQ-V3's code
    (github.com/Zhen-Dong/HAWQ), q_resnet.py and ILP.ipynb.
    """
    ranged = take_ranges(graph)
    groups: dict[str, list[str]] = {}
    for place in places(ranged):
        if place.offers:
            groups.setdefault(_origin(place.node.ref("input"), ranged.graph), []).append(place.node.name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def largest_code(bits: int) -> int:
    """Largest magnitude of an input's code in so many bits: four may be unsigned."""
    return 15 if bits == 4 else int(2 ** (bits - 1))


def why_sum_overflows(node: Node, graph: Graph, *, weight_bits: int, largest: int) -> str | None:
    """Why int32 may not hold a layer's sum of products with codes up to ``largest`` and a bias; None if it does."""
    terms = prod(int(extent) for extent in graph.type(node.ref("weight")).shape[1:])
    if terms * 2 ** (weight_bits - 1) * largest <= LARGEST_PRODUCTS:
        return None
    return (
        f"a sum of {terms:,} products of {weight_bits}-bit weights and codes up to {largest} leaves no room for a bias "
        f"in int32; {LARGEST_PRODUCTS // (2 ** (weight_bits - 1) * largest):,} fit, split the layer or use fewer bits"
    )


def absorbs(name: str, graph: Graph) -> Node | None:
    """The clamp behind a product, a sum or an average that can clip its codes, being all that uses the value."""
    node = graph.producers[name]
    may = node.op in LAYERS or addends(node, graph) or window(node, graph) or bounds(node)
    users = graph.users.get(name, ())
    if not may or len(users) != 1 or name in graph.outputs:
        return None
    return users[0] if bounds(users[0]) else None


def head(name: str, graph: Graph) -> str:
    """The last clamp of the chain behind a value that ``absorbs`` finds; the value itself where there is none."""
    while clamp := absorbs(name, graph):
        name = clamp.name
    return name


def _why_no_layer(node: Node, ranged: Ranged, weights: set[str]) -> str | None:
    graph = ranged.graph
    weight = graph.type(node.ref("weight"))
    axes = 4 if node.op == "aten.conv2d" else 2
    if node.ref("weight") not in weights:
        return "weight depends on the model's inputs; only weights are rounded at build time"
    bias = node.args.get("bias")
    if isinstance(bias, Ref) and bias.name not in weights:
        return "bias depends on the model's inputs; only weights are rounded at build time"
    if weight.dtype != "f32":
        return f"weight is {weight}; integer layers are made of f32, so trace the model in it (module.float())"
    if len(weight.shape) != axes or not all(isinstance(extent, int) for extent in weight.shape):
        return f"weight is {weight}; {node.op} takes {axes} fixed extents"
    if axes == 4 and len(graph.type(node.ref("input")).shape) != 4:
        return f"input is {graph.type(node.ref('input'))}; an integer convolution takes four axes"
    result = head(node.name, graph)
    seen = {node.ref("input"): ranged.of(node.ref("input")), result: ranged.of(result)}
    return next((reason for name, span in seen.items() if (reason := why_no_grid(name, span))), None)


def _behind_layers(graph: Graph) -> set[str]:
    """Values that some layer comes before."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op in LAYERS or any(name in found for name in node.inputs):
            found.update(value.name for value in node.outputs)
    return found


def _before_layers(graph: Graph) -> set[str]:
    """Values that some layer comes behind."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op in LAYERS or any(value.name in found for value in node.outputs):
            found.update(node.inputs)
    return found


def _origin(name: str, graph: Graph) -> str:
    """The value that a value is made of by operators that keep its grid."""
    node = graph.producers.get(name)
    if node is None or not keeps_grid(node) or bounds(node):
        return name
    below = source(node)
    return name if below is None else _origin(below, graph)
