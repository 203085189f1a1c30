"""Attention whose heads are taken apart by pattern and joined again, as ``sparse-attention`` leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.passes.fuse_candidates import produced

ATTENTION = ("aten.scaled_dot_product_attention", "intarsia.attention", "intarsia.block_sparse_attention")
ZEROS = "aten.zeros_like"


@dataclass(frozen=True)
class Group:
    """Heads of one pattern.

    Attributes:
        heads: Their numbers, in the order in which the part has them.
        part: The call that gives their result; ``aten.zeros_like`` if they are skipped.
        taken: Operand of the part, ``query`` or so, to the call that takes the heads out of all heads.
    """

    heads: tuple[int, ...]
    part: Node
    taken: tuple[tuple[str, Node], ...]

    @property
    def skipped(self) -> bool:
        """Whether the heads give zeros."""
        return self.part.op == ZEROS


@dataclass(frozen=True)
class GroupedAttention:
    """One attention in groups of heads.

    Attributes:
        operands: The values of all heads that the groups are taken from, each (B, H, S, D).
        groups: At least two, those that are computed before those that are skipped; or none, if all heads are.
        calls: Names of the calls that are the site: what the groups are taken, computed and joined by.
    """

    name: str
    heads: int
    operands: tuple[str, ...]
    groups: tuple[Group, ...]
    calls: frozenset[str]

    @property
    def order(self) -> tuple[int, ...]:
        """All heads, group after group."""
        return tuple(head for group in self.groups for head in group.heads)

    @property
    def computed(self) -> tuple[int, ...]:
        """The heads that are not skipped, group after group."""
        return tuple(head for group in self.groups if not group.skipped for head in group.heads)


def grouped_attentions(graph: Graph) -> Iterator[GroupedAttention]:
    """Every attention in groups of heads, in execution order, and every one that is zeros altogether."""
    for node in graph.nodes:
        found = _joined(node, graph) if node.op == "aten.index_select" else _zeros(node, graph)
        if found is not None:
            yield found


def _joined(node: Node, graph: Graph) -> GroupedAttention | None:
    """The site that ends in this call, which puts the heads back in their places."""
    joined = produced(node.ref("self"), graph, "aten.cat")
    places = _numbers(node, graph)
    if joined is None or places is None or not joined.args.get("dim") == node.args["dim"] == 1:
        return None
    groups = [_group(name, graph) for name in joined.inputs]
    if not all(groups):
        return None
    kept = tuple(sorted((group for group in groups if group), key=lambda group: group.skipped))
    heads = [head for group in groups if group for head in group.heads]
    taken = [call for group in kept for _, call in group.taken]
    operands = _operands(kept)
    if operands is None or _inverse(heads) != list(places):
        return None
    if any(graph.type(name).shape[1] != len(heads) for name in operands):
        return None
    computed = any(not group.skipped for group in kept)
    calls = frozenset(call.name for call in (node, joined, *(group.part for group in kept), *taken))
    return GroupedAttention(node.name, len(heads), operands, kept if computed else (), calls)


def _inverse(heads: Sequence[int]) -> list[int]:
    """Where each head stands; empty if one is missing or stands twice."""
    places = sorted(range(len(heads)), key=heads.__getitem__)
    return places if [heads[place] for place in places] == list(range(len(heads))) else []


def _group(name: str, graph: Graph) -> Group | None:
    part = produced(name, graph, *ATTENTION, ZEROS)
    if part is None:
        return None
    roles = ("self",) if part.op == ZEROS else ("query", "key", "value")
    taken = {role: produced(part.ref(role), graph, "aten.index_select") for role in roles}
    calls = tuple((role, call) for role, call in taken.items() if call is not None)
    heads = {_numbers(call, graph) for _, call in calls}
    first = heads.pop() if len(heads) == 1 and len(calls) == len(roles) else None
    return None if first is None else Group(first, part, calls)


def _operands(groups: tuple[Group, ...]) -> tuple[str, ...] | None:
    """What all groups are taken from: query, key and value; None if groups differ in it."""
    found: dict[str, str] = {}
    for group in groups:
        for role, call in group.taken:
            if found.setdefault("query" if role == "self" else role, call.ref("self")) != call.ref("self"):
                return None
    return tuple(dict.fromkeys(found.values()))


def _numbers(call: Node, graph: Graph) -> tuple[int, ...] | None:
    """The numbers by which ``aten.index_select`` takes heads; None if it does not, or they are not written down."""
    index = call.args.get("index")
    node = produced(index.name, graph, "intarsia.integers") if isinstance(index, Ref) else None
    if node is None or call.args.get("dim") != 1 or len(call.type.shape) != 4:
        return None
    return tuple(TokenOrder.parse(str(node.args["runs"])).indices().tolist())


def _zeros(node: Node, graph: Graph) -> GroupedAttention | None:
    """All heads skipped: zeros like a query (B, H, S, D), which are used as attention's result is."""
    if node.op != ZEROS or len(node.type.shape) != 4 or not isinstance(node.type.shape[1], int):
        return None
    used = {user.op for user in graph.users.get(node.name, ())}
    if not used & {"aten.permute", "aten.transpose.int"}:
        return None
    return GroupedAttention(node.name, node.type.shape[1], (), (), frozenset([node.name]))
