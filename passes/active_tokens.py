"""Compute a step of a video transformer for the active tokens only; the others are seen through caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused, fresh, renamed
from intarsia.ir.sizes import Size
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.active_caches import LARGEST, Caches
from intarsia.passes.active_inputs import ACTIVE, StepInputs
from intarsia.passes.active_rules import by_rows, pieces
from intarsia.passes.active_sparse import SparseRows
from intarsia.passes.active_tape import Tape
from intarsia.passes.attention_sites import DENSE, SPARSE, Site
from intarsia.passes.base import Pass
from intarsia.passes.fuse_attention import OP as FUSED
from intarsia.passes.token_places import Place, TokenPlaces

CACHES = ("held", "linear")


@dataclass(frozen=True)
class ActiveTokens(Pass):
    """Rewrite a denoiser into one that computes the active tokens of the video, and sees the others through caches.

        input %hidden_states: f32[2, 3, 8, 32, 32]
        %k: f32[2, 4, 512, 32] = ...
        %y: f32[2, 4, 512, 32] = aten.scaled_dot_product_attention(query=%q, key=%k, value=%v)
        return %velocity

    becomes

        input %hidden_states: f32[2, 3, 8, 32, 32]
        input %active: i64[active]                           which tokens, in rising order, each once
        input %k.cache: f32[2, 4, 512, 32]
        %k: f32[2, 4, active, 32] = ...                      all that leads here is computed for active tokens only
        %k.next: f32[2, 4, 512, 32] = aten.index_copy(self=%k.cache, dim=2, index=%active, source=%k)
        %y: f32[2, 4, active, 32] = aten.scaled_dot_product_attention(query=%q, key=%k.next, value=%v.next)
        return %velocity, %k.next, %v.next, ...

    The tokens that are not active keep what they had in the caches: the keys and values of every self-attention, and
    the last value before the tokens are put back into a video, so that the velocity is whole. Text beside the video
    is computed at every step. With all tokens active it is the dense step.
    Inputs behind ``%active`` are caches; as many outputs at the end are what they hold after the step.

    With ``caches="linear"`` keys and values of tokens that are not active move on as they moved before: beside each
    cache there is one for its slope over the noise level, and ``%elapsed`` and ``%rate`` say how far to go.

    With ``cache_dtype="i8"`` or ``"f8e4m3"`` caches of keys and values, and of their slopes, are stored in eight bits,
    with a scale for each token and head. Attention reads them in the model's own type, and active tokens as they were
    computed; so the dense step stays what it is.

    With an allocation of one group nothing is rewritten: its steps compute all tokens or none.

    The loop fills active tokens up to one of ``buckets`` counts, evenly spread up to all tokens, by giving the last of
    them again: for engines that are prepared for few sizes. 0 leaves their number as it is.

    Behind ``sparse-attention`` and ``fuse-heads`` each head keeps its pattern, as rows of a mask: active queries of a
    thinned head cost what those of a dense one do.

    Source: Chu and Patel, Heterogeneous Step Allocation, 2026 (KV-cache synchronization, cached velocity); the paper
    gives no rewriting, and its caches are held: the rewriting and what moves caches along are ours.
    """

    caches: str = "held"
    cache_dtype: str = ""
    allocation: str = ""
    buckets: int = 0

    name: ClassVar[str] = "active-tokens"

    def __post_init__(self) -> None:
        if self.caches not in CACHES:
            raise ValueError(f"caches is {self.caches!r}; it is {' or '.join(CACHES)}")
        if self.cache_dtype and self.cache_dtype not in LARGEST:
            raise ValueError(
                f"cache_dtype is {self.cache_dtype!r}; it is {' or '.join(LARGEST)}, or left out for the model's own"
            )
        if self.buckets < 0:
            raise ValueError(f"buckets is {self.buckets}; it is how many counts of tokens there are, or 0 for any")
        if self.allocation:
            Allocation.parse(self.allocation)

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """Every attention, for none of which there is a choice: where its tokens lie, or why it is no self-attention.

        Of a graph that the pass cannot take, the reason why.
        """
        try:
            self.run(graph, target, {})
        except Unsupported as error:
            return {graph.name: str(error)}
        places = TokenPlaces(graph)
        return {name: f"no choice: {_told(found, places)}" for name, found in places.attention.items()}

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with active tokens and caches; itself if it has them, or if steps compute all tokens or none.

        Raises:
            Unsupported: The graph has no self-attention over video tokens, or something in it mixes tokens otherwise.
        """
        if StepInputs.of(graph) or (self.allocation and Allocation.parse(self.allocation).is_whole):
            return graph
        return _Rewriting(graph, TokenPlaces(graph), linear=self.caches == "linear", dtype=self.cache_dtype).graph()


