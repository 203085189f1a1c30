"""How much one change alone moves the outputs: each option at each place, the rest as it was."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from intarsia.ir.execute import call, evaluate_nodes
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.text import print_node
from intarsia.search.journal import Journal

Batch = tuple[Tensor, ...]
"""The inputs of one call, in the graph's order."""


@dataclass(frozen=True)
class Difference:
    """What a changed graph has that the base has not.

    Attributes:
        nodes: Calls that are not in the base, or are there with other arguments, in execution order.
        again: Those, and all calls that depend on them, in execution order.
        outputs: Names of the changed graph's outputs.
    """

    nodes: tuple[Node, ...]
    again: tuple[Node, ...]
    outputs: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ for differing changes of one base."""
        text = "".join(print_node(node, sources=False) for node in self.nodes) + repr(self.outputs)
        return sha256(text.encode()).hexdigest()[:16]


def difference(base: Graph, changed: Graph) -> Difference:
    """What must run again when the values of ``base`` are known and those of ``changed`` are wanted."""
    nodes: list[Node] = []
    again: list[Node] = []
    moved: set[str] = set()
    for node in changed.nodes:
        old = base.producers.get(node.name)
        differs = old is not node and old != node
        if differs or not moved.isdisjoint(node.inputs):
            again.append(node)
            moved.update(value.name for value in node.outputs)
        if differs:
            nodes.append(node)
    return Difference(tuple(nodes), tuple(again), changed.outputs)


def sensitivities(
    base: Program,
    changes: Sequence[Callable[[], Graph]],
    batches: Sequence[Batch],
    *,
    journal: Journal,
    measured: Callable[[], None],
) -> tuple[float, ...]:
    """For each change the squared error of all outputs relative to their squared norm, over all batches.

    The base runs once a batch; a change runs only the calls behind it, on the values that the base left.

    Args:
        base: The program that all changes are changes of.
        changes: What makes the changed graph; called when it is needed, so that only one is held at a time.
        batches: Calibration inputs.
        journal: What is found there is not measured again; what is measured is kept there.
        measured: Called after each change on each batch, and free to raise.
    """
    differences = [difference(base.graph, change()) for change in changes]
    errors = [0.0] * len(changes)
    norm = 0.0
    for number, batch in enumerate(batches):
        keys = [f"sensitivity/{found.fingerprint}/{number}" for found in differences]
        norm_key = f"norm/{base.graph.fingerprint}/{number}"
        values = None if _all_known(journal, [norm_key, *keys]) else values_of(base, batch)
        norm += _known(journal, norm_key, partial(_norm, base.graph, values))
        for place, (key, found) in enumerate(zip(keys, differences, strict=True)):
            errors[place] += _known(journal, key, partial(_error, base.graph, found, values))
            measured()
    return tuple(error / max(norm, 1e-300) for error in errors)


def _all_known(journal: Journal, keys: Sequence[str]) -> bool:
    return all(journal.get(key) is not None for key in keys)


def _known(journal: Journal, key: str, measure: Callable[[], float]) -> float:
    found = journal.get(key)
    if isinstance(found, float):
        return found
    value = measure()
    journal.put(key, value)
    return value


def values_of(base: Program, batch: Batch) -> dict[str, Any]:
    """All values of the program for a batch, by name."""
    inputs = {value.name: tensor for value, tensor in zip(base.graph.inputs, batch, strict=True)}
    return evaluate_nodes(base.graph.nodes, {**base.weights, **inputs})


def _norm(graph: Graph, values: Mapping[str, Any] | None) -> float:
    assert values is not None
    return sum(float(values[name].double().square().sum()) for name in graph.outputs)


def _error(graph: Graph, found: Difference, values: Mapping[str, Any] | None) -> float:
    assert values is not None
    run = run_again(found, values)
    pairs = zip(found.outputs, graph.outputs, strict=True)
    return sum(float((run[ours].double() - values[theirs].double()).square().sum()) for ours, theirs in pairs)


def run_again(found: Difference, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of the changed graph; intermediate ones are let go after their last use."""
    fresh: dict[str, Any] = {}
    table: ChainMap[str, Any] = ChainMap(fresh, values)  # type: ignore[arg-type]
    with torch.no_grad():
        for node, dead in _with_last_uses(found):
            fresh.update(zip((value.name for value in node.outputs), call(node, table), strict=True))
            for name in dead:
                fresh.pop(name, None)
    return table


def _with_last_uses(found: Difference) -> Iterator[tuple[Node, Sequence[str]]]:
    last = {name: node for node in found.again for name in node.inputs}
    for node in found.again:
        yield node, [name for name in node.inputs if last[name] is node and name not in found.outputs]
