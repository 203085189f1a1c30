"""Compute a step of a video transformer for the active tokens only; the others are seen through caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Arg, Graph, Node, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import drop_unused, fresh, renamed
from intarsia.ir.sizes import Size
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.active_rules import by_rows, pieces
from intarsia.passes.attention_sites import DENSE
from intarsia.passes.base import Pass
from intarsia.passes.fuse_attention import OP as FUSED
from intarsia.passes.token_places import Place, TokenPlaces, restricted

ACTIVE = "active"
"""The input that tells which tokens are active, and the named size that counts them."""

ELAPSED, RATE = "elapsed", "rate"
"""The inputs of a step that moves caches along: the noise level less that of the last step (1), and for each token
one over the noise level less that at which it was last active (N), 0 where it never was."""

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

    Source: Chu and Patel, Heterogeneous Step Allocation, 2026 (KV-cache synchronization, cached velocity); the paper
    gives no rewriting, and its caches are held: the rewriting and what moves caches along are ours.
    """

    caches: str = "held"
    allocation: str = ""

    name: ClassVar[str] = "active-tokens"

    def __post_init__(self) -> None:
        if self.caches not in CACHES:
            raise ValueError(f"caches is {self.caches!r}; it is {' or '.join(CACHES)}")
        if self.allocation:
            Allocation.parse(self.allocation)

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph with active tokens and caches; itself if it has them.

        Raises:
            Unsupported: The graph has no self-attention over video tokens, or something in it mixes tokens otherwise.
        """
        if any(value.name == ACTIVE for value in graph.inputs):
            return graph
        return _Rewriting(graph, TokenPlaces(graph), linear=self.caches == "linear").graph()


class _Rewriting:
    """The graph as it grows.

    A value that lies in ``now`` has the active tokens only, under the name that stands there. Its other tokens are
    what ``_whole`` finds: the value as it was, where it does not depend on attention, and its cache otherwise.
    """

    def __init__(self, graph: Graph, places: TokenPlaces, *, linear: bool) -> None:
        self.before, self.places, self.linear = graph, places, linear
        self.taken = set(graph.values)
        self.size = fresh(ACTIVE, {size.name for size in graph.sizes})
        self.active = Value(ACTIVE, TensorType("i64", (self.size,)))
        self.clock = (Value(ELAPSED, TensorType("f32", (1,))), Value(RATE, TensorType("f32", (places.count,))))
        self.nodes: list[Node] = []
        self.now: dict[str, str] = {}
        self.whole: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        self.rates: dict[tuple[Place, TensorType], str] = {}
        self.caches: list[Value] = []
        self.next: list[str] = []
        self.fresh_rows: dict[tuple[str, Place], str] = {}
        self.indices: dict[tuple[int, int], str] = {(0, 0): ACTIVE}
        self.attended: set[str] = set()
        self.mixed: dict[str, str] = {}

    def graph(self) -> Graph:
        before = self.before
        for node in before.nodes:
            self._take(node)
        outputs = tuple(self._whole(name) for name in before.outputs)
        size = Size(self.size, 1, self.places.count)
        inputs = (*before.inputs, self.active, *(self.clock if self.linear else ()), *self.caches)
        made = replace(
            before, inputs=inputs, nodes=tuple(self.nodes), outputs=(*outputs, *self.next), sizes=(*before.sizes, size)
        )
        return drop_unused(made)

    def _take(self, node: Node) -> None:
        """Put the call on active tokens where it has tokens, and as it is where it has none."""
        known = {name: place for name in node.inputs if (place := self.places.of(name))}
        if any(name in self.attended for name in node.inputs):
            self.attended.update(value.name for value in node.outputs)
        told = known | {value.name: place for value in node.outputs if (place := self.places.of(value.name))}
        if node.args.keys() >= {"query", "key", "value"} and known:
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
        self.nodes.append(_using(node, names))

    def _put(self, node: Node, names: dict[str, str]) -> None:
        """The call on active tokens, its results typed so."""
        self._refuse_mixed(node)
        outputs = tuple(self._restricted(value) for value in node.outputs)
        self.nodes.append(replace(_using(node, names), outputs=outputs))
        self.now.update((value.name, value.name) for value in outputs)

    def _restricted(self, value: Value) -> Value:
        place = self.places.of(value.name)
        if place is None or not isinstance(value.type, TensorType):
            return value
        return Value(value.name, replace(value.type, shape=restricted(value.type.shape, place, self.size)))

    def _attention(self, node: Node) -> None:
        """Active queries; keys and values of all tokens, those of active ones written into the cache."""
        if node.op not in (DENSE, FUSED):
            raise Unsupported(
                f"step allocation: %{node.name} is {node.op}; it goes before passes that change attention"
            )
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
        self._put(node, names)

    def _mask(self, name: str, place: Place | None) -> str:
        """The mask's rows of active queries; its columns stay those of all keys."""
        rows = len(self.before.type(name).shape) - 2
        if place is None or rows < 0 or self.places.shape(name)[rows] == 1:
            return self._whole(name)
        return self._selected(self._whole(name), replace(place, dim=rows), self.before.type(name), name)

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
        return self._selected(name, place, self.before.type(name), name)

    def _selected(self, source: str, place: Place, type_: TensorType, name: str) -> str:
        """The active tokens of a value that is whole."""
        if (name, place) not in self.fresh_rows:
            made = replace(type_, shape=restricted(type_.shape, place, self.size))
            args: dict[str, Arg] = {"self": Ref(source), "dim": place.dim, "index": Ref(self._index(place))}
            self.fresh_rows[name, place] = self._new("aten.index_select", f"{name}.active", made, args)
        return self.fresh_rows[name, place]

    def _whole(self, name: str) -> str:
        """The value with all tokens: as it was, or from its cache where attention came before."""
        if name in self.whole or name not in self.now or self.places.of(name) is None:
            return self.whole.get(name, name)
        self.whole[name] = self._synchronized(name) if name in self.attended else self._again(name)
        return self.whole[name]

    def _seen(self, name: str) -> str:
        """Keys or values of all tokens, from their cache."""
        if name not in self.seen:
            self.seen[name] = self._synchronized(name, moving=self.linear)
        return self.seen[name]

    def _synchronized(self, name: str, *, moving: bool = False) -> str:
        """The cache of a value with its active tokens written into it; the others as they were, or moved along."""
        place, type_ = self._place(name), self.before.type(name)
        rows, index = self._rows(name, place), self._index(place)
        cache = self._cache(f"{name}.cache", type_)
        where: dict[str, Arg] = {"dim": place.dim, "index": Ref(index)}
        if not moving:
            return self._next(f"{name}.next", type_, {"self": Ref(cache), **where, "source": Ref(rows)})
        slope = self._cache(f"{name}.slope", type_)
        step = self._new(
            "aten.mul.Tensor", f"{name}.step", type_, {"self": Ref(slope), "other": Ref(self._as(ELAPSED, type_))}
        )
        moved = self._new("aten.add.Tensor", f"{name}.moved", type_, {"self": Ref(cache), "other": Ref(step)})
        whole = self._next(f"{name}.next", type_, {"self": Ref(moved), **where, "source": Ref(rows)})
        learnt = self._learnt(name, rows, moved, slope)
        self._next(f"{name}.slope.next", type_, {"self": Ref(slope), **where, "source": Ref(learnt)})
        return whole

    def _learnt(self, name: str, rows: str, moved: str, slope: str) -> str:
        """The slopes of active tokens: what they were, and what they missed over the way since."""
        place, type_ = self._place(name), self.before.type(name)
        few = replace(type_, shape=restricted(type_.shape, place, self.size))
        taken = {key: self._few(key, few, place) for key in (moved, slope)}
        missed = self._new("aten.sub.Tensor", f"{name}.missed", few, {"self": Ref(rows), "other": Ref(taken[moved])})
        rate = self._rate(place, type_)
        turn = self._new("aten.mul.Tensor", f"{name}.turn", few, {"self": Ref(missed), "other": Ref(rate)})
        return self._new("aten.add.Tensor", f"{name}.learnt", few, {"self": Ref(taken[slope]), "other": Ref(turn)})

    def _few(self, name: str, type_: TensorType, place: Place) -> str:
        args: dict[str, Arg] = {"self": Ref(name), "dim": place.dim, "index": Ref(self._index(place))}
        return self._new("aten.index_select", f"{name}.active", type_, args)

    def _rate(self, place: Place, type_: TensorType) -> str:
        """The rate of active tokens, 0 for all beside the video, shaped to stand at ``place``."""
        key = (place, type_)
        if key not in self.rates:
            total = self.places.count + place.others
            behind = len(type_.shape) - 1 - place.dim
            padded = RATE
            if place.others:
                zeros = [self._zeros(count) for count in (place.before, place.after) if count]
                parts = (zeros[:1] if place.before else []) + [RATE] + (zeros[-1:] if place.after else [])
                joined: dict[str, Arg] = {"tensors": tuple(map(Ref, parts)), "dim": 0}
                padded = self._new("aten.cat", f"{RATE}.tokens", TensorType("f32", (total,)), joined)
            few = TensorType("f32", restricted((total,), replace(place, dim=0), self.size))
            taken = self._few(padded, few, replace(place, dim=0))
            shape = (*few.shape, *(1,) * behind)
            args: dict[str, Arg] = {"self": Ref(taken), "size": (-1, *(1,) * behind)}
            made = self._new("aten.view", f"{RATE}.shaped", TensorType("f32", shape), args)
            self.rates[key] = self._as(made, type_)
        return self.rates[key]

    def _zeros(self, count: int) -> str:
        args: dict[str, Arg] = {"size": (count,), "dtype": Symbol("torch.float32")}
        return self._new("aten.zeros", f"{RATE}.text", TensorType("f32", (count,)), args)

    def _as(self, name: str, like: TensorType) -> str:
        """A number of the clock in the element type of a cache."""
        if like.dtype == "f32":
            return name
        found = next((node for node in self.nodes if node.name == name), None)
        type_ = found.type if found else TensorType("f32", (1,))
        args: dict[str, Arg] = {"self": Ref(name), "dtype": Symbol(str(DTYPES[like.dtype]))}
        return self._new("aten._to_copy", f"{name}.{like.dtype}", replace(type_, dtype=like.dtype), args)

    def _cache(self, name: str, type_: TensorType) -> str:
        self.caches.append(Value(self._free(name), type_))
        return self.caches[-1].name

    def _next(self, name: str, type_: TensorType, args: dict[str, Arg]) -> str:
        self.next.append(self._new("aten.index_copy", name, type_, args))
        return self.next[-1]

    def _again(self, name: str) -> str:
        """The value of all tokens, computed a second time: no attention comes before it."""
        node = self.before.producers[name]
        names = {used: self._whole(used) for used in node.inputs}
        outputs = tuple(replace(value, name=self._free(f"{value.name}.whole")) for value in node.outputs)
        self.nodes.append(replace(_using(node, names), outputs=outputs))
        self.whole.update((old.name, new.name) for old, new in zip(node.outputs, outputs, strict=True))
        return self.whole[name]

    def _place(self, name: str) -> Place:
        place = self.places.of(name)
        assert place is not None
        return place

    def _index(self, place: Place) -> str:
        """Which places of an axis are computed: the active tokens of the video, and all others."""
        key = (place.before, place.after)
        if key not in self.indices:
            total = self.places.count + place.others
            parts = [self._range(0, place.before)] if place.before else []
            shift: dict[str, Arg] = {"self": Ref(ACTIVE), "other": place.before}
            video = self._new("aten.add.Tensor", f"{ACTIVE}.{place.before}", self.active.type, shift)
            parts.append(video if place.before else ACTIVE)
            parts += [self._range(total - place.after, total)] if place.after else []
            joined: dict[str, Arg] = {"tensors": tuple(map(Ref, parts)), "dim": 0}
            type_ = TensorType("i64", (f"{self.size} + {place.others}",))
            self.indices[key] = self._new("aten.cat", f"{ACTIVE}.tokens", type_, joined)
        return self.indices[key]

    def _range(self, first: int, last: int) -> str:
        args: dict[str, Arg] = {"start": first, "end": last, "dtype": Symbol("torch.int64")}
        return self._new("aten.arange.start", f"{ACTIVE}.text", TensorType("i64", (last - first,)), args)

    def _new(self, op: str, name: str, type_: object, args: dict[str, Arg]) -> str:
        assert isinstance(type_, TensorType)
        value = Value(self._free(name), type_)
        self.nodes.append(Node(op, args, (value,)))
        return value.name

    def _free(self, name: str) -> str:
        free = fresh(name, self.taken)
        self.taken.add(free)
        return free


_WHAT_TO_DO = "explain --pass active-tokens lists where they do"


def _using(node: Node, names: dict[str, str]) -> Node:
    if all(name == now for name, now in names.items()):
        return node
    return replace(node, args={key: renamed(arg, names) for key, arg in node.args.items()})
