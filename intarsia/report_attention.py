"""Attention of a bundle's heads, and what of it they compute, from running its programs on their samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from intarsia.backends.bundle import Bundle
from intarsia.backends.phases import title
from intarsia.backends.variant import Variant
from intarsia.ir.errors import InvalidGraph, MissingEnvironment, QualityError, Unsupported
from intarsia.ir.execute import call
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.passes.sparse_attention import OP, SKIP, groups_of
from intarsia.report_strips import PARTS, AttentionStrip, Floats, HeadMap, strip
from intarsia.search.work import weight_bytes

ROWS = 4
"""Queries of each part whose attention is looked at."""

LAYERS, HEADS, PHASES = 12, 16, 4
"""How many are drawn at most; layers and phases evenly spread, heads from the first."""

TOKENS, WEIGHTS = 8192, 4e9
"""Up to how many tokens, and bytes of weights, a program is run for its maps: it runs by the slow reference."""


@dataclass(frozen=True)
class AttentionPhase:
    """The layers that are drawn of one phase."""

    title: str
    strips: tuple[AttentionStrip, ...]


def attention_phases(
    bundle: Bundle, options: Sequence[Mapping[str, Sequence[str]]]
) -> tuple[Sequence[AttentionPhase], str, str]:
    """The maps of all phases that are drawn, what they leave out, and if there are none, why.

    They come from running each phase's program on its stored sample.

    Args:
        options: Of each phase, by attention, what each of its heads does.
    """
    sites = spread(list(options[0]), LAYERS)
    phases = spread([variant.phase for variant in bundle.variants], PHASES)
    heads = max(len(options[0][site]) for site in sites)
    names = dict(zip(options[0], short_names(options[0]), strict=True))
    parts = [
        f"{len(sites)} of {len(options[0])} layers" if len(sites) < len(options[0]) else "",
        f"the first {HEADS} of {heads} heads" if heads > HEADS else "",
        f"{len(phases)} of {len(bundle.variants)} programs" if len(phases) < len(bundle.variants) else "",
    ]
    drawn: list[AttentionPhase] = []
    for variant in bundle.variants:
        if variant.phase not in phases:
            continue
        if reason := why_not_run(variant):
            return (), "", reason
        try:
            found = head_maps(variant, {site: options[variant.phase][site] for site in sites})
        except (Unsupported, InvalidGraph, QualityError, MissingEnvironment) as error:
            return (), "", str(error).replace(str(bundle.folder), bundle.folder.name)
        strips = (strip(names[site], maps, options[variant.phase][site]) for site, maps in found.items())
        title_ = title(bundle.phases, variant.phase) if bundle.phases else "all steps"
        drawn.append(AttentionPhase(title_, tuple(strips)))
    left_out = ", ".join(part for part in parts if part)
    return drawn, f"Drawn: {left_out}." if left_out else "", ""


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def short_names(sites: Iterable[str]) -> tuple[str, ...]:
    """What tells attentions apart: their names without the parts that all end in; numbers stay."""
    parts = [site.split(".") for site in sites]
    common = 0
    while len(parts) > 1 and min(map(len, parts)) > common + 1:
        ends = {name[-1 - common] for name in parts}
        if len(ends) > 1 or ends.pop().isdigit():
            break
        common += 1
    return tuple(".".join(name[: len(name) - common]) for name in parts)


def group_calls(graph: Graph, site: str) -> tuple[Node, ...]:
    """The calls of attention that stand at a site after ``sparse-attention``, one for each group of heads, in order."""
    return tuple(
        node for node in graph.nodes if node.args.keys() >= {"query", "key"} and f"{node.name}.".startswith(f"{site}.")
    )


def why_not_run(variant: Variant) -> str:
    """Why the variant's program is too large to be run for its maps; empty if it is not."""
    graph = variant.graph
    tokens = [graph.type(node.ref("query")).shape[2] for node in graph.nodes if node.op == OP]
    largest = max((count for count in tokens if isinstance(count, int)), default=0)
    if largest > TOKENS:
        return f"the program has {largest:,} tokens, and its slow reference is run for up to {TOKENS:,} only"
    held = weight_bytes(graph)
    if held > WEIGHTS:
        most = f"{WEIGHTS / 1e9:.0f} GB"
        return f"the program's weights take {held / 1e9:.1f} GB, and its slow reference is run for up to {most} only"
    return ""


