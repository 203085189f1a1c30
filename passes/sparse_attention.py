"""Give each head of self-attention over video tokens the pattern that was chosen for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from intarsia import kernels
from intarsia.ir.errors import PlanError, SpecError, UsageError
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.rewrite import fresh, rewrite
from intarsia.ir.target import Target
from intarsia.ir.tokens import TokenLayout
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.passes.attention_sites import Site, refused, sites
from intarsia.passes.base import Pass
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.masks import Mask

OP = "intarsia.block_sparse_attention"
DENSE, SKIP = "dense", "skip"

MODES = tuple(
    mode.format(density)
    for density in (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625, 0.03125)
    for mode in (
        "diagonal(density={})",
        "multi-diagonal(density={})",
        "vertical-stripe(density={}, sink=0)",
        "tile-offsets(density={})",
    )
)
"""What a head is offered besides dense and skip: the modes of Sparse-vDiT, section 4.2, and what generalises its
diagonals, at several widths each.

Stripes need not hold the first frame: where a head looks at it, its columns are among those that calibration finds, as
are the distances of tiles.
"""

BLOCKS = (128, 64, 32, 16)
"""Tokens of a block, if nobody says how many: the largest that cuts the sequence into 32 blocks."""


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Compute, head by head, only the blocks of scores that a pattern keeps.

        %y: f32[B, 4, S, D] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v)

    becomes, where heads 0 and 2 have a diagonal, 1 stays dense and 3 is skipped,

        %y.heads0: i64[2] = intarsia.integers(runs="0:1*1,2:1*1")
        %y.query0: f32[B, 2, S, D] = aten.index_select(self=%q, dim=1, index=%y.heads0)     (key, value alike)
        %y.part0: f32[B, 2, S, D] = intarsia.block_sparse_attention(query=%y.query0, ..., blocks="32:0-3;...")
        ...
        %y.joined: f32[B, 4, S, D] = aten.cat(tensors=[%y.part0, %y.part1, %y.part2], dim=1)
        %y.placed: f32[B, 4, S, D] = aten.index_select(self=%y.joined, dim=1, index=%y.places)
        ...                                                      tokens before heads in memory, as attention has them
        %y: f32[B, 4, S, D] = aten.transpose.int(self=%y.rows, dim0=1, dim1=2)

    ``fuse-heads`` after it puts the heads of a group side by side in the weights, so that nothing is gathered.
    Source: Sparse-vDiT (arXiv 2506.03065), section 4.2.

    Attributes:
        patterns: What each head is offered besides ``dense``; a plan may name others.
        block: Tokens of a block of queries and of keys; 0 takes the largest of 128, 64, 32 and 16 that cuts the
            sequence into 32 blocks or more.
        tokens: The layout of the tokens, ``tokens(frames=8, height=8, width=8)``, where the graph does not show it.
    """

    name: ClassVar[str] = "sparse-attention"
    patterns: tuple[str, ...] = (SKIP, *MODES)
    block: int = 0
    tokens: str = ""

    def __post_init__(self) -> None:
        if self.block and (self.block < 16 or self.block & (self.block - 1)):
            raise ValueError(f"block is {self.block}; it is a power of two of at least 16, or 0")
        if isinstance(self.patterns, str) or not all(isinstance(text, str) for text in self.patterns):
            raise ValueError(f"patterns is {self.patterns!r}; it is a tuple of texts such as ('skip',)")
        for text in self.patterns:
            find_pattern(text)  # an unknown one is told now, rather than as one that fits nowhere

    def choices(self, graph: Graph, target: Target) -> Choices:
        """At each head ``dense`` and those patterns that fit the layout and that the kernels take."""
        found: dict[str, tuple[str, ...]] = {}
        for site in self.sites(graph):
            offers = (DENSE, *(text for text in self.patterns if self._why_not(site, text, graph, target) is None))
            if len(offers) > 1:
                found |= dict.fromkeys(places(site), offers)
        return found

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Attention that is not of video tokens, and heads for which no pattern fits, each with the reason."""
        found = refused(graph, self._layout)
        for site in self.sites(graph):
            reasons = [self._why_not(site, text, graph, target) for text in self.patterns]
            if None not in reasons:
                reason = "; ".join(dict.fromkeys(map(str, reasons))) or "no patterns are given"
                found |= dict.fromkeys(places(site), reason)
        return found

    def unlisted(self, graph: Graph, target: Target, chosen: Chosen) -> dict[str, str]:
        """Patterns, offered or not, that do not fit the head at which they are asked for."""
        found = {place: site for site in self.sites(graph) for place in places(site)}
        reasons = {place: self._why_not(found[place], option, graph, target) for place, option in chosen.items()}
        return {place: reason for place, reason in reasons.items() if reason}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with every head in its pattern; PlanError for one that does not fit."""
        wanted = {place: option for place, option in chosen.items() if option != DENSE}
        if not wanted:
            return graph
        found = {site.name: site for site in self.sites(graph)}
        known = {place for site in found.values() for place in places(site)}
        for place in wanted:
            if place not in known:
                raise PlanError(f"{self.name}: %{place} is no head of self-attention over video tokens")

        def rule(node: Node) -> Sequence[Node] | None:
            site = found.get(node.name)
            options = [wanted.get(place, DENSE) for place in places(site)] if site else []
            return self._grouped(node, site, options, graph) if site and set(options) - {DENSE} else None

        return rewrite(graph, rule)

    def sites(self, graph: Graph) -> tuple[Site, ...]:
        """The self-attentions over video tokens; SpecError if ``tokens`` is no layout."""
        return _sites(graph, self._layout)

    def block_of(self, layout: TokenLayout) -> int:
        """Tokens of a block at this layout."""
        return self.block or next((block for block in BLOCKS if layout.tokens >= 32 * block), BLOCKS[-1])

    def mask(self, option: str, layout: TokenLayout) -> Mask:
        """What a head with this option computes; UsageError or SpecError if it is unknown or does not fit."""
        block = self.block_of(layout)
        return Mask(find_pattern(option), layout, block, block)

    def part(self, site: Site, option: str, graph: Graph) -> Node:
        """The call that stands at the site where all heads have this option; PlanError if it does not fit."""
        node = graph.producers[site.name]
        return self._part(node, site, option, _operands(site), node.outputs[0])

    @property
    def _layout(self) -> TokenLayout | None:
        return TokenLayout.parse(self.tokens) if self.tokens else None

    def _why_not(self, site: Site, option: str, graph: Graph, target: Target) -> str | None:
        try:
            return kernels.why_not(self.part(site, option, graph), graph, target)
        except PlanError as error:
            return str(error)

    def _grouped(self, node: Node, site: Site, options: Sequence[str], graph: Graph) -> Sequence[Node]:
        """The calls of all groups of heads, and what takes the heads apart and joins them again."""
        groups = groups_of(options)
        if len(groups) == 1:
            return (self._part(node, site, options[0], _operands(site), node.outputs[0]),)
        made: list[Node] = []
        parts: list[Ref] = []
        for number, heads in enumerate(groups):
            taken, operands = _taken(node, site, number, heads, graph)
            part = _like(f"{node.name}.part{number}", node, len(heads), graph)
            made += [*taken, self._part(node, site, options[heads[0]], operands, part)]
            parts.append(Ref(part.name))
        return (*made, *_joined(node, parts, [head for heads in groups for head in heads], graph))

    def _part(self, node: Node, site: Site, option: str, operands: Mapping[str, Arg], output: Value) -> Node:
        if option == DENSE:
            return replace(node, args={**node.args, **operands}, outputs=(output,))
        if option == SKIP:
            return Node("aten.zeros_like", {"self": operands["query"]}, (output,), node.source)
        block = self.block_of(site.layout)
        try:
            blocks, order, mean = _texts(option, site.layout, block)
        except (UsageError, SpecError) as error:
            raise PlanError(f"{self.name}: %{node.name}: {error}") from error
        args = {
            **operands,
            "lengths": Ref(site.lengths) if site.lengths else None,
            "blocks": blocks,
            "order": order,
            "block_q": block,
            "block_k": block,
            "scale": node.args.get("scale"),
        } | ({"mean": mean} if mean else {})
        return Node(OP, args, (output,), node.source)


