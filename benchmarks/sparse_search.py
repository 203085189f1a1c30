"""How long the search over every head of Wan2.1-14B takes: 40 layers x 40 heads x 50 steps, at 480p and 720p.

    python benchmarks/sparse_search.py [--quick] [--json FILE]

The errors come from a table that is drawn at random with a fixed seed, as no weights are at hand: how long a search
takes depends on how many errors there are, not on what they say. Each size runs in a process of its own, whose peak
memory counts the trace. Tracing is timed apart. ``--quick`` leaves 480p's steps at 5.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Figures, alone, main

STEPS = 50
SIZES = {"480p": "wan2.1-t2v-14b", "720p": "wan2.1-t2v-14b-720p"}
DENSITY = 0.3

MEANINGS = {
    **{
        key: meaning
        for size in SIZES
        for key, meaning in (
            (f"search_14b_{size}_seconds", f"the search at {size}, table drawn and read, plan made"),
            (f"search_14b_{size}_peak_bytes", "most memory, trace and imports included"),
            (f"trace_14b_{size}_seconds", "tracing on the meta device, before it"),
            (f"choices_14b_{size}", "heads times steps, each with an option of its own"),
            (f"density_14b_{size}", f"share of pairs that the plan computes, of {DENSITY} allowed"),
            (f"gap_14b_{size}", "proven bound on what a better choice could save of the error, as a share"),
            (f"predicted_speedup_14b_{size}", "roofline of h200, dense over planned"),
        )
    },
}


def measure(quick: bool) -> Figures:
    """Both sizes."""
    found: dict[str, float] = {}
    for size, name in SIZES.items():
        run = alone(_searched, name, 5 if quick else STEPS)
        trace, search, choices, density, gap, speedup = run.result
        print(f"{size}: traced in {trace:.0f} s, searched in {search:.1f} s", file=sys.stderr)
        found |= {
            f"search_14b_{size}_seconds": search,
            f"search_14b_{size}_peak_bytes": run.peak_bytes,
            f"trace_14b_{size}_seconds": trace,
            f"choices_14b_{size}": choices,
            f"density_14b_{size}": density,
            f"gap_14b_{size}": gap,
            f"predicted_speedup_14b_{size}": speedup,
        }
    return found


def _searched(name: str, steps: int) -> tuple[float, ...]:
    """Seconds to trace and to search, choices made, density, gap and predicted speed-up."""
    import numpy as np
    from safetensors.numpy import save_file

    from intarsia import flow
    from intarsia.ir.target import load_target
    from intarsia.passes.sparse_attention import SparseAttention
    from intarsia.search.head_errors import Heads
    from intarsia.search.head_settings import HeadSearch
    from intarsia.search.heads import search_heads

    start = time.perf_counter()
    program = flow.trace(name, meta=True)
    traced = time.perf_counter() - start
    target, sparse = load_target("h200"), SparseAttention()
    # What the table's shape asks of the graph is remembered and spares the search as much: it counts as searching.
    start = time.perf_counter()
    heads = Heads.of(sparse, program.graph, target, {})
    errors = np.random.default_rng(0).lognormal(size=(steps, len(heads.places), heads.width)).astype(np.float32)
    errors[:, :, 0] = 0
    with TemporaryDirectory() as folder:
        table = Path(folder) / "errors.safetensors"
        save_file({"errors": errors}, table)
        how = HeadSearch(density=DENSITY, phases=0, steps=steps, table=str(table))
        found = search_heads(program, target, [sparse], None, None, how=how)
        text = found.plan.to_json()
        searched = time.perf_counter() - start
    assert text
    notes = found.plan.notes
    speedup = found.baseline.seconds / found.predicted.seconds
    choices = len(heads.places) * steps
    return traced, searched, choices, float(str(notes["density"])), float(str(notes["gap"])), speedup


if __name__ == "__main__":
    main("sparse_search", MEANINGS, measure)