def head_maps(variant: Variant, options: Mapping[str, Sequence[str]]) -> dict[str, tuple[HeadMap | None, ...]]:
    """Of each attention the maps of its first heads, None for a skipped one, from a run on the stored sample.

    Raises:
        InvalidGraph: The groups of heads in the graph are not those of ``options``.
    """
    graph = variant.graph
    wanted: dict[str, tuple[str, Sequence[int]]] = {}
    found: dict[str, list[HeadMap | None]] = {}
    for site, chosen in options.items():
        calls = group_calls(graph, site)
        groups = [heads for heads in groups_of(chosen) if chosen[heads[0]] != SKIP]
        if len(calls) != len(groups):
            raise InvalidGraph(f"%{site}: {len(calls)} calls of attention for {len(groups)} patterns of heads")
        found[site] = [None] * min(len(chosen), HEADS)
        wanted.update((node.name, (site, heads)) for node, heads in zip(calls, groups, strict=True))
    for node, table in _run(variant, wanted.keys()):
        site, heads = wanted[node.name]
        for number, head in enumerate(heads):
            if head < HEADS:
                found[site][head] = _head_map(node, table, number)
    return {site: tuple(maps) for site, maps in found.items()}


def _run(variant: Variant, names: Any) -> Iterator[tuple[Node, Mapping[str, Any]]]:
    """The calls of these names, each with the values that are there when it is about to run; ends at the last."""
    graph = variant.graph
    inputs = zip((value.name for value in graph.inputs), variant.sample.inputs, strict=True)
    table: dict[str, Any] = {**variant.program.weights, **dict(inputs)}
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    left = len(names)
    with torch.no_grad():
        for node in graph.nodes:
            if node.name in names:
                yield node, table
                left -= 1
            if not left:
                return
            table.update(zip((value.name for value in node.outputs), call(node, table), strict=True))
            for name in set(node.inputs):
                if last[name] == node.name:
                    table.pop(name, None)


def _head_map(node: Node, table: Mapping[str, Any], head: int) -> HeadMap:
    """The map of one head of a call, a mean over the batch; S queries and keys, R of the queries looked at."""
    query, key = (cast("Tensor", table[node.ref(name)])[:, head].float() for name in ("query", "key"))
    tokens = query.shape[1]
    parts = parts_of(tokens)
    rows = _rows(tokens, parts)
    scale = node.args.get("scale")
    scores = query[:, rows] @ key.transpose(1, 2) * (scale if isinstance(scale, float) else query.shape[2] ** -0.5)
    ends = node.args.get("lengths")
    if isinstance(ends, Ref):
        beyond = torch.arange(key.shape[1])[None, :] >= cast("Tensor", table[ends.name])[:, None]
        scores = scores.masked_fill(beyond[:, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1).mean(0).double().numpy()
    computed = _computed(node, rows, key.shape[1])
    kept = float((weights * computed).sum() / max(weights.sum(), 1e-300))
    return HeadMap(_pooled(weights, parts), _pooled(computed, parts), kept)


def parts_of(tokens: int) -> int:
    """Into how many parts so many tokens are pooled: a divisor near ``PARTS`` where there is one."""
    divisors = [parts for parts in range(PARTS // 2, PARTS + 1) if tokens % parts == 0]
    return max(divisors, default=min(tokens, PARTS))


def _rows(tokens: int, parts: int) -> Tensor:
    """Numbers (parts * ROWS) of queries: as many of each part, evenly spread."""
    edges = np.arange(parts + 1) * tokens // parts
    inside = (np.arange(ROWS) + 0.5) / ROWS
    rows = edges[:-1, None] + np.floor(inside[None, :] * np.diff(edges)[:, None]).astype(np.int64)
    return torch.from_numpy(rows.reshape(-1))


def _computed(node: Node, rows: Tensor, keys: int) -> Floats:
    """Which pairs the call computes (R, S), as ones and zeros."""
    if node.op != OP:
        return np.ones((len(rows), keys))
    block_q, block_k = (cast("int", node.args[name]) for name in ("block_q", "block_k"))
    order = node.args.get("order")
    places = np.arange(keys) if order is None else TokenOrder.parse(str(order)).inverse()
    asked = rows.numpy() if order is None else places[rows.numpy()]
    blocks = BlockTable.parse(str(node.args["blocks"])).blocks()[asked // block_q]
    return np.asarray(blocks[:, places // block_k], dtype=np.float64)


def _pooled(pairs: Floats, parts: int) -> Floats:
    """Means (P, P) of pairs of the sampled queries (P * ROWS) and all keys (S)."""
    edges = np.arange(parts) * pairs.shape[1] // parts
    widths = np.diff([*edges, pairs.shape[1]])
    by_key = np.add.reduceat(pairs, edges, axis=1) / widths
    return np.asarray(by_key.reshape(parts, ROWS, parts).mean(axis=1))
