"""Give ONNX its own operators where a graph spells them out: rotary embeddings, and attention without transpositions.

    %e, %o = aten.unbind.int(self=view(%x))
    %a = %e * %cos - %o * %sin                     %r = intarsia_onnx.rotary(input=%x, cos=%cos, sin=%sin, heads=4)
    %b = %e * %sin + %o * %cos             ->
    %r = flatten(stack([%a, %b]))                  with cos and sin as tables (S, D/2)

    %q, %k, %v = permute([0, 2, 1, 3])
    %s = aten.scaled_dot_product_attention ->      %y = intarsia_onnx.attention(query=..., key=..., value=...)
    %y = permute([0, 2, 1, 3])

Measured on wan-mini's shape with ONNX Runtime 1.31, beside torch.onnx's export of the module: docs/decisions/002.
"""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.backends.onnx_operators import ATTENTION, POSITIONS, ROTARY
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.rewrite import drop_unused, rewrite
from intarsia.ir.rotation import Rotation
from intarsia.ir.types import TensorType

_DEFAULTS: dict[str, Arg] = {"dropout_p": 0.0, "enable_gqa": False}
_TURNED = ("f32", "f16", "bf16")
"""Element types of ONNX's RotaryEmbedding."""
_ATTENTIONS = ("aten.scaled_dot_product_attention", "intarsia.attention")


def fuse(graph: Graph) -> Graph:
    """The graph with whole operators where it had the pieces; what does not match stays."""
    rotary = _Rotary(graph)
    graph = rewrite(graph, rotary.rule)
    return drop_unused(rewrite(graph, lambda node: _attention(node, graph)))


def _attention(node: Node, graph: Graph) -> Sequence[Node] | None:
    """The transposition after an attention, as the attention itself."""
    inner = _untransposed(node, graph)
    call = graph.producers.get(inner or "")
    if call is None or call.op not in _ATTENTIONS or len(graph.users[call.name]) > 1:
        return None
    if call.name in graph.outputs or any(call.args.get(key, value) != value for key, value in _DEFAULTS.items()):
        return None
    before = {key: _untransposed(graph.producers.get(call.ref(key)), graph) for key in ("query", "key", "value")}
    if None in before.values() or not all(isinstance(graph.type(str(name)).shape[2], int) for name in before.values()):
        return None
    args: dict[str, Arg] = {key: Ref(str(name)) for key, name in before.items()}
    args |= {"is_causal": call.args.get("is_causal", False), "scale": call.args.get("scale")}
    args |= {new: call.args[old] for new, old in (("mask", "attn_mask"), ("lengths", "lengths")) if call.args.get(old)}
    return [Node(ATTENTION, args, node.outputs, call.source)]


def _untransposed(node: Node | None, graph: Graph) -> str | None:
    """What ``node`` transposes from heads-first to heads-beside-channels or back; None if it does not."""
    if node is None:
        return None
    swaps = (node.op == "aten.permute" and node.args["dims"] == (0, 2, 1, 3)) or (
        node.op == "aten.transpose.int" and {node.args["dim0"], node.args["dim1"]} in ({1, 2}, {-3, -2})
    )
    return node.ref("self") if swaps and len(node.type.shape) == 4 else None


class _Rotary:
    """Replaces the flattening after a rotation of pairs by the rotation; all layers share its tables and positions."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: set[str] = set()

    def rule(self, node: Node) -> Sequence[Node] | None:
        """What stands in place of ``node``, with the tables at their first use."""
        match = Rotation.ending_at(node, self.graph)
        if match is None or not _fits(match, node, self.graph):
            return None
        batch, length, heads, channels = node.type.shape
        assert isinstance(channels, int)
        table = TensorType(node.type.dtype, (length, channels // 2))
        tables = [
            Node("aten.squeeze.dims", {"self": Ref(name), "dim": (0, 2)}, (Value(f"{name}.by_position", table),))
            for name in (match.cos, match.sin)
        ]
        name = f"positions[{batch}, {length}]"
        index = Value(name, TensorType("i64", (batch, length)))
        tables.append(Node(POSITIONS, {"input": Ref(match.input)}, (index,)))
        args: dict[str, Arg] = {"input": Ref(match.input), "heads": heads}
        args |= {key: Ref(made.name) for key, made in zip(("cos", "sin", "positions"), tables, strict=True)}
        first = [made for made in tables if made.name not in self.made]
        self.made.update(made.name for made in first)
        return [*first, Node(ROTARY, args, node.outputs, node.source)]


def _fits(match: Rotation, node: Node, graph: Graph) -> bool:
    """Whether the shapes are those of ONNX's RotaryEmbedding: tables (1, S, 1, D/2), one element type."""
    input, cos, sin, output = graph.type(match.input), graph.type(match.cos), graph.type(match.sin), node.type
    if len(output.shape) != 4 or output.shape[:2] != input.shape[:2] or len(input.shape) not in (3, 4):
        return False
    if output.dtype not in _TURNED:
        return False
    heads, channels = output.shape[2:]
    if not isinstance(heads, int) or not isinstance(channels, int):
        return False
    last = (heads, channels) if len(input.shape) == 4 else (heads * channels,)
    table = TensorType(input.dtype, (1, output.shape[1], 1, channels // 2))
    return input.shape[2:] == last and output.dtype == input.dtype and cos == sin == table
