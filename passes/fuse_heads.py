"""Let heads of one pattern stand side by side, so that each pattern is one call and nothing is gathered."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused, fresh, rename_uses, rewrite
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.base import Pass
from intarsia.passes.fuse_heads_move import Gathered, Move
from intarsia.passes.fuse_heads_sites import Group, GroupedAttention, grouped_attentions
from intarsia.passes.head_blocks import HeadAxis
from intarsia.passes.head_trace import Surroundings, trace_heads


@dataclass(frozen=True)
class FuseHeads(Pass):
    """Fold the order of heads that ``sparse-attention`` asks for into the weights.

        %q: f32[B, S, H*D] = aten.linear(input=%x, weight=%wq, bias=%bq)                        (key, value alike)
        %qh: f32[B, H, S, D] = view and permute of %q
        %y.query0: f32[B, 3, S, D] = aten.index_select(self=%qh, dim=1, index=%y.heads0)
        %y.part0: f32[B, 3, S, D] = intarsia.block_sparse_attention(query=%y.query0, ...)
        ...
        %y.joined: f32[B, H, S, D] = aten.cat(tensors=[%y.part0, %y.part1, %y.part2], dim=1)
        %y: f32[B, H, S, D] = aten.index_select(self=%y.joined, dim=1, index=%y.places)
        %o: f32[B, S, C] = aten.linear(input=permute and view of %y, weight=%wo, bias=%bo)

    becomes, for K heads that are not skipped,

        %q.order: i64[K*D] = intarsia.integers(runs=...)
        %q.wq: f32[K*D, C] = aten.index_select(self=%wq, dim=0, index=%q.order)                 (%bq alike)
        %q: f32[B, S, K*D] = aten.linear(input=%x, weight=%q.wq, bias=%q.bq)
        %qh: f32[B, K, S, D] = view and permute of %q
        %y.query0: f32[B, 3, S, D] = aten.slice.Tensor(self=%qh, dim=1, start=0, end=3)
        %y.part0: f32[B, 3, S, D] = intarsia.block_sparse_attention(query=%y.query0, ...)
        ...
        %y.tokens: f32[B, S, K, D] = aten.cat(tensors=[%y.part0, %y.part1 with S before heads], dim=2)
        %y: f32[B, K, S, D] = aten.transpose.int(self=%y.tokens, dim0=1, dim1=2)
        %o.wo: f32[C, K*D] = aten.index_select(self=%wo, dim=1, index=%q.order)
        %o: f32[B, S, C] = aten.linear(input=permute and view of %y, weight=%o.wo, bias=%bo)

    ``passes/head_axis.py`` proves, call by call, that all that lies between takes part; where it cannot, the attention
    stays as it is, and ``refusals`` says why. Where a norm over all heads needs skipped heads for its statistic, as in
    Wan's queries and keys, they are left out by the slices instead. If all heads are skipped, the output projection is
    its bias. Nothing is computed differently but the sum over heads, whose terms have another order.
    Source: Sparse-vDiT (arXiv 2506.03065), section 4.2, head fusion.
    """

    name: ClassVar[str] = "fuse-heads"

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Attention in groups of heads whose order could not be folded into weights, each with the reason."""
        return {name: found for name, found in planned(graph).items() if isinstance(found, str)}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with the order of heads in the weights, what nobody uses then dropped."""
        fusions = [found for found in planned(graph).values() if isinstance(found, Fusion)]
        if not fusions:
            return graph
        graph = drop_unused(graph)
        moves = {name: move for fusion in fusions for move in fusion.moves for name in move.path.calls}
        replaced = {name: nodes for fusion in fusions for name, nodes in fusion.calls(graph)}
        gathered = Gathered(graph)

        def rule(node: Node) -> Sequence[Node] | None:
            if node.name in replaced:
                return replaced[node.name]
            move = moves.get(node.name)
            return None if move is None else move.nodes(node, gathered)

        names = {old: new for fusion in fusions for old, new in fusion.renamed()}
        return drop_unused(_without_single(rename_uses(rewrite(graph, rule), names), moves))


@dataclass(frozen=True)
class Fusion:
    """One attention, and how its heads move on each path between weights."""

    site: GroupedAttention
    moves: tuple[Move, ...]

    @property
    def groups(self) -> Iterator[tuple[Group, int, int]]:
        """The groups that are computed, or zeros that are needed, each with the heads at which it begins and ends."""
        first = 0
        keeps_zeros = len(self._move(self.site.name).order) == self.site.heads
        for group in self.site.groups:
            if keeps_zeros or not group.skipped:
                yield group, first, first + len(group.heads)
            first += len(group.heads)

    def calls(self, graph: Graph) -> Iterator[tuple[str, Sequence[Node]]]:
        """What stands in place of each call of the site, by its name."""
        yield from dict.fromkeys(self.site.calls, ()).items()
        groups = list(self.groups)
        for group, first, last in groups:
            for _, call in group.taken:
                if not self._is_all(call, first, last):
                    args = {"self": call.args["self"], "dim": 1, "start": first, "end": last}
                    yield call.name, (replace(call, op="aten.slice.Tensor", args=args),)
            yield group.part.name, (group.part,)
        if not groups:
            return
        result = Value(self.site.name, self._move(self.site.name).type(self.site.name))
        if len(groups) == 1:
            part = groups[0][0].part
            yield part.name, (replace(part, outputs=(result,)),)
        else:
            yield result.name, tuple(_joined([group.part for group, _, _ in groups], result, graph))

    def renamed(self) -> Iterator[tuple[str, str]]:
        """The operands of a group that are all heads that are left, and what they are then."""
        for group, first, last in self.groups:
            yield from ((call.name, call.ref("self")) for _, call in group.taken if self._is_all(call, first, last))

    def _is_all(self, call: Node, first: int, last: int) -> bool:
        source = call.ref("self")
        return (first, last) == (0, self._move(source).type(source).shape[1])

    def _move(self, name: str) -> Move:
        return next(move for move in self.moves if name in move.path.axes)


def _joined(parts: Sequence[Node], result: Value, graph: Graph) -> Iterator[Node]:
    """Groups side by side, heads after tokens in memory, as attention's own result lies."""
    turned = [_tokens_first(part.outputs[0], graph) for part in parts]
    for part, value in zip(parts, turned, strict=True):
        yield _transposed(part.name, value, part.source)
    joined, source = _tokens_first(result, graph), parts[0].source
    yield Node("aten.cat", {"tensors": tuple(Ref(value.name) for value in turned), "dim": 2}, (joined,), source)
    yield _transposed(joined.name, result, source)


