"""Find layer norms that are scaled and shifted by the conditioning (adaLN), for ``intarsia.modulated_norm``.

    %n: f32[B, N, C] = aten.layer_norm(input=float(%x), normalized_shape=[C], eps=1e-06)
    %f: f32[B, 1, C] = aten.add.Tensor(self=%scale, other=1)
    %m: f32[B, N, C] = aten.mul.Tensor(self=%n, other=%f)
    %a: f32[B, N, C] = aten.add.Tensor(self=%m, other=%shift)
    %y: bf16[B, N, C] = aten.type_as(self=%a, other=%x)

becomes

    %y: bf16[B, N, C] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%scale, shift=%shift, eps=1e-06)

Source: Peebles and Xie, DiT (arXiv 2212.09748), adaLN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.rewrite import fresh
from intarsia.ir.types import TensorType
from intarsia.passes.fuse_candidates import (
    CASTS,
    Candidate,
    operands,
    produced,
    rounded,
    uncast,
    unwidened,
    used_elsewhere,
)
from intarsia.passes.fuse_norms import Norm, norm_of

OP = "intarsia.modulated_norm"

SHAPES = frozenset({"aten.reshape", "aten.unsqueeze", "aten.view"})
"""What may stand between 1 + scale and the product."""


@dataclass(frozen=True)
class _Modulation:
    """The names in ``norm * factor + shift``; ``inner`` are the values between the norm and the sum, both ends out."""

    norm: Norm
    factor: str
    shift: str
    inner: tuple[str, ...]


def modulated_norm(node: Node, graph: Graph) -> Candidate | None:
    """The candidate whose shift the sum ``node`` adds."""
    found = _modulation(node, graph)
    if found is None:
        return None
    place, input = _ends(node, found.norm, graph)
    scale = _scale(found.factor, place.name if place else node.name, graph)
    reason = _why_not(found, graph)
    if reason or place is None or scale is None:
        given = graph.type(found.norm.input).dtype
        ends = f"the result is {node.type.dtype}, the input {given}; {OP} gives the input's"
        factor = f"the norm is multiplied by %{found.factor}, which is not 1 + a scale"
        return Candidate(node.name, (), reason or (factor if scale is None else ends))
    name, made = scale
    args = {
        "input": Ref(input),
        "weight": found.norm.weight,
        "bias": found.norm.bias,
        "scale": Ref(name),
        "shift": Ref(unwidened(found.shift, graph)),
        "eps": found.norm.eps,
    }
    return Candidate(place.name, (*made, Node(OP, args, place.outputs, node.source)))


def _modulation(node: Node, graph: Graph) -> _Modulation | None:
    pair = operands(node)
    for product, shift in (pair, pair[::-1]) if pair else ():
        between = uncast(product, graph)
        mul = produced(between[-1], graph, "aten.mul.Tensor")
        factors = operands(mul) if mul else None
        for normed, factor in (factors, factors[::-1]) if factors else ():
            chain = uncast(normed, graph)
            norm = norm_of(chain[-1], graph)
            if norm is not None:
                return _Modulation(norm, factor, shift, (*chain, *between))
    return None


def _why_not(found: _Modulation, graph: Graph) -> str:
    """Why the norm is none of a token's channels, or is needed by itself."""
    if found.norm.kind != "layer norm":
        return f"%{found.norm.name} is an {found.norm.kind}; {OP} computes layer norms"
    if len(found.norm.extents) != 1:
        return f"%{found.norm.name} norms {len(found.norm.extents)} axes together; {OP} norms the last"
    return used_elsewhere(found.inner, graph)


def _ends(node: Node, norm: Norm, graph: Graph) -> tuple[Node | None, str]:
    """The last call of the pattern, and the value that the norm reads in that call's element type."""
    inputs = (unwidened(norm.input, graph), norm.input)
    for input in inputs:
        last = rounded(node, graph.type(input).dtype, graph)
        if last is not None:
            return last, input
    return None, norm.input


def _scale(factor: str, place: str, graph: Graph) -> tuple[str, tuple[Node, ...]] | None:
    """Scale in the shape of ``factor``, which is 1 + scale, and the calls that bring it into that shape."""
    shapers: list[Node] = []
    name = factor
    while (node := produced(name, graph, *SHAPES, *CASTS)) is not None:
        if node.op in SHAPES:
            shapers.append(node)
        name = node.ref("self")
    added = produced(name, graph, "aten.add.Tensor")
    if added is None or added.args.get("other") != 1 or added.args.get("alpha", 1) != 1:
        return None
    scale = unwidened(added.ref("self"), graph)
    dtype, made = graph.type(scale).dtype, list[Node]()
    for shaper in reversed(shapers):
        value = Value(fresh(f"{place}.scale{len(made) or ''}", graph.values), TensorType(dtype, shaper.type.shape))
        made.append(replace(shaper, args={**shaper.args, "self": Ref(scale)}, outputs=(value,)))
        scale = value.name
    return scale, tuple(made)
