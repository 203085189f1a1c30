"""Runs policies of a loop's steps through engines of this machine, and times their calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor

from intarsia.allocated import AllocatedEngine, call_inputs, grid_of, with_caches
from intarsia.backends.base import Engine, find_backend
from intarsia.backends.runner import bench
from intarsia.backends.segmented import Segment, SegmentedEngine
from intarsia.cached import CachedEngine, segment_timings
from intarsia.evidence import sample_inputs
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target
from intarsia.models.sampler import FlowMatchEuler
from intarsia.passes.active_inputs import StepInputs
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.apply import run_passes
from intarsia.passes.step_caching import StepCaching, TeaCache
from intarsia.search.progress import Silent
from intarsia.search.roofline import predict
from intarsia.search.step_memory import require_room
from intarsia.search.step_space import Allocated, CachedSeconds
from intarsia.search.workload import Run, Workload
from intarsia.signal_fit import Recorded
from intarsia.subject import Subject

BACKEND = "onnx"

SHARES = (0.03, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Of the tokens, at which calls are timed; between them seconds are interpolated, below the least they are its."""


@dataclass
class StepBench:
    """Policies of a model on this machine's CPU through ONNX Runtime; seconds are predicted for any other target.

    Attributes:
        subject: A model with a sampler.
        target: The machine that seconds are told of.
        repeats: Calls that a timing is the median of.
    """

    subject: Subject
    target: Target
    repeats: int = 5
    _seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def __post_init__(self) -> None:
        if self.subject.model is None or self.subject.model.sampler is None:
            raise UsageError(
                f"{self.subject.name}: strategy steps needs a model with a sampler, whose steps it allocates"
            )
        self.sampler: FlowMatchEuler = self.subject.model.sampler
        self.steps = self.sampler.steps
        self.grid = grid_of(self.subject.program.graph)
        self._folder = TemporaryDirectory(prefix="intarsia-")
        self._engines: dict[str, tuple[Graph, Engine]] = {}
        self._cut: dict[type[StepCaching], SegmentedEngine] = {}
        self._cached_seconds: dict[type[StepCaching], CachedSeconds] = {}

    def dense_seconds(self) -> float:
        """What a call of the unchanged network takes."""
        return self._dense_seconds

    def seconds(self, caches: str, share: float) -> float:
        """What a call takes that computes a share of the tokens; 0 for share 0."""
        if share <= 0:
            return 0.0
        if caches == "none":
            return self.dense_seconds()
        if caches not in self._seconds:
            counts = [max(1, round(share * self.grid.count)) for share in SHARES]
            self._seconds[caches] = [self._call_seconds(caches, one) / self._slowness() for one in counts]
        return float(np.interp(share, SHARES, self._seconds[caches]))

    def dense(self) -> Run:
        """The unchanged network."""
        return self._dense

    def allocated(self, policy: Allocated) -> AllocatedEngine:
        """The network of a policy."""
        whole = policy.caches == "none"
        graph, engine = (self.subject.program.graph, self._dense) if whole else self._engine(policy.caches)
        return AllocatedEngine(engine, graph, policy.allocation, self.sampler, self.grid)

    def cached_seconds(self, kind: type[StepCaching]) -> CachedSeconds:
        """What steps of a caching rule take; Unsupported if the network cannot be cut for it."""
        if kind not in self._cached_seconds:
            before, blocks, head = self._segment_seconds(kind)
            self._cached_seconds[kind] = CachedSeconds(before + blocks + head, before + head)
        return self._cached_seconds[kind]

    def cached(self, rule: StepCaching) -> CachedEngine:
        """The network of a caching rule; Unsupported if it cannot be cut for it."""
        return CachedEngine(self._segments(type(rule)), rule, self.sampler)

    def coefficients(self, workload: Workload) -> tuple[float, ...]:
        """TeaCache's polynomial for this network, from its dense loop on calibration noise."""
        recorded = Recorded(self.cached(TeaCache(threshold=0.0)))
        workload.outputs(recorded, "calibration", Silent())
        return recorded.coefficients()

    @cached_property
    def _own(self) -> tuple[Tensor, ...]:
        """The model's own inputs of a call."""
        return sample_inputs(self.subject) or example_inputs(self.subject.program.graph)

    @cached_property
    def _dense_seconds(self) -> float:
        if self.target.kind != "cpu":
            return predict(self.subject.program.graph, self.target).seconds
        return bench(self._dense, self._own, repeats=self.repeats, warmup=1).seconds

    def _segment_seconds(self, kind: type[StepCaching]) -> list[float]:
        if self.target.kind != "cpu":
            return [predict(one, self.target).seconds for one in kind().split(self.subject.program.graph)]
        timings = segment_timings(self._segments(kind), self._own, repeats=self.repeats)
        slowness = self._slowness()
        return [one.seconds / slowness for one in timings]

    def _slowness(self) -> float:
        """What a dense call takes now over what it took when it was first timed; 1 where seconds are predicted."""
        if self.target.kind != "cpu":
            return 1.0
        now = bench(self._dense, self._own, repeats=self.repeats, warmup=0).seconds
        return now / self._dense_seconds

    def _segments(self, kind: type[StepCaching]) -> SegmentedEngine:
        if kind not in self._cut:
            graph = self.subject.program.graph
            built = (Segment(one, self._built(one, f"{kind.name}.{n}")) for n, one in enumerate(kind().split(graph)))
            self._cut[kind] = SegmentedEngine(tuple(built), graph)
        return self._cut[kind]

    @cached_property
    def _dense(self) -> Engine:
        return self._built(self.subject.program.graph, "dense")

    def _engine(self, caches: str) -> tuple[Graph, Engine]:
        if caches not in self._engines:
            graph = self._graph(caches)
            self._engines[caches] = (graph, self._built(graph, caches))
        return self._engines[caches]

    def _graph(self, caches: str) -> Graph:
        made = ActiveTokens(caches=caches).run(self.subject.program.graph, self.target, {})
        require_room(made, self.target)
        return made

    def _built(self, graph: Graph, name: str) -> Engine:
        backend = find_backend(BACKEND)
        ready = run_passes(backend.passes, graph, self.target)
        folder = Path(self._folder.name) / name
        folder.mkdir()
        weights = {param.name: self.subject.program.weights[param.name] for param in ready.params}
        built = backend.build(materialize(Program(ready, weights)), self.target, folder)
        return backend.load(folder, built.files)

    def _call_seconds(self, caches: str, count: int) -> float:
        if self.target.kind != "cpu":
            graph = self._graph(caches)
            found = StepInputs.of(graph)
            assert found is not None
            return predict(graph, self.target, {found.size: count}).seconds
        graph, engine = self._engine(caches)
        inputs = call_inputs(graph, self._own, count)
        return bench(with_caches(engine, graph), inputs, repeats=self.repeats, warmup=1).seconds
