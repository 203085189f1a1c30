"""A graph of active tokens as it grows: its calls, names that are free, and where the active tokens of an axis lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from intarsia.ir.graph import Arg, Node, Ref, Symbol, Value
from intarsia.ir.operators import DTYPES
from intarsia.ir.rewrite import fresh
from intarsia.ir.types import TensorType
from intarsia.passes.token_places import Place, restricted


class Tape:
    """Calls in order, each on values that stand before it.

    Args:
        taken: Names that are in use.
        active: The input that tells which tokens are active: i64 (A).
        size: The named size A.
        tokens: N, the tokens of the video.
    """

    def __init__(self, taken: Iterable[str], *, active: str, size: str, tokens: int) -> None:
        self.active, self.size, self.tokens = active, size, tokens
        self.nodes: list[Node] = []
        self._names = set(taken)
        self._indices: dict[tuple[int, int], str] = {(0, 0): active}

    def free(self, name: str) -> str:
        """``name``, made longer where that is in use; in use from now on."""
        found = fresh(name, self._names)
        self._names.add(found)
        return found

    def call(self, op: str, name: str, type_: TensorType, /, **args: Arg) -> str:
        """The result of a call that is put behind the others."""
        value = Value(self.free(name), type_)
        self.nodes.append(Node(op, args, (value,)))
        return value.name

    def cast(self, name: str, source: TensorType, dtype: str) -> str:
        """The value in another element type; itself if it has it."""
        if source.dtype == dtype:
            return name
        made = replace(source, dtype=dtype)
        return self.call("aten._to_copy", f"{name}.{dtype}", made, self=Ref(name), dtype=Symbol(str(DTYPES[dtype])))

    def few(self, type_: TensorType, place: Place) -> TensorType:
        """The type of a value that has lost the tokens which are not active."""
        return replace(type_, shape=restricted(type_.shape, place, self.size))

    def select(self, whole: str, type_: TensorType, place: Place, *, name: str = "") -> str:
        """The active tokens of a whole value of this type, and all tokens beside the video."""
        args: dict[str, Arg] = {"self": Ref(whole), "dim": place.dim, "index": Ref(self.index(place))}
        return self.call("aten.index_select", f"{name or whole}.active", self.few(type_, place), **args)

    def write(self, rows: str, whole: str, type_: TensorType, place: Place, *, name: str) -> str:
        """A whole value of this type with rows of the active tokens written into it."""
        where: dict[str, Arg] = {"dim": place.dim, "index": Ref(self.index(place))}
        return self.call("aten.index_copy", name, type_, self=Ref(whole), **where, source=Ref(rows))

    def index(self, place: Place) -> str:
        """Which places of an axis are computed: the active tokens of the video, and all others."""
        key = (place.before, place.after)
        if key not in self._indices:
            total = self.tokens + place.others
            parts = [self._range(0, place.before)] if place.before else []
            parts.append(self._shifted(place.before) if place.before else self.active)
            parts += [self._range(total - place.after, total)] if place.after else []
            type_ = TensorType("i64", (f"{self.size} + {place.others}",))
            joined = tuple(map(Ref, parts))
            self._indices[key] = self.call("aten.cat", f"{self.active}.tokens", type_, tensors=joined, dim=0)
        return self._indices[key]

    def _shifted(self, before: int) -> str:
        type_ = TensorType("i64", (self.size,))
        return self.call("aten.add.Tensor", f"{self.active}.{before}", type_, self=Ref(self.active), other=before)

    def _range(self, first: int, last: int) -> str:
        type_, dtype = TensorType("i64", (last - first,)), Symbol("torch.int64")
        return self.call("aten.arange.start", f"{self.active}.text", type_, start=first, end=last, dtype=dtype)
