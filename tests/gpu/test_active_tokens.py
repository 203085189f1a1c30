"""Steps of active tokens on a GPU, their caches kept there: the numbers of the eager graph, step after step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intarsia.allocated import with_caches
from intarsia.backends.base import Backend, find_backend
from intarsia.backends.null import NullEngine
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.apply import run_passes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GOLDEN = Path(__file__).parent.parent / "golden"


def here(backend: Backend) -> Target:
    """The GPU of this machine, if the backend builds for it."""
    major, minor = torch.cuda.get_device_capability()
    target = replace(load_target("h100"), name="here", architecture=f"sm_{major}{minor}")
    if reason := backend.why_not_target(target):
        pytest.skip(reason)
    return target


@pytest.mark.parametrize("name", ["triton", "triton(graphs=False)", "tensorrt"])
def test_caches_stay_on_the_gpu_and_hold_what_those_of_the_eager_graph_hold(name: str, tmp_path: Path) -> None:
    backend = find_backend(name)
    target = here(backend)
    graph = Graph.parse((GOLDEN / "small-video.graph").read_text())
    generator = torch.Generator().manual_seed(2)
    weights = {p.name: torch.randn(p.type.shape, generator=generator) / 3 for p in graph.params}  # type: ignore[union-attr, arg-type]
    made = Program(ActiveTokens("linear").run(graph, target, {}), weights)
    ready = materialize(Program(run_passes(backend.passes, made.graph, target), weights))
    files = backend.build(ready, target, tmp_path).files
    found, expected = (with_caches(one, made.graph) for one in (backend.load(tmp_path, files), NullEngine(made)))
    own, elapsed = example_inputs(graph), torch.full((64,), -0.1)
    for _ in range(2):
        for active in (torch.arange(64), torch.arange(0, 64, 3), torch.arange(64), torch.arange(0, 64, 3)):
            given = (*own, active, elapsed, 1 / elapsed)
            (one,), (other,) = found(*given), expected(*given)
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
            for kept, held in zip(found.kept, expected.kept, strict=True):
                assert kept.is_cuda
                torch.testing.assert_close(kept.cpu(), held, rtol=1e-2, atol=5e-2)
        found.clear()
        expected.clear()
        assert not any(kept.any() for kept in found.kept)
