"""From a model to what its kernels are launched with: which kernels and shapes it needs, and the best tile of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia import kernels
from intarsia import subject as subjects
from intarsia.backends.triton import TritonBackend
from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.target import Target, load_target
from intarsia.kernels.records import Database, tuning_file
from intarsia.kernels.tiling import TILINGS
from intarsia.passes.apply import apply, run_passes, segments
from intarsia.search.progress import Progress, Silent
from intarsia.search.tune_exchange import Imported, exported, imported
from intarsia.search.tune_laboratory import Workshop
from intarsia.search.tune_problem import Site, site_of, sites_of
from intarsia.search.tune_study import EFFORTS, Tuned, tune


@dataclass(frozen=True)
class Tuning:
    """What a run found.

    Attributes:
        sites: Every kernel and shape that was asked for, the most frequent first.
        clock: The device that timed; None where candidates are ranked, not measured.
        database: Where records are kept.
        stale: Records there about the same kernels and shapes, of another source or other versions.
        broken: Lines there that are no records.
        complete: Whether the time sufficed.
    """

    sites: tuple[Tuned, ...]
    clock: str | None
    database: Path
    stale: int
    broken: int
    complete: bool


def tune_model(
    model: str,
    *,
    target: str,
    plan: Plan | None = None,
    passes: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    effort: str = "default",
    seed: int = 0,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune every kernel and shape that a Triton engine of the model under ``plan`` launches on ``target``.

    Args:
        passes: Passes that run as they are, where there is no plan.
        sizes: Numbers for named sizes, at which kernels of open shapes are tuned; the smallest where none is given.
        budget: Seconds for all of it.

    Raises:
        UsageError: Both a plan and passes, or a graph of which nothing varies.
        Unsupported: No kernels are compiled for the target.
    """
    progress = progress or Silent()
    machine = load_target(target)
    progress.start(f"trace {model}", None)
    graph = subjects.resolve(model, meta=True).program.graph
    kernels.register()
    graphs = list(_launched(graph, plan, passes, machine))
    numbers = {**subjects.smallest_sizes(graph), **(sizes or {})}
    _require_compiler(machine)
    sites = sites_of(graphs, machine, numbers)
    progress.finish()
    if not sites:
        known = ", ".join(name.removeprefix("intarsia.") for name in TILINGS)
        raise UsageError(f"{graph.name}: launches no kernel that can be tuned on {target} ({known})")
    return _tuned(sites, machine, effort=effort, seed=seed, budget=budget, progress=progress)


def tune_kernel(
    kernel: str,
    shape: Mapping[str, int],
    dtype: str,
    *,
    target: str,
    effort: str = "default",
    seed: int = 0,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune one kernel at one shape; errors as of ``search.tune_problem.site_of``."""
    machine = load_target(target)
    _require_compiler(machine)
    site = site_of(kernel, shape, dtype, machine)
    return _tuned((site,), machine, effort=effort, seed=seed, budget=budget, progress=progress or Silent())


def export_records(path: Path) -> int:
    """Write the best records of the cache to a file; how many those are."""
    return exported(Database(tuning_file()), path)


def import_records(path: Path, *, progress: Progress | None = None) -> Imported:
    """Take the records of a file that hold here into the cache."""
    kernels.register()
    workshops: dict[str, Workshop] = {}

    def laboratory(architecture: str) -> Workshop:
        if architecture not in workshops:
            workshops[architecture] = Workshop(architecture)
        return workshops[architecture]

    try:
        return imported(path, Database(tuning_file()), laboratory, progress or Silent())
    finally:
        for workshop in workshops.values():
            workshop.close()


def _launched(graph: Graph, plan: Plan | None, passes: Sequence[str], target: Target) -> Iterator[Graph]:
    """The graphs of a Triton engine of every phase and segment."""
    if plan and passes:
        raise UsageError("--plan and --pass exclude each other: a plan says itself which passes run")
    if passes:
        plan = Plan(graph.fingerprint, target.name, (Phase(tuple(Step(text, {}) for text in passes)),))
    phases = [apply(plan, graph, target, phase=number) for number in range(len(plan.phases))] if plan else [graph]
    for phase in phases:
        for segment in segments(plan, phase) if plan else (phase,):
            yield run_passes(TritonBackend.passes, segment, target)


def _require_compiler(target: Target) -> None:
    if reason := TritonBackend().why_not_target(target):
        raise Unsupported(f"target {target.name}: {reason}")


def _tuned(
    sites: Sequence[Site], target: Target, *, effort: str, seed: int, budget: float | None, progress: Progress
) -> Tuning:
    """Every site in turn, each with an equal share of the time that is left."""
    database, workshop = Database(tuning_file()), Workshop(target.architecture)
    end = time.monotonic() + budget if budget else float("inf")
    found: list[Tuned] = []
    try:
        for index, site in enumerate(sites):
            now = time.monotonic()
            share = now + (end - now) / (len(sites) - index)
            progress.start(f"{index + 1}/{len(sites)} {site.key}", EFFORTS[effort].candidates)
            found.append(
                tune(
                    site,
                    target,
                    database,
                    workshop,
                    effort=EFFORTS[effort],
                    seed=seed,
                    deadline=share,
                    progress=progress,
                )
            )
            progress.finish()
    finally:
        workshop.close()
    stale = sum(database.stale(site.key) for site in sites)
    complete = all(one.complete for one in found)
    return Tuning(tuple(found), workshop.clock, database.path, stale, database.broken, complete)