def _transposed(name: str, result: Value, source: str) -> Node:
    return Node("aten.transpose.int", {"self": Ref(name), "dim0": 1, "dim1": 2}, (result,), source)


def _tokens_first(value: Value, graph: Graph) -> Value:
    assert isinstance(value.type, TensorType)
    batch, heads, tokens, channels = value.type.shape
    return Value(
        fresh(f"{value.name}.tokens", graph.values), replace(value.type, shape=(batch, tokens, heads, channels))
    )


def planned(graph: Graph) -> dict[str, Fusion | str]:
    """How each attention in groups of heads is fused, by its name, or why it cannot be."""
    graph = drop_unused(graph)
    within = Surroundings(graph)
    found: dict[str, Fusion | str] = {}
    owners: dict[str, str] = {}
    for site in grouped_attentions(graph):
        fusion = _planned(site, within)
        calls = [] if isinstance(fusion, str) else [name for move in fusion.moves for name in move.path.calls]
        shared = next((name for name in calls if name in owners), None)
        if shared is not None:
            fusion = f"%{shared} also carries the heads of %{owners[shared]}, which have an order of their own"
        else:
            owners |= dict.fromkeys(calls, site.name)
        found[site.name] = fusion
    moving = _moving(found.values())
    return {name: one if isinstance(one, str) else _with_likes(one, moving, within) for name, one in found.items()}


