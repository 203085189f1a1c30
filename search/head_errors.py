"""All heads with what each may be, what that costs and gives, and the network with heads changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from intarsia.ir.execute import call
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.target import Target
from intarsia.ir.tokens import TokenLayout
from intarsia.ir.types import TensorType
from intarsia.kernels.block_sparse_attention.reference import mean_value
from intarsia.passes.attention_sites import Site
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.masks import Mask
from intarsia.passes.sparse_attention import DENSE, SKIP, SparseAttention, places
from intarsia.search.head_table import ABSENT, Floats
from intarsia.search.roofline import node_cost
from intarsia.search.sensitivity import Batch

Answer = Callable[[Site, Sequence[Mapping[str, Any]]], Sequence[Tensor]]
"""What a site's attention gives (B, H, S, D), for each of several calls that run side by side, from their values."""

Price = Callable[[Node, Graph], float]
"""Seconds of a call whose inputs the graph defines."""


@dataclass(frozen=True)
class Heads:
    """All heads of a graph that may be sparse, with the patterns of each.

    Attributes:
        pass_: Whose question is answered.
        graph: The graph that it is asked about.
        sites: The attentions.
        options: Of each head of each site, in the order of ``places``, patterns that it may have; the first is dense.
        target: The machine that costs are predicted for.
        sizes: The graph's named sizes.
        price: Measured seconds of a call of attention; None predicts them.
    """

    pass_: SparseAttention
    graph: Graph
    sites: tuple[Site, ...]
    options: tuple[tuple[str, ...], ...]
    target: Target
    sizes: Mapping[str, int]
    price: Price | None = None

    @classmethod
    def of(
        cls,
        pass_: SparseAttention,
        graph: Graph,
        target: Target,
        sizes: Mapping[str, int],
        *,
        price: Price | None = None,
    ) -> Heads:
        """The heads to which the pass offers something."""
        choices = pass_.choices(graph, target)
        found = tuple(site for site in pass_.sites(graph) if places(site)[0] in choices)
        options = tuple(choices[place] for site in found for place in places(site))
        return cls(pass_, graph, found, options, target, sizes, price)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """What plans call the heads, site after site."""
        return tuple(place for site in self.sites for place in places(site))

    @property
    def width(self) -> int:
        """The largest number of options that a head has."""
        return max(map(len, self.options))

    def first(self, site: Site) -> int:
        """The number of the site's first head."""
        return self._firsts[site.name]

    @cached_property
    def _firsts(self) -> dict[str, int]:
        counts = accumulate((site.heads for site in self.sites), initial=0)
        return {site.name: first for site, first in zip(self.sites, counts, strict=False)}

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any head's options, and with what a pattern computes."""
        digest = sha256(repr((self.places, self.options)).encode())
        for site in self.sites:
            for option in dict.fromkeys(option for options in self.of_site(site) for option in options):
                mask = self.pass_.mask(option, site.layout)
                digest.update(f"{option} {mask.block_q} {mask.table} {mask.order}".encode())
        return digest.hexdigest()[:16]

    def of_site(self, site: Site) -> tuple[tuple[str, ...], ...]:
        """The options of the site's heads."""
        first = self.first(site)
        return self.options[first : first + site.heads]

    def density(self, site: Site, option: str) -> float:
        """The share of pairs that a head of the site computes with this option."""
        if option in (DENSE, SKIP):
            return float(option == DENSE)
        return _density(self.pass_, option, site.layout)

    def result(self, site: Site, head: int, option: str, table: Mapping[str, Any], *, rows: Tensor) -> Tensor:
        """What one head gives with an option for the queries ``rows`` (R), as ``sampled_rows`` spreads them: (B, R, D).

        ``table`` holds the site's operands by name.
        """
        query, key, value = (table[name][:, head : head + 1] for name in (site.query, site.key, site.value))
        if option == SKIP:
            return torch.zeros_like(query[:, 0, rows])
        mask = None if option == DENSE else _rows_of(self.pass_, option, site.layout, len(rows)).to(query.device)
        if site.lengths:
            kept = (torch.arange(key.shape[2])[None, :] < table[site.lengths][:, None])[:, None, None, :]
            mask = kept if mask is None else mask & kept
        scale = cast("float | None", self.graph.producers[site.name].args.get("scale"))
        found = scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=mask, scale=scale)
        found = found if mask is None else torch.where(mask.any(-1, keepdim=True), found, torch.zeros_like(found))
        mean = 0.0 if option == DENSE else find_pattern(option).mean
        return found[:, 0] * (1 - mean) + mean_of(site, head, table) * mean if mean else found[:, 0]

    def costs(self, unit: str) -> Floats:
        """What each option costs (N, O) a step: ``density``, the share of all heads' pairs, or ``seconds``, predicted.

        Seconds are the roofline's for one head of many, so that starting a kernel costs nothing.
        """
        if unit not in self._costs:
            found = np.full((len(self.places), self.width), ABSENT)
            for site in self.sites:
                for head, options in enumerate(self.of_site(site)):
                    number = self.first(site) + head
                    found[number, : len(options)] = [self._cost(site, option, unit) for option in options]
            self._costs[unit] = found / len(self.places) if unit == "density" else found
        return self._costs[unit]

    @cached_property
    def _costs(self) -> dict[str, Floats]:
        return {}

    def _cost(self, site: Site, option: str, unit: str) -> float:
        if unit == "density" or option == SKIP:
            return self.density(site, option)
        alike = (self.graph.type(site.query), mode(option), self.density(site, option))
        if alike not in self._seconds:
            self._seconds[alike] = self._call_seconds(self.pass_.part(site, option, self.graph)) / site.heads
        return self._seconds[alike]

    def _call_seconds(self, node: Node) -> float:
        if self.price is not None:
            return self.price(node, self.graph)
        return max(node_cost(node, self.graph, self.target, self.sizes).seconds - self.target.launch, 0.0)

    @cached_property
    def _seconds(self) -> dict[tuple[TensorType, str, float], float]:
        """Of a head, by shape, kind of pattern and density: heads that are alike in these cost alike."""
        return {}