def places(site: Site) -> tuple[str, ...]:
    """What the heads of the site are called in plans."""
    return tuple(f"{site.name}#{head}" for head in range(site.heads))


@lru_cache(maxsize=4)
def _sites(graph: Graph, tokens: TokenLayout | None) -> tuple[Site, ...]:
    """The sites, which a search asks for once an option."""
    return sites(graph, tokens)


@lru_cache(maxsize=4096)
def _texts(option: str, layout: TokenLayout, block: int) -> tuple[str, str | None, float]:
    """The table of blocks, the order of tokens and the share of the mean of a pattern, as the operator takes them."""
    pattern = find_pattern(option)
    order = pattern.order(layout)
    return str(pattern.table(layout, block, block)), None if order is None else str(order), pattern.mean


def groups_of(options: Sequence[str]) -> list[list[int]]:
    """The heads of each pattern, by their first head; skipped ones last."""
    found: dict[str, list[int]] = {}
    for head, option in enumerate(options):
        found.setdefault(option, []).append(head)
    return [found[option] for option in sorted(found, key=lambda option: option == SKIP)]


def _operands(site: Site) -> dict[str, Arg]:
    return {"query": Ref(site.query), "key": Ref(site.key), "value": Ref(site.value)}


def _taken(
    node: Node, site: Site, number: int, heads: Sequence[int], graph: Graph
) -> tuple[list[Node], dict[str, Arg]]:
    """The calls that take the heads of a group out of query, key and value, and what they define."""
    index = Value(fresh(f"{node.name}.heads{number}", graph.values), TensorType("i64", (len(heads),)))
    made = [Node("intarsia.integers", {"runs": str(TokenOrder.of(heads))}, (index,), node.source)]
    operands: dict[str, Arg] = {}
    for role, arg in _operands(site).items():
        assert isinstance(arg, Ref)
        type_ = graph.type(arg.name)
        shape = (type_.shape[0], len(heads), *type_.shape[2:])
        value = Value(fresh(f"{node.name}.{role}{number}", graph.values), TensorType(type_.dtype, shape))
        args: dict[str, Arg] = {"self": arg, "dim": 1, "index": Ref(index.name)}
        made.append(Node("aten.index_select", args, (value,), node.source))
        operands[role] = Ref(value.name)
    return made, operands


