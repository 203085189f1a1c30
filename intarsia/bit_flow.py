"""From a model and a user's data, or the model's own loop, to a plan that gives every layer its bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch

from intarsia import subject as subjects
from intarsia.calibration_data import read
from intarsia.calibration_files import Scaling
from intarsia.finetune_data import function_calls, is_function, read_samples, samples_a_call
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.sizes import names
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType
from intarsia.loop_data import PROMPTS, recorded
from intarsia.search.bit_data import Data
from intarsia.search.bit_search import search_bits
from intarsia.search.bit_settings import BitSearch
from intarsia.search.bit_study import Part
from intarsia.search.journal import open_journal
from intarsia.search.loop_phases import step_ranges
from intarsia.search.progress import Progress
from intarsia.search.quality import Goal
from intarsia.search.search import SearchResult
from intarsia.timing import measured_layers

EVERY = {"quick": 16, "default": 8, "full": 4}
"""Of how many steps of a video one is looked at, by effort."""

A_PHASE = {"quick": 4, "default": 16, "full": 32}
"""Calibration samples of each phase of a loop that sensitivities are measured on, by effort; a call has two."""

A_CALL = 16
"""Samples of one call where the graph leaves their number open."""

SAMPLES = 256
"""Samples that are taken, at most, where nobody says how many."""


@dataclass(frozen=True)
class Samples:
    """What a network without a loop is measured on.

    Attributes:
        data: As ``intarsia calibrate --data`` takes it; a function may yield labels (N) behind the inputs.
        labels: An ``.npy`` with one class a sample of files, in the order of their paths.
        limit: Samples, at most.
        seed: Of the draw, where files hold more.
        scaling: Of pictures.
    """

    data: str
    labels: Path | None = None
    limit: int = SAMPLES
    seed: int = 0
    scaling: Scaling | None = None


def searched_bits(
    subject: subjects.Subject,
    target: Target,
    goal: Goal | None,
    *,
    how: BitSearch,
    samples: Samples | None,
    minimize: str,
    effort: str,
    seed: int,
    fresh: bool,
    budget: float | None,
    weights: Path | None,
    progress: Progress,
) -> SearchResult:
    """The plan of ``search.bit_search`` for a model: on calls of its loop where it has one, on ``samples`` otherwise.

    Raises:
        UsageError: ``samples`` for a model with a loop, none for one without, or samples that do not fit.
    """
    workload = subjects.workload(subject, seed=seed, effort=effort, progress=progress, record=False)
    program = subject.program
    if workload.loop is not None:
        if samples is not None:
            raise UsageError(f"{subject.name} has a loop of its own, whose calls it is measured on: leave --data out")
        how = replace(how, samples=how.samples or A_PHASE[effort])
        parts = parts_of_loop(subject, how.phases, effort=effort, seed=seed, progress=progress)
        facts: dict[str, object] = {
            "data": f"calls of the model's loop in {PROMPTS} videos of calibration prompts and noise"
        }
    else:
        if samples is None:
            raise UsageError(
                "strategy bits: --data is missing; ranges and sensitivities are measured on it, such as --data "
                "pictures/ --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
            )
        if how.phases > 1:
            raise UsageError(f"strategy bits: phases={how.phases}: {subject.name} has no loop, and so no phases")
        program = _open(subject, weights)
        progress.start("looking through the data", None)
        data = _read(samples, program.graph)
        parts = (Part(data),)
        count = sum(len(batch[0]) for batch in data.batches)
        facts = {"data": samples.data, "samples": count, "labels": data.labels is not None}
    found = search_bits(
        program,
        target,
        parts,
        how=how,
        goal=goal,
        workload=workload if workload.loop else None,
        minimize=minimize,
        effort=effort,
        seed=seed,
        journal=open_journal(program, workload, fresh=fresh),
        budget=budget,
        facts=facts,
        price=measured_layers(target) if how.costs == "measured" else None,
        progress=progress,
    )
    if program is subject.program:
        return found
    return replace(found, plan=replace(found.plan, graph=subject.program.graph.fingerprint))


def parts_of_loop(
    subject: subjects.Subject, phases: int, *, effort: str, seed: int, progress: Progress
) -> tuple[Part, ...]:
    """The phases of the loop of a model with a sampler, with calls of many prompts at some steps of each.

    Half of the rows of one call are guidance.
    """
    assert subject.model is not None
    assert subject.model.sampler is not None
    steps = subject.model.sampler.steps
    ranges = step_ranges(steps, phases)
    ends = {step for range_ in ranges for step in range_}
    calls = recorded(subject, every=EVERY[effort], always=ends, seed=seed, progress=progress)

    def part(first: int, last: int) -> Part:
        within = [call for call in calls if first <= call.step <= last]
        return Part(
            Data([call.inputs for call in within], squared=True),
            first,
            last if len(ranges) > 1 else None,
            (last - first + 1) / steps,
            Data([call.inputs for call in within if call.staggered], squared=True),
        )

    return tuple(part(*range_) for range_ in ranges)


def _read(samples: Samples, graph: Graph) -> Data:
    """The samples as calls, with their labels where there are any."""
    if is_function(samples.data):
        if samples.labels is not None:
            raise UsageError(f"--labels {samples.labels}: a function yields its labels itself, behind the inputs")
        each = samples_a_call(graph) or A_CALL
        calls = list(islice(function_calls(samples.data, graph)(0), max(1, samples.limit // each)))
    elif samples.labels is not None:
        found = read_samples(samples.data, samples.labels, graph, samples.scaling, option="--labels")
        drawn = random.Random(samples.seed).sample(range(len(found)), min(samples.limit, len(found)))
        calls = list(found.calls(torch.tensor(sorted(drawn)), samples_a_call(graph) or A_CALL))
    else:
        batches = read(samples.data, graph, limit=samples.limit, seed=samples.seed, scaling=samples.scaling)
        return Data(list(batches))
    if not calls:
        raise UsageError(f"--data {samples.data}: there is nothing to calibrate on")
    labels = [call.labels for call in calls]
    known = all(one is not None for one in labels)
    return Data([call.inputs for call in calls], cast("Sequence[torch.Tensor]", labels) if known else None)


def _open(subject: subjects.Subject, weights: Path | None) -> Program:
    """The program, traced again with an open number of samples where the model allows that: fewer and larger calls."""
    graph, model = subject.program.graph, subject.model
    axes = model.dynamic.items() if model else ()
    sizes = {text for _, of_input in axes for axis, text in of_input.items() if axis == 0 and names(text) == {text}}
    fixed = all(isinstance(value.type, TensorType) and isinstance(value.type.shape[0], int) for value in graph.inputs)
    if not (sizes and fixed):
        return subject.program
    program = subjects.resolve(
        subject.name, dynamic=subjects.dynamic_axes(subject.name, sorted(sizes)), weights=weights
    ).program
    if not graph.values.keys() <= program.graph.values.keys():
        return subject.program
    return Program(program.graph, {name: subject.program.weights[name] for name in program.weights})
