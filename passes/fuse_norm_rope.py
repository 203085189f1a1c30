"""Find RMS norms over all heads that are followed by a rotary embedding, for ``intarsia.norm_rope``.

    %n: bf16[B, N, C] = aten.rms_norm(input=%x, normalized_shape=[C], weight=%w, eps=1e-06)
    %r: f32[B, N, heads, D] = the pairs of %n turned by %cos and %sin f32[1, N, 1, D/2], as ``ir/rotation.py`` shows
    %y: bf16[B, N, heads, D] = aten._to_copy(self=%r, dtype=torch.bfloat16)

becomes

    %cos.rows: f32[N, D/2] = aten.squeeze.dims(self=%cos, dim=[0, 2])
    %sin.rows: f32[N, D/2] = aten.squeeze.dims(self=%sin, dim=[0, 2])
    %y: bf16[B, N, heads, D] = intarsia.norm_rope(input=%x, weight=%w, cos=%cos.rows, sin=%sin.rows, heads=4, eps=1e-06)

with one pair of tables for all layers that share them.
"""

from __future__ import annotations

from math import prod

from intarsia.ir.graph import Graph, Node, Ref, Symbol, Value
from intarsia.ir.rewrite import fresh
from intarsia.ir.rotation import Rotation, paired
from intarsia.ir.sizes import Dim
from intarsia.ir.types import TensorType
from intarsia.passes.fuse_candidates import (
    Candidate,
    operands,
    produced,
    rounded,
    uncast,
    unwidened,
    used_elsewhere,
)
from intarsia.passes.fuse_norms import Norm, norm_of

OP = "intarsia.norm_rope"


def norm_rope(node: Node, graph: Graph) -> Candidate | None:
    """The candidate whose turned pairs ``node`` flattens, or adds up."""
    found = Rotation.ending_at(node, graph) or _turned(node, graph)
    if found is None:
        return None
    norm = norm_of(uncast(found.input, graph)[-1], graph)
    reason = _why_not_norm(found.input, norm, graph) or _why_not_tables(found, node, graph)
    reason = reason or used_elsewhere(uncast(found.input, graph), graph)
    if norm is None or reason:
        return Candidate(node.name, (), reason)
    for input in (unwidened(norm.input, graph), norm.input):
        last = rounded(node, graph.type(input).dtype, graph)
        if last is not None:
            heads = node.type.shape[2]
            return Candidate(last.name, _fused(last, input, norm=norm, found=found, heads=heads, graph=graph))
    given = graph.type(norm.input).dtype
    return Candidate(node.name, (), f"the result is {node.type.dtype}, the input {given}; {OP} gives the input's")


def _turned(node: Node, graph: Graph) -> Rotation | None:
    """The other spelling: ``x * cos + pairs(-odd, even) * sin``, with tables that hold each entry twice."""
    terms = operands(node) if node.op == "aten.add.Tensor" else None
    products = [produced(uncast(term, graph)[-1], graph, "aten.mul.Tensor") for term in terms or ()]
    factors = [pair for product in products if product and (pair := operands(product))]
    if len(factors) != 2:
        return None
    (input, cos), (turned, sin) = factors
    view = produced(uncast(turned, graph)[-1], graph, "aten.view", "aten.reshape", "aten.flatten.using_ints")
    stack = produced(view.ref("self"), graph, "aten.stack") if view else None
    negative = produced(stack.inputs[0], graph, "aten.neg") if stack and len(stack.inputs) == 2 else None
    if stack is None or negative is None:
        return None
    source = paired(stack.inputs[1], negative.ref("self"), graph)
    same = source is not None and uncast(source, graph)[-1] == uncast(input, graph)[-1]
    return Rotation(input, cos, sin) if same else None


def _why_not_norm(input: str, norm: Norm | None, graph: Graph) -> str:
    """Why what is turned is no RMS norm over all heads of all tokens."""
    part = produced(uncast(input, graph)[-1], graph, "aten.slice.Tensor")
    whole = norm or (norm_of(uncast(part.ref("self"), graph)[-1], graph) if part else None)
    if whole is None:
        return f"%{input} is turned without a norm; {OP} norms first"
    if whole.kind != "RMS norm":
        return f"%{whole.name} is a {whole.kind}; {OP} computes RMS norms"
    heads = len(graph.type(whole.input).shape) - 2
    if heads != 1 or len(whole.extents) != 1:
        extents = ", ".join(map(str, whole.extents))
        return f"%{whole.name} norms each head's [{extents}] alone; {OP} norms all heads of a token together"
    return "" if norm else f"only a part of %{whole.name} is turned; {OP} turns all tokens"


def _why_not_tables(found: Rotation, node: Node, graph: Graph) -> str:
    """Why the tables are not the same for all heads, or the result is not (B, N, heads, D)."""
    shape, cos, sin = node.type.shape, graph.type(found.cos), graph.type(found.sin)
    merged = graph.type(found.input).shape
    fixed = len(shape) == 4 and isinstance(shape[2], int) and isinstance(shape[3], int)
    if not fixed or (*shape[:2], prod(map(int, shape[2:]))) != merged:
        return f"%{found.cos} is {cos}, and %{node.name} {node.type}; {OP} turns (B, N, heads, D), every head alike"
    if cos.shape == sin.shape == (1, shape[1], 1, int(shape[3]) // 2):
        return ""
    return f"%{found.cos} is {cos}, %{found.sin} {sin}; {OP} takes one row of D/2 entries for each token"


def _fused(last: Node, input: str, *, norm: Norm, found: Rotation, heads: Dim, graph: Graph) -> tuple[Node, ...]:
    """The kernel's call in place of ``last``, with the tables that it reads."""
    cos, sin = _rows(found.cos, graph), _rows(found.sin, graph)
    args = {
        "input": Ref(input),
        "weight": norm.weight,
        "cos": Ref(cos[-1].name),
        "sin": Ref(sin[-1].name),
        "heads": heads,
        "eps": norm.eps,
    }
    return (*cos, *sin, Node(OP, args, last.outputs, last.source))


def _rows(table: str, graph: Graph) -> tuple[Node, ...]:
    """Calls that make f32 (N, D/2) of a table (1, N, 1, D/2); named after it, so that layers can share them."""
    type_ = graph.type(table)
    name, shape = fresh(f"{table}.rows", graph.values), (type_.shape[1], type_.shape[3])
    value = Value(name, TensorType(type_.dtype, shape))
    squeezed = Node("aten.squeeze.dims", {"self": Ref(table), "dim": (0, 2)}, (value,))
    if type_.dtype not in ("f16", "bf16"):
        return (squeezed,)
    wide = Value(fresh(f"{table}.rows.f32", graph.values), TensorType("f32", shape))
    return squeezed, Node("aten._to_copy", {"self": Ref(name), "dtype": Symbol("torch.float32")}, (wide,))