def _joined(node: Node, parts: Sequence[Ref], heads: Sequence[int], graph: Graph) -> Iterator[Node]:
    """The calls that put the groups' results side by side, the heads back in their places, and tokens before heads.

    Tokens before heads in memory is how attention gives its result, and what a view behind it may count on.
    """
    joined = _like(f"{node.name}.joined", node, len(heads), graph)
    yield Node("aten.cat", {"tensors": tuple(parts), "dim": 1}, (joined,), node.source)
    inverse = sorted(range(len(heads)), key=heads.__getitem__)
    index = Value(fresh(f"{node.name}.places", graph.values), TensorType("i64", (len(heads),)))
    yield Node("intarsia.integers", {"runs": str(TokenOrder.of(inverse))}, (index,), node.source)
    placed = _like(f"{node.name}.placed", node, len(heads), graph)
    args: dict[str, Arg] = {"self": Ref(joined.name), "dim": 1, "index": Ref(index.name)}
    yield Node("aten.index_select", args, (placed,), node.source)
    batch, count, tokens, channels = node.type.shape
    turned = TensorType(node.type.dtype, (batch, tokens, count, channels))
    turn = Value(fresh(f"{node.name}.turned", graph.values), turned)
    rows = Value(fresh(f"{node.name}.rows", graph.values), turned)
    yield Node("aten.transpose.int", {"self": Ref(placed.name), "dim0": 1, "dim1": 2}, (turn,), node.source)
    yield Node("aten.contiguous", {"self": Ref(turn.name)}, (rows,), node.source)
    yield Node("aten.transpose.int", {"self": Ref(rows.name), "dim0": 1, "dim1": 2}, node.outputs, node.source)


def _like(name: str, node: Node, heads: int, graph: Graph) -> Value:
    batch, _, tokens, channels = node.type.shape
    return Value(fresh(name, graph.values), TensorType(node.type.dtype, (batch, heads, tokens, channels)))
