"""Look at a model without building anything: its work, its time on a machine, what a backend would make of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intarsia import subject as subjects
from intarsia.backends.base import Backend, find_backend, refusals
from intarsia.backends.bundle import load_bundle
from intarsia.backends.segmented import once
from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.target import Target, load_target
from intarsia.passes.apply import run_passes
from intarsia.passes.attention_sites import why_none
from intarsia.passes.base import find_pass
from intarsia.passes.integer_only import left_in_float
from intarsia.search.roofline import Prediction, predict
from intarsia.search.step_memory import cache_bytes, cache_table, caches_of
from intarsia.search.work import attention_sites, summary


def inspect(
    subject: str | Path,
    *,
    target: str | None = None,
    sizes: Mapping[str, int] | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """What a graph computes and moves, its attention sites, and how long ``target`` takes for it.

    Args:
        subject: A model (traced without memory for weights), a ``.graph`` file, a bundle's folder or a plan's file.
            Of a bundle with phases the facts are of the first one's program, and ``later`` has those of the others;
            of one with segments they are of the whole, and ``segments`` has those of each.
        backend: Adds what that backend cannot take, and what its passes find, without building anything; needs a
            target.
    """
    if backend and not target:
        raise UsageError(f"--backend {backend}: what a backend takes depends on the machine; give --target")

    def looked_at(graph: Graph) -> dict[str, Any]:
        taken = {"backend": _taken(graph, find_backend(backend), load_target(target))} if backend and target else {}
        return {**_counted(graph, target, sizes), **taken}

    path = Path(subject)
    if path.suffix == ".json" and not path.is_dir():
        return {"kind": "plan", **json.loads(Plan.load(path).to_json())}
    if not path.is_dir():
        return {"kind": "graph", **looked_at(subjects.resolve(subject, meta=True).program.graph)}
    bundle = load_bundle(path)
    facts = {"kind": "bundle", "manifest": dict(bundle.manifest), **looked_at(bundle.graph)}
    if bundle.phases:
        facts["phases"] = [one.to_json() for one in bundle.phases]
        facts["later"] = {str(variant.phase): looked_at(variant.graph) for variant in bundle.variants[1:]}
    if bundle.segments:
        graphs = [variant.graph for variant in bundle.segments]
        steady = once(bundle.graph, graphs)
        facts["segments"] = [{"once": number in steady, **looked_at(graph)} for number, graph in enumerate(graphs)]
    return facts


def _taken(graph: Graph, backend: Backend, target: Target) -> dict[str, object]:
    """What ``backend`` would make of the graph: where its passes change it and where not, and what it refuses."""
    before = Counter(node.op for node in graph.nodes)
    passed_over = {text: find_pass(text).refusals(graph, target) for text in backend.passes}
    prepared = run_passes(backend.passes, graph, target)
    made = Counter(node.op for node in prepared.nodes) - before
    return {
        "name": str(backend),
        "target_refused": backend.why_not_target(target),
        "put_in": dict(made),
        "passed_over": passed_over,
        "refused": [asdict(one) for one in refusals(backend, prepared, target)],
    }


def _counted(graph: Graph, target: str | None, sizes: Mapping[str, int] | None) -> dict[str, Any]:
    work, sites = summary(graph, sizes), attention_sites(graph, sizes)
    facts: dict[str, Any] = {
        "name": graph.name,
        "fingerprint": graph.fingerprint,
        "nodes": len(graph.nodes),
        "inputs": {value.name: str(value.type) for value in graph.inputs},
        "outputs": {name: str(graph.values[name].type) for name in graph.outputs},
        "sizes": [str(size) for size in graph.sizes],
        "flops": work.flops,
        "flops_by_class": dict(work.flops_by_class),
        "bytes_moved": work.bytes,
        "parameters": work.parameters,
        "weight_bytes": work.weight_bytes,
        "operators_unknown": list(work.unknown),
        "attention_sites": [asdict(site) for site in sites],
    }
    if (in_float := left_in_float([graph])) is not None:
        facts["in_float"] = list(in_float)
    if (step := _step_allocation(graph, load_target(target) if target else None, sizes)) is not None:
        facts["step_allocation"] = step
    if target is not None:
        predicted = predict(graph, load_target(target), sizes)
        facts |= {"target": target, "predicted_seconds": predicted.seconds, "seconds_by_bound": _by_bound(predicted)}
    return facts


def _step_allocation(graph: Graph, target: Target | None, sizes: Mapping[str, int] | None) -> dict[str, Any] | None:
    """What caches of step allocation take, or why the graph has none; None where there are no tokens of a video."""
    if caches_of(graph):
        return {"bytes": cache_bytes(graph, sizes)}
    if why_none(graph):
        return None
    memory = {"memory": target.memory} if target else {}
    try:
        return {**memory, "caches": [asdict(row) for row in cache_table(graph, target, sizes)]}
    except Unsupported as error:
        return {"refused": str(error)}


def _by_bound(predicted: Prediction) -> dict[str, float]:
    table: dict[str, float] = {}
    for cost in predicted.nodes.values():
        table[cost.bound] = table.get(cost.bound, 0.0) + cost.seconds
    return table
