"""How long the pass that computes active tokens only takes on networks of full size, and what it leaves to compute.

    python benchmarks/step_pass.py [--quick] [--json FILE]

Networks are traced on the meta device, without memory for weights; tracing is timed apart. FLOPs are those of matrix
products and attention, counted from the graph before and after. ``--quick`` leaves out all but Wan2.1-14B.
"""

from __future__ import annotations

import sys
import time

from harness import Figures, alone, main

MODELS = {
    "wan14b": "wan2.1-t2v-14b",
    "hunyuan": "hunyuanvideo",
    "cogvideox5b": "cogvideox-5b",
    "ltx": "ltx-2b",
}
SHARES = {"half": 0.5, "quarter": 0.25}


def _meanings() -> dict[str, str]:
    found = {}
    for key, name in MODELS.items():
        found[f"pass_seconds_{key}"] = f"s, the pass on {name}"
        found[f"trace_seconds_{key}"] = "s, tracing it before"
        for share in SHARES:
            found[f"flops_share_at_{share}_active_{key}"] = (
                f"FLOPs of a step with {share} of the tokens, of a dense one"
            )
        found[f"attention_share_at_half_active_{key}"] = "the same, self-attention alone"
        found[f"cache_gb_{key}"] = "GB of caches, held, of the rows of one call"
    return found


MEANINGS = _meanings()


def measure(quick: bool) -> Figures:
    """Every network in a process of its own."""
    found: dict[str, float] = {}
    for key, name in MODELS.items():
        if quick and found:
            found |= {told.replace("wan14b", key): value for told, value in found.items() if told.endswith("wan14b")}
            continue
        figures = alone(_passed, name).result
        print(f"{name}: {figures}", file=sys.stderr, flush=True)
        found |= {f"{told}_{key}": value for told, value in figures.items()}
    return found


def _passed(name: str) -> dict[str, float]:
    from intarsia import flow
    from intarsia.ir.graph import Graph
    from intarsia.ir.target import load_target
    from intarsia.ir.types import TensorType
    from intarsia.passes.active_inputs import StepInputs
    from intarsia.passes.active_tokens import ActiveTokens
    from intarsia.passes.token_places import TokenPlaces
    from intarsia.search.work import node_work

    start = time.perf_counter()
    graph = flow.trace(name, meta=True).graph
    traced = time.perf_counter() - start
    start = time.perf_counter()
    changed = ActiveTokens().run(graph, load_target("null"), {})
    passed = time.perf_counter() - start
    places = TokenPlaces(graph)
    attention = {site.name for site in places.sites}

    def flops(graph: Graph, share: float, names: set[str] | None = None) -> float:
        sizes = {"active": round(share * places.count)}
        works = (node_work(node, graph, sizes) for node in graph.nodes if names is None or node.name in names)
        return sum(work.flops for work in works if work is not None)

    found = StepInputs.of(changed)
    assert found is not None
    caches = sum(value.type.bytes({}) for value in found.caches if isinstance(value.type, TensorType))
    return {
        "pass_seconds": passed,
        "trace_seconds": traced,
        **{f"flops_share_at_{told}_active": flops(changed, share) / flops(graph, 1) for told, share in SHARES.items()},
        "attention_share_at_half_active": flops(changed, 0.5, attention) / flops(graph, 1, attention),
        "cache_gb": caches / 1e9,
    }


if __name__ == "__main__":
    main("step_pass", MEANINGS, measure)