def _told(found: Site | str, places: TokenPlaces) -> str:
    """What becomes of an attention."""
    if isinstance(found, str):
        return f"active queries; {found}"
    layout, place = found.layout, places.of(found.query)
    assert place is not None
    beside = f", {place.others} others beside them" if place.others else ""
    extents = f"{layout.frames} x {layout.height} x {layout.width}"
    return f"{places.count:,} tokens ({extents}) on axis {place.dim} of its queries{beside}; keys and values cached"


class _Rewriting:
    """The graph as it grows.

    A value that lies in ``now`` has the active tokens only, under the name that stands there. Its other tokens are
    what ``_whole`` finds: the value as it was, where it does not depend on attention, and its cache otherwise.
    """

    def __init__(self, graph: Graph, places: TokenPlaces, *, linear: bool, dtype: str) -> None:
        self.before, self.places = graph, places
        size = fresh(ACTIVE, {size.name for size in graph.sizes})
        self.tape = Tape(graph.values, active=ACTIVE, size=size, tokens=places.count)
        self.caches = Caches(self.tape, linear=linear, dtype=dtype)
        self.sparse = SparseRows(self.tape)
        self.now: dict[str, str] = {}
        self.whole: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        self.selected: dict[tuple[str, Place], str] = {}
        self.attended: set[str] = set()
        self.mixed: dict[str, str] = {}

    def graph(self) -> Graph:
        before, tape, caches = self.before, self.tape, self.caches
        for node in before.nodes:
            if _attends(node) and node.op not in (DENSE, FUSED, SPARSE):
                raise Unsupported(
                    f"step allocation: %{node.name} is {node.op}, whose queries cannot be left out; of what changes "
                    "attention only sparse-attention and fuse-heads go before it"
                )
        for node in before.nodes:
            self._take(node)
        outputs = tuple(self._whole(name) for name in before.outputs)
        active = Value(ACTIVE, TensorType("i64", (tape.size,)))
        made = replace(
            before,
            inputs=(*before.inputs, active, *caches.clock, *caches.inputs),
            nodes=tuple(tape.nodes),
            outputs=(*outputs, *caches.after),
            sizes=(*before.sizes, Size(tape.size, 1, self.places.count)),
        )
        return drop_unused(made)

    def _take(self, node: Node) -> None:
        """Put the call on active tokens where it has tokens, and as it is where it has none."""
        known = {name: place for name in node.inputs if (place := self.places.of(name))}
        if any(name in self.attended for name in node.inputs):
            self.attended.update(value.name for value in node.outputs)
        told = known | {value.name: place for value in node.outputs if (place := self.places.of(value.name))}
        if _attends(node) and (known or any(name in self.mixed for name in node.inputs)):
            self._attention(node)
        elif not known:
            self._as_it_is(node)
        elif cut := pieces(node, self.before, told):
            for one in cut:
                self._put(one, {name: self._rows(name, known[name]) for name in known})
        elif row := by_rows(node, self.before, told):
            args, needed = row
            self._put(replace(node, args=args), {name: self._rows(name, place) for name, place in needed.items()})
        else:
            self._as_it_is(node)

    def _as_it_is(self, node: Node) -> None:
        """The call on whole values; what it makes of tokens that attention has seen must not come back to attention."""
        names = {name: self._whole(name) for name in node.inputs}
        tokens = any(names[name] != name and name in self.attended for name in node.inputs)
        reason = next((self.mixed[name] for name in node.inputs if name in self.mixed), None)
        if tokens and reason is None:
            reason = f"%{node.name} ({node.op}) mixes tokens or moves them to other axes"
        if reason is not None:
            self.mixed.update((value.name, reason) for value in node.outputs)
        self.tape.nodes.append(_using(node, names))

    def _put(self, node: Node, names: dict[str, str]) -> None:
        """The call on active tokens, its results typed so."""
        self._refuse_mixed(node)
        outputs = tuple(self._restricted(value) for value in node.outputs)
        self.tape.nodes.append(replace(_using(node, names), outputs=outputs))
        self.now.update((value.name, value.name) for value in outputs)

    def _restricted(self, value: Value) -> Value:
        place = self.places.of(value.name)
        if place is None or not isinstance(value.type, TensorType):
            return value
        return Value(value.name, self.tape.few(value.type, place))

    def _attention(self, node: Node) -> None:
        """Active queries; keys and values of all tokens, those of active ones written into the cache."""
        if node.args.get("is_causal"):
            raise Unsupported(
                f"step allocation: %{node.name} is causal, and active queries are not all that come before"
            )
        self._refuse_mixed(node)
        self.attended.update(value.name for value in node.outputs)
        names = {}
        query = node.ref("query")
        if place := self.places.of(query):
            names[query] = self._rows(query, place)
        for key in ("key", "value"):
            name = node.ref(key)
            if self.places.of(name):
                names[name] = self._seen(name)
        if isinstance(mask := node.args.get("attn_mask"), Ref):
            names[mask.name] = self._mask(mask.name, place)
        if node.op == SPARSE and place:
            node = self.sparse.dense(node, self.places.shape(query)[2], place)
        self._put(node, names)

    def _mask(self, name: str, place: Place | None) -> str:
        """The mask's rows of active queries; its columns stay those of all keys."""
        rows = len(self.before.type(name).shape) - 2
        if place is None or rows < 0 or self.places.shape(name)[rows] == 1:
            return self._whole(name)
        return self._selected(self._whole(name), replace(place, dim=rows), name)

    def _refuse_mixed(self, node: Node) -> None:
        for name in node.inputs:
            if name in self.mixed:
                raise Unsupported(
                    f"step allocation: {self.mixed[name]}, and %{node.name} reads that: with some tokens left out the "
                    "result would be another; only what stands behind the last block may mix tokens"
                )

    def _rows(self, name: str, place: Place) -> str:
        """The value with its active tokens only."""
        if name in self.now:
            return self.now[name]
        if name in self.attended or name in self.mixed:
            raise Unsupported(f"step allocation: where the tokens of %{name} lie is not known; {_WHAT_TO_DO}")
        return self._selected(name, place, name)

    def _selected(self, source: str, place: Place, name: str) -> str:
        """The active tokens of a value that is whole under the name ``source``."""
        if (name, place) not in self.selected:
            self.selected[name, place] = self.tape.select(source, self.before.type(name), place, name=name)
        return self.selected[name, place]

    def _whole(self, name: str) -> str:
        """The value with all tokens: as it was, or from its cache where attention came before."""
        if name in self.whole or name not in self.now or self.places.of(name) is None:
            return self.whole.get(name, name)
        if name in self.attended:
            self.whole[name] = self._synchronized(name, self.caches.held)
        else:
            self._again(name)
        return self.whole[name]

    def _seen(self, name: str) -> str:
        """Keys or values of all tokens, from their cache."""
        if name not in self.seen:
            self.seen[name] = self._synchronized(name, self.caches.seen)
        return self.seen[name]

    def _synchronized(self, name: str, through: Callable[[str, str, TensorType, Place], str]) -> str:
        """A value of all tokens whose active ones are computed, and whose others come from a cache."""
        place = self.places.of(name)
        assert place is not None
        return through(name, self._rows(name, place), self.before.type(name), place)

    def _again(self, name: str) -> None:
        """The value of all tokens, computed a second time: no attention comes before it."""
        node = self.before.producers[name]
        names = {used: self._whole(used) for used in node.inputs}
        outputs = tuple(replace(value, name=self.tape.free(f"{value.name}.whole")) for value in node.outputs)
        self.tape.nodes.append(replace(_using(node, names), outputs=outputs))
        self.whole.update((old.name, new.name) for old, new in zip(node.outputs, outputs, strict=True))


_WHAT_TO_DO = "explain --pass active-tokens lists where they do"


def _attends(node: Node) -> bool:
    return node.args.keys() >= {"query", "key", "value"}


def _using(node: Node, names: dict[str, str]) -> Node:
    if all(name == now for name, now in names.items()):
        return node
    return replace(node, args={key: renamed(arg, names) for key, arg in node.args.items()})
