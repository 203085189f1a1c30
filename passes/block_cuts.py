"""Where the blocks of a video transformer begin and end: the residual stream, followed through the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.operators import DTYPES
from intarsia.passes.attention_sites import why_none
from intarsia.passes.token_axes import Segment, count
from intarsia.passes.token_flow import TokenAxes

SUMS = {"aten.add.Tensor": ("self", "other"), "intarsia.gated_residual": ("residual", "input")}
"""Calls that may be residual sums, and the operands of which one is the stream."""

CASTS = frozenset({"aten._to_copy", "aten.to.dtype", "aten.type_as"})
"""Calls that hand the stream on in another type."""

CARRIES = CASTS | {
    "aten.alias",
    "aten.cat",
    "aten.clone",
    "aten.dropout",
    "aten.slice.Tensor",
    "aten.split.Tensor",
    "aten.split_with_sizes",
}
"""Calls that hand the stream on: in another type, beside the text, or without it."""


@dataclass(frozen=True)
class BlockCuts:
    """The residual stream of a video transformer, by names of values over all video tokens and nothing else (B, N, D).

    Attributes:
        first: The stream before the first block.
        signal: What the first self-attention projects: the stream, normed and modulated by the time step.
        behind: The stream behind each block; the last ends what is between the embedding and the head.
    """

    first: str
    signal: str
    behind: tuple[str, ...]

    @property
    def last(self) -> str:
        """The stream behind the last block."""
        return self.behind[-1]

    @classmethod
    def of(cls, graph: Graph) -> BlockCuts:
        """Those of a traced graph.

        A block begins where the residual sum of a self-attention over the video's tokens takes the stream, and ends
        where the next one does. Text that has a stream of its own is none of this one.

        Raises:
            Unsupported: The graph has no self-attention over video tokens, or no residual stream goes around each.
        """
        return _Stream(graph).cuts()


class _Stream:
    """The residual sums of a graph, from the last to the first."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.axes = graph, TokenAxes(graph)
        self.calls = [node for node in graph.nodes if self._is_among_tokens(node)]
        if not self.calls:
            reason = why_none(graph) or f"no attention of {graph.name} is among tokens of its first input"
            raise Unsupported(f"step caching: {reason}")
        self.video = next(self._of_sample(self.calls[0].ref("query")))
        self.order = {value.name: number for number, node in enumerate(graph.nodes) for value in node.outputs}

    def cuts(self) -> BlockCuts:
        sums = [*self._sums()][::-1]
        if not sums:
            raise self._none("no sum of a value and what was computed from it is over the tokens of the video")
        skips = dict.fromkeys(self._skip_of(call.name, sums) for call in self.calls)
        first, *streams = self._alike([self._video(skip) for skip in skips])
        last = self._handed_on(sums[-1][0], like=first)
        return BlockCuts(first, self._signal(first, self.calls[0].ref("query")), (*streams, last))

    def _sums(self) -> Iterator[tuple[str, str]]:
        """Residual sums along one stream, the last first, and the value that each adds to, the skip."""
        ends = (node for node in reversed(self.graph.nodes) if self._skip(node) is not None)
        node = next(ends, None)
        while node is not None:
            if (skip := self._skip(node)) is not None:
                yield node.name, skip
            name = skip or self._carried(node)
            node = self.graph.producers.get(name) if name else None

    def _skip(self, node: Node) -> str | None:
        """Of a residual sum over the tokens, the operand from which the other was computed."""
        left, right = (node.args.get(operand) for operand in SUMS.get(node.op, ("", "")))
        if not isinstance(left, Ref) or not isinstance(right, Ref) or left == right:
            return None
        if not self._is_stream(node.name) or not (self.axes.is_tensor(left.name) and self.axes.is_tensor(right.name)):
            return None
        for skip, branch in ((left.name, right.name), (right.name, left.name)):
            alike = self.axes.shape(skip) == self.axes.shape(branch) == self.axes.shape(node.name)
            if alike and self._leads(self._origin(skip), branch):
                return skip
        return None

    def _is_among_tokens(self, node: Node) -> bool:
        """Whether the call is self-attention (B, H, S, D) over tokens of the sample."""
        if not node.args.keys() >= {"query", "key", "value"}:
            return False
        query, key = node.ref("query"), node.ref("key")
        same = len(self.axes.shape(query)) == 4 and self.axes.of(query)[2] == self.axes.of(key)[2]
        return same and any(self._of_sample(query))

    def _of_sample(self, query: str) -> Iterator[_Tokens]:
        """What the tokens of queries are, where they are of the first input's places."""
        for segment in self.axes.of(query)[2]:
            found = _tokens(segment)
            if {source for source, _ in found[1]} == {self.graph.inputs[0].name}:
                yield found

    def _skip_of(self, attention: str, sums: list[tuple[str, str]]) -> str:
        """The value that the first residual sum behind an attention adds to."""
        for name, skip in sums:
            if self._leads(attention, name):
                if self._leads(attention, skip):
                    raise self._none(f"the sums that end in %{sums[-1][0]} begin at %{skip}, behind %{attention}")
                return skip
        raise self._none(f"nothing is added behind %{attention}")

    def _video(self, name: str) -> str:
        """The stream of the video alone, where ``name`` may have text beside it."""
        while self._is_stream(name) and not self._is_alone(name):
            before = self._carried(self.graph.producers[name]) if name in self.graph.producers else None
            if before is None:
                raise self._none(f"%{name} has text beside the video, and no value has the video alone")
            name = before
        return name

    def _alike(self, streams: list[str]) -> list[str]:
        """The stream before each block in one type: that from which it is cast to be summed up, or that of the sums."""
        made = [self.graph.producers.get(name) for name in streams]
        sources = [
            node.ref("self") if node and node.op in CASTS else name for name, node in zip(streams, made, strict=True)
        ]
        for names in (sources, streams):
            if len({self.graph.type(name) for name in names}) == 1:
                return names
        raise self._none(f"%{streams[0]}, %{streams[-1]} and what is between them are not of one type")

    def _handed_on(self, name: str, *, like: str) -> str:
        """The value behind the last residual sum that has the tokens of the video alone, in the type of the stream."""
        while self.graph.type(name) != self.graph.type(like) or not self._is_alone(name):
            behind = [
                value.name
                for node in self.graph.users.get(name, ())
                for value in node.outputs
                if self._carried(node) == name and self._is_stream(value.name)
            ]
            if len(behind) != 1:
                raise self._none(f"behind %{name} no one value is the video's, of the type of %{like}")
            name = behind[0]
        return name

    def _signal(self, first: str, query: str) -> str:
        """The last value between the stream and an attention before the first product with weights."""
        found, reached = first, {first}
        for node in self.graph.nodes[self.order.get(first, -1) + 1 : self.order[query] + 1]:
            if not reached.intersection(node.inputs) or self._multiplies(node):
                continue
            reached.update(value.name for value in node.outputs)
            if self._is_like(node.name, first) and self._leads(node.name, query):
                found = node.name
        return found

    def _is_like(self, name: str, first: str) -> bool:
        """Whether the value is the video's, of real numbers, as large as the stream; codes of few bits are not."""
        if not self._is_alone(name) or self.axes.shape(name) != self.axes.shape(first):
            return False
        return DTYPES[self.graph.type(name).dtype].is_floating_point

    def _multiplies(self, node: Node) -> bool:
        """Whether the call takes a matrix that no input tells, a weight or what was made of one."""
        shapes = [self.axes.shape(name) for name in node.inputs if name in self.weights and self.axes.is_tensor(name)]
        return any(sum(extent != 1 for extent in shape) > 1 for shape in shapes)

    @cached_property
    def weights(self) -> frozenset[str]:
        """Parameters, and values that follow from them alone."""
        found = {param.name for param in self.graph.params}
        for node in self.graph.nodes:
            if found.issuperset(node.inputs):
                found.update(value.name for value in node.outputs)
        return frozenset(found)

    def _carried(self, node: Node) -> str | None:
        """The value with tokens that a call hands on; None where it does more."""
        if node.op not in CARRIES:
            return None
        given = (node.ref("self"),) if "self" in node.args else node.inputs
        names = [name for name in given if self._is_stream(name)]
        return names[0] if len(names) == 1 else None

    def _origin(self, name: str) -> str:
        """The value that was handed on as ``name``."""
        while name in self.graph.producers and (before := self._carried(self.graph.producers[name])):
            name = before
        return name

    def _is_stream(self, name: str) -> bool:
        """Whether the value is (B, S, D), the video's tokens along S, maybe others beside them."""
        axes = self.axes.of(name) if self.axes.is_tensor(name) else ()
        return len(axes) == 3 and any(_tokens(segment) == self.video for segment in axes[1])

    def _is_alone(self, name: str) -> bool:
        """Whether it is (B, N, D), the video's tokens along N and no others."""
        return self._is_stream(name) and self.axes.shape(name)[1] == self.video[0]

    def _leads(self, source: str, name: str) -> bool:
        """Whether ``name`` is, or is computed from, ``source``."""
        first, open_, seen = self.order.get(source, -1), [name], {name}
        while open_:
            name = open_.pop()
            if name == source:
                return True
            node = self.graph.producers.get(name)
            new = {used for used in (node.inputs if node else ()) if self.order.get(used, -1) >= first} - seen
            seen |= new
            open_ += new
        return False

    def _none(self, reason: str) -> Unsupported:
        return Unsupported(
            f"{self.graph.name}: no residual stream: {reason}; caching steps needs one around its blocks"
        )


_Tokens = tuple[int, frozenset[tuple[str, int]]]
"""How many there are, and along which axes of which values they lie."""


def _tokens(segment: Segment) -> _Tokens:
    return count(segment), frozenset((factor.source, factor.axis) for factor in segment)
