"""Steps of active tokens on every backend's engine: the numbers of the eager graph, caches kept, counts in buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.allocated import AllocatedEngine, denoising, loop_timing, step_inputs
from intarsia.backends.base import Backend, Carried, Engine, find_backend
from intarsia.backends.null import NullEngine
from intarsia.backends.onnx_states import OnnxStates
from intarsia.backends.runner import denoiser
from intarsia.backends.segmented import Segment, SegmentedEngine
from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.segments import split as segments_of
from intarsia.ir.target import load_target
from intarsia.models.sampler import Conditioning, FlowMatchEuler, noise
from intarsia.models.step_loop import TokenGrid
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.apply import run_passes
from intarsia.passes.hoist_invariants import HoistInvariants

GOLDEN = Path(__file__).parent.parent / "golden"
GRID = TokenGrid((2, 3, 4), (4, 4, 4))
SAMPLER = FlowMatchEuler(steps=12, shift=3.0, guidance=3.0)
CONDITIONING = Conditioning(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
START = noise((2, 4, 8, 8), seed=1, count=1)
GROUPS = Allocation(warm_up=3, tail=1, shares=(0.3, 0.7), divisors=(1, 3), turns="staggered", velocity="linear")


@pytest.fixture(scope="module")
def small() -> Program:
    graph = Graph.parse((GOLDEN / "small-video.graph").read_text())
    generator = torch.Generator().manual_seed(2)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) / 3 for p in graph.params})  # type: ignore[union-attr, arg-type]


def stepped(program: Program, target: str, *, caches: str) -> Program:
    return Program(ActiveTokens(caches).run(program.graph, load_target(target), {}), program.weights)


def build(program: Program, backend: Backend, target: str, folder: Path) -> tuple[str, ...]:
    machine = load_target(target)
    ready = materialize(Program(run_passes(backend.passes, program.graph, machine), program.weights))
    return backend.build(ready, machine, folder).files


class Counted(Engine):
    """An engine that writes down how many tokens it is given, and never keeps its caches itself."""

    device = "CPU"

    def __init__(self, engine: Engine) -> None:
        self.counts: list[int] = []
        self._engine = engine

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.counts.append(len(inputs[3]))
        return self._engine(*inputs)


@pytest.fixture(scope="module", params=["held", "linear"])
def onnx(
    request: pytest.FixtureRequest, small: Program, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Graph, Engine]:
    pytest.importorskip("onnxruntime")
    made, folder = stepped(small, "cpu-avx2", caches=request.param), tmp_path_factory.mktemp(request.param)
    backend = find_backend("onnx")
    return made.graph, backend.load(folder, build(made, backend, "cpu-avx2", folder))


def sampled(engine: AllocatedEngine, model: Graph) -> Tensor:
    return SAMPLER.sample(denoiser(engine, model), START, CONDITIONING)


def test_a_loop_with_caches_written_in_place_has_the_bits_of_one_that_copies_them(
    onnx: tuple[Graph, Engine], small: Program
) -> None:
    graph, engine = onnx
    kept = AllocatedEngine(engine, graph, GROUPS, SAMPLER, GRID)
    carried = AllocatedEngine(Counted(engine), graph, GROUPS, SAMPLER, GRID)
    assert isinstance(kept.step, OnnxStates)
    places = [cache.data_ptr() for cache in kept.step.kept]
    for _ in range(2):
        assert torch.equal(sampled(kept, small.graph), sampled(carried, small.graph))
    assert [cache.data_ptr() for cache in kept.step.kept] == places


def test_tokens_filled_up_to_a_bucket_change_no_number(onnx: tuple[Graph, Engine], small: Program) -> None:
    graph, engine = onnx
    counted = Counted(engine)
    buckets = AllocatedEngine(counted, graph, GROUPS, SAMPLER, GRID, buckets=4)
    any_count = AllocatedEngine(engine, graph, GROUPS, SAMPLER, GRID)
    found, expected = sampled(buckets, small.graph), sampled(any_count, small.graph)
    assert {len(active) for active in buckets.loop.active} == {64, 34}
    assert set(counted.counts) == {64, 48}
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(buckets.step.kept, any_count.step.kept, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_plan_says_how_many_buckets_there_are_and_steps_are_timed_in_them(small: Program) -> None:
    notation = str(ActiveTokens(allocation=str(GROUPS), buckets=4))
    plan = Plan("0" * 12, "null", (Phase((Step(notation),)),))
    made = stepped(small, "null", caches="held")
    counted = Counted(NullEngine(made))
    engine = denoising(counted, made.graph, plan, SAMPLER, small.graph)
    assert isinstance(engine, AllocatedEngine)
    assert engine.buckets == 4
    loop_timing(engine, example_inputs(small.graph), repeats=1)
    assert set(counted.counts) == {64, 48}


def test_of_segments_the_one_that_reads_the_caches_keeps_them(small: Program) -> None:
    made = stepped(small, "null", caches="linear")
    parts = HoistInvariants().split(made.graph)
    programs = [Program(part, {one.name: small.weights[one.name] for one in part.params}) for part in parts]
    segments = SegmentedEngine(tuple(Segment(one.graph, NullEngine(one)) for one in programs), made.graph)
    split, whole = (AllocatedEngine(one, made.graph, GROUPS, SAMPLER, GRID) for one in (segments, NullEngine(made)))
    assert len(parts) == 2
    assert not isinstance(split.step, Carried)
    for _ in range(2):
        assert torch.equal(sampled(split, small.graph), sampled(whole, small.graph))
    for one, other in zip(split.step.kept, whole.step.kept, strict=True):
        assert torch.equal(one, other)
        assert other.any()


def test_what_two_segments_read_is_carried_between_them(small: Program) -> None:
    program = Program(Graph.parse(SHARED), {})
    parts = segments_of(program.graph, {"b": 1})
    engine = SegmentedEngine(tuple(Segment(one, NullEngine(Program(one, {}))) for one in parts), program.graph)
    kept = engine.stateful([torch.zeros(2)], inputs=[1], outputs=[1])
    assert isinstance(kept, Carried)
    for expected in (0.0, 2.0, 4.0):
        (answer,) = kept(torch.ones(2))
        assert torch.equal(answer, torch.full((2,), expected))


SHARED = """graph shared {
  input %x: f32[2]
  input %cache: f32[2]
  %a: f32[2] = aten.add.Tensor(self=%x, other=%cache)
  %b: f32[2] = aten.add.Tensor(self=%cache, other=%cache)
  return %b, %a
}
"""


ENGINES = [
    pytest.param(("onnx", "cpu-avx2", "onnxruntime", "load"), id="onnx"),
    pytest.param(("triton", "h100", "triton", "load_reference"), id="triton"),
    pytest.param(("tensorrt(engine=False)", "h100", "onnxruntime", "load_reference"), id="tensorrt"),
    pytest.param(("tvm(sizes=2)", "cpu-avx2", "tvm", "load"), id="tvm"),
]


@pytest.mark.parametrize("way", ENGINES)
def test_every_backend_computes_all_tokens_and_half_of_them_as_the_eager_graph_does(
    way: tuple[str, str, str, str], small: Program, tmp_path: Path
) -> None:
    name, target, package, load = way
    pytest.importorskip(package)
    backend, made = find_backend(name), stepped(small, target, caches="linear")
    engine = getattr(backend, load)(tmp_path, build(made, backend, target, tmp_path))
    eager = made.module()
    for count in (64, 32):
        given = step_inputs(made.graph, example_inputs(small.graph), count, run=eager)
        with torch.no_grad():
            expected = eager(*given)
        for found, answer in zip(engine(*given), expected, strict=True):
            assert torch.allclose(found, answer, rtol=1e-4, atol=1e-4)
    if name.startswith("tvm"):
        with pytest.raises(UsageError, match=r"none of 2 libraries .* active-tokens\(buckets=2\) fills"):
            engine(*step_inputs(made.graph, example_inputs(small.graph), 21))


@pytest.mark.slow
def test_tensorrt_builds_an_engine_whose_profile_takes_any_number_of_tokens(small: Program, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    backend = find_backend("tensorrt")
    files = build(stepped(small, "rtx4090", caches="held"), backend, "rtx4090", tmp_path)
    assert backend.check(tmp_path, files)


def test_tvm_says_what_compiles_a_named_size(small: Program, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    with pytest.raises(Unsupported, match=r"have tvm\(sizes=4\) compile four values of a single size"):
        build(stepped(small, "cpu-avx2", caches="held"), find_backend("tvm"), "cpu-avx2", tmp_path)
