"""What the caches of step allocation take in memory, known before anything runs, and whether a machine has room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Ref, Value
from intarsia.ir.sizes import evaluate
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.passes.active_inputs import StepInputs
from intarsia.passes.active_tokens import CACHES, ActiveTokens
from intarsia.search.work import weight_bytes

EIGHT = "8 bits"
"""How keys and values are stored with ``cache_dtype`` of i8 or f8e4m3: a byte a number, and an f32 a token and head."""

WITHOUT_LIMIT = 1 << 62
"""Bytes from which a target's memory is no bound."""


@dataclass(frozen=True)
class CacheRow:
    """Caches of one kind.

    Attributes:
        caches: ``held`` or ``linear``.
        dtype: The element type of keys and values, or ``8 bits``.
        bytes: Of one row of the batch, which is one guidance branch.
        branches: How many branches find room beside the weights; None without a machine, or on one without limit.
    """

    caches: str
    dtype: str
    bytes: int
    branches: int | None


def cache_table(
    graph: Graph, target: Target | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[CacheRow, ...]:
    """What caches of every kind would take for a video transformer; activations come on top.

    Raises:
        Unsupported: The pass ``active-tokens`` cannot take the graph; the reason is its own.
    """
    made = ActiveTokens().run(graph, _no_machine(), {})
    seen = set(_read_by_attention(made))
    kept, rest = [], 0
    for cache, after in zip(caches_of(made), made.outputs[-len(caches_of(made)) :], strict=True):
        assert isinstance(cache.type, TensorType)
        if after in seen:
            kept.append(cache.type)
        else:
            rest += cache.type.bytes(sizes)
    rows = evaluate(kept[0].shape[0], sizes or {})
    free = _free(graph, target, sizes)
    own = sum(type_.bytes(sizes) for type_ in kept)
    narrow = sum(type_.elements(sizes) + 4 * type_.elements(sizes) // evaluate(type_.shape[-1], {}) for type_ in kept)
    found = []
    for caches in CACHES:
        for dtype, bytes_ in ((kept[0].dtype, own), (EIGHT, narrow)):
            branch = (bytes_ * (2 if caches == "linear" else 1) + rest) // rows
            found.append(CacheRow(caches, dtype, branch, None if free is None else max(0, free // branch)))
    return tuple(found)


def caches_of(made: Graph) -> tuple[Value, ...]:
    """The inputs of a graph of active tokens that are caches; none of any other graph."""
    found = StepInputs.of(made)
    return found.caches if found else ()


def cache_bytes(made: Graph, sizes: Mapping[str, int] | None = None) -> int:
    """Bytes of the caches of a graph of active tokens, all rows of the batch together."""
    return sum(value.type.bytes(sizes) for value in caches_of(made) if isinstance(value.type, TensorType))


def require_room(made: Graph, target: Target, sizes: Mapping[str, int] | None = None) -> None:
    """Raise Unsupported, in one line, if caches and weights of a graph of active tokens exceed the target's memory."""
    caches, free = cache_bytes(made, sizes), _free(made, target, sizes)
    if free is not None and caches > free:
        raise Unsupported(
            f"step allocation: the caches of {made.name} take {caches / 1e9:.3g} GB beside "
            f"{weight_bytes(made, sizes) / 1e9:.3g} GB of weights, {target.name} has {target.memory / 1e9:.3g} GB; "
            "ask for active-tokens(cache_dtype='i8'), caches='held', or a video of fewer tokens"
        )


def _free(graph: Graph, target: Target | None, sizes: Mapping[str, int] | None) -> int | None:
    """Bytes that weights leave; None if there is no bound."""
    if target is None or target.memory >= WITHOUT_LIMIT:
        return None
    return target.memory - weight_bytes(graph, sizes)


def _read_by_attention(made: Graph) -> Iterator[str]:
    for node in made.nodes:
        for key in ("key", "value") if "query" in node.args else ():
            if isinstance(arg := node.args.get(key), Ref):
                yield arg.name


def _no_machine() -> Target:
    return Target("none", "no machine", "null", "none", {}, 1.0, WITHOUT_LIMIT, 0.0)