@lru_cache(maxsize=4096)
def _density(pass_: SparseAttention, option: str, layout: TokenLayout) -> float:
    return pass_.mask(option, layout).density


def mode(option: str) -> str:
    """The kind of a pattern: its name without what it is given."""
    return option.partition("(")[0]


def walk(program: Program, batches: Sequence[Batch], sites: Sequence[Site], answer: Answer) -> list[Tensor]:
    """The first output of each call, all calls run side by side, with ``answer`` in place of the sites' attention.

    Args:
        program: Materialized.
        batches: The inputs of each call.
    """
    graph, by_name = program.graph, {site.name: site for site in sites}
    tables: list[dict[str, Any]] = [
        {**program.weights, **{v.name: t for v, t in zip(graph.inputs, batch, strict=True)}} for batch in batches
    ]
    lengths = [site.lengths for site in sites if site.lengths]
    for node, dead in _with_last_uses(graph, kept=lengths):
        if node.name in by_name:
            for table, found in zip(tables, answer(by_name[node.name], tables), strict=True):
                table[node.name] = found
        else:
            for table in tables:
                table.update(zip((value.name for value in node.outputs), _differentiable(node, table), strict=True))
        for table in tables:
            for name in dead:
                table.pop(name, None)
    return [table[graph.outputs[0]] for table in tables]


def _differentiable(node: Node, table: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the call gives; a functional copy, which PyTorch cannot differentiate, as the cast that it is."""
    if node.op == "aten.copy":
        return (table[node.ref("src")].to(table[node.ref("self")].dtype).expand_as(table[node.ref("self")]),)
    return call(node, table)


def _with_last_uses(graph: Graph, *, kept: Sequence[str]) -> Iterator[tuple[Node, Sequence[str]]]:
    last = {name: node for node in graph.nodes for name in node.inputs}
    living = {*kept, *graph.outputs, *(value.name for value in (*graph.inputs, *graph.params))}
    for node in graph.nodes:
        yield node, [name for name in set(node.inputs) if last[name] is node and name not in living]


def dense_answer(site: Site, table: Mapping[str, Any], graph: Graph) -> Tensor:
    """What the site's attention gives as it came (B, H, S, D)."""
    return cast("Tensor", call(graph.producers[site.name], table)[0])


def scores(site: Site, table: Mapping[str, Any], rows: Tensor, graph: Graph) -> Tensor:
    """Scaled scores (B, H, R, S) of some queries, minus infinity beyond the keys' length."""
    query, key = table[site.query][:, :, rows].float(), table[site.key].float()
    scale = graph.producers[site.name].args.get("scale")
    found: Tensor = query @ key.transpose(-1, -2) * (scale if isinstance(scale, float) else site.head_dim**-0.5)
    if site.lengths:
        beyond = torch.arange(key.shape[2])[None, :] >= table[site.lengths][:, None]
        found = found.masked_fill(beyond[:, None, None, :], float("-inf"))
    return found


def sampled_rows(tokens: int, count: int) -> Tensor:
    """Numbers of ``count`` queries, evenly spread; of all queries if ``count`` is 0."""
    if not count or count >= tokens:
        return torch.arange(tokens)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * tokens / count).long()


def mean_of(site: Site, head: int, table: Mapping[str, Any]) -> Tensor:
    """The mean of a head's values over the keys that are attended to (B, 1, D)."""
    lengths = table[site.lengths] if site.lengths else None
    return mean_value(table[site.value][:, head : head + 1], lengths)[:, 0]


@lru_cache(maxsize=64)
def _rows_of(pass_: SparseAttention, option: str, layout: TokenLayout, count: int) -> Tensor:
    """The rows of the option's mask (R, S) that ``sampled_rows`` names, by token number."""
    mask: Mask = pass_.mask(option, layout)
    tokens = layout.tokens
    rows = sampled_rows(tokens, count).numpy()
    place = np.arange(tokens) if mask.order is None else mask.order.inverse()
    blocks: NDArray[np.bool_] = mask.table.blocks()[place[rows] // mask.block_q]
    return torch.from_numpy(blocks[:, place // mask.block_k])


def _operand_names(site: Site) -> tuple[str, ...]:
    return (site.query, site.key, site.value, *((site.lengths,) if site.lengths else ()))