def _planned(site: GroupedAttention, within: Surroundings) -> Fusion | str:
    graph = within.graph
    for name in site.calls - {site.name}:
        if name in within.interface or any(user.name not in site.calls for user in graph.users.get(name, ())):
            return f"%{name}, which is of some heads only, is used elsewhere too"
    operands = site.operands if site.groups else ()
    paths = trace_heads(within, dict.fromkeys((*operands, site.name), HeadAxis(1, 1)), site.heads, site.calls)
    if isinstance(paths, str):
        return paths
    result = next(path for path in paths if site.name in path.axes)
    if result.whole and not site.computed:
        return "all heads are skipped, and a norm after attention needs them"
    mixed = _reads_heads(site, {name for path in paths for name in path.axes}, graph)
    if mixed is not None:
        return mixed
    orders = [site.order if path.whole or result.whole else site.computed for path in paths]
    moves = (Move(graph, path, site.heads, order, {}) for path, order in zip(paths, orders, strict=True))
    return Fusion(site, tuple(moves))


def _reads_heads(site: GroupedAttention, moving: Container[str], graph: Graph) -> str | None:
    """Why the site, beside taking its groups, depends on the order of heads, as by a mask made of queries."""
    taken = {call.name for group in site.groups for _, call in group.taken}
    for node in graph.nodes:
        mixed = next((name for name in node.inputs if name in moving), None) if node.name in site.calls else None
        if mixed is not None and node.name not in taken and site.groups:
            return f"%{node.name} reads %{mixed}, whose heads move"
    return None


def _moving(fusions: Iterable[Fusion | str]) -> frozenset[str]:
    """Every value whose heads move, and every one that is of some heads only."""
    found = [fusion for fusion in fusions if isinstance(fusion, Fusion)]
    moved = (name for fusion in found for move in fusion.moves for name in move.path.axes)
    return frozenset((*moved, *(name for fusion in found for name in fusion.site.calls)))


def _with_likes(fusion: Fusion, moving: Container[str], within: Surroundings) -> Fusion | str:
    """The fusion, and where nothing is left of a product's input, something that tells the extents of its result."""
    moves: list[Move] = []
    for move in fusion.moves:
        likes: dict[str, str] = {}
        for node in within.graph.nodes if not move.order else ():
            if node.name not in move.path.calls or not move.reads_nothing(node):
                continue
            like = _like(node, moving, within) if node.op == "aten.linear" else None
            if like is None:
                return f"all heads are skipped, and it is not known what %{node.name} gives then"
            likes[node.name] = like
        moves.append(replace(move, likes=likes))
    return replace(fusion, moves=tuple(moves))


def _like(node: Node, moving: Container[str], within: Surroundings) -> str | None:
    """The last activation of the node's type before it that is needed without it as well."""
    graph = within.graph
    cut = drop_unused(rewrite(graph, lambda one: (replace(one, args={}),) if one.name == node.name else None))
    found = [value.name for value in graph.inputs if value.type == node.type]
    for one in cut.nodes:
        if one.name == node.name:
            break
        found += [value.name for value in one.outputs if value.type == node.type and value.name not in moving]
    return next((name for name in reversed(found) if name not in within.weights), None)


def _without_single(graph: Graph, moves: Mapping[str, Move]) -> Graph:
    """The graph without those calls of ``aten.cat`` on paths of which a single tensor is left."""
    single = [node for node in graph.nodes if node.op == "aten.cat" and node.name in moves and len(node.inputs) == 1]
    if not single:
        return graph
    names = {node.name: node.inputs[0] for node in single}
    kept = replace(graph, nodes=tuple(node for node in graph.nodes if node.name not in names))
    return rename_uses(kept, names)
