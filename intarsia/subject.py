"""What is being worked on: a model by name, a graph file or a user's module, and how to judge a changed one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from intarsia.backends.by_step import TIMESTEP, at_timestep
from intarsia.backends.by_step import by_step as phased
from intarsia.backends.null import NullEngine
from intarsia.backends.phases import step_ranges
from intarsia.backends.runner import denoiser, denoiser_together
from intarsia.ir.errors import UsageError
from intarsia.ir.exported import Dynamic
from intarsia.ir.exported import trace as trace_module
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase
from intarsia.ir.program import Program, example_inputs, load_program, materialize
from intarsia.ir.sizes import names
from intarsia.ir.types import TensorType
from intarsia.models import base as models
from intarsia.models.sampler import noise
from intarsia.models.sampler_files import read_sampler
from intarsia.passes.base import find_pass
from intarsia.search.progress import Progress
from intarsia.search.workload import Loop, Run, Together, Workload

if TYPE_CHECKING:
    from intarsia.models.sampler import Denoise, FlowMatchEuler

SPLITS = ("calibration", "validation", "held-out")
"""Disjoint noise: errors are measured on the first, the search looks at the second, claims are made on the third."""

SAMPLES: Mapping[str, Mapping[str, int]] = {
    "quick": {"calibration": 1, "validation": 3, "held-out": 8},
    "default": {"calibration": 2, "validation": 6, "held-out": 16},
    "full": {"calibration": 4, "validation": 16, "held-out": 64},
}
"""Videos (or batches of random inputs) drawn for each split, by effort."""

RECORDED_STEPS = 4
"""Denoising steps of each calibration video, evenly spread, at which the denoiser's inputs are kept."""


@dataclass(frozen=True)
class Subject:
    """A program with the name it goes by, and the model of the registry it came from, if any."""

    name: str
    program: Program
    model: models.Model | None = None


def resolve(
    model: str | Path | nn.Module,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    static: Mapping[str, object] | None = None,
    dynamic: Dynamic | None = None,
    meta: bool = False,
    raw: bool = False,
    weights: Path | None = None,
) -> Subject:
    """The subject that ``model`` stands for: a name of the registry, the path of a ``.graph`` file, or a module.

    Args:
        model: A module needs ``inputs``, example tensors by the names of its forward's parameters.
        inputs: Example inputs; a registered model has its own.
        static: Arguments of forward that are fixed.
        dynamic: Axes that may vary, such as ``{"x": {0: "N"}}``.
        meta: Build without memory for weights.
        raw: Keep the trace as it came, without the clean-up passes.
        weights: Safetensors (a file or a folder) to use in place of shipped or random weights.

    Raises:
        UsageError: Unknown model, missing file, or a module without inputs.
        Unsupported: The model cannot be traced.
    """
    if isinstance(model, nn.Module):
        if inputs is None:
            raise UsageError("trace of a module needs inputs={name: example tensor}")
        program = trace_module(model, inputs, static=static, dynamic=dynamic)
        return Subject(program.graph.name, program if raw else clean(program))
    if str(model).endswith(".graph"):
        program = load_program(Path(model), weights=weights)
        return Subject(program.graph.name, program, registered(program.graph.name))
    found = models.find(str(model))
    module = models.meta(found) if meta else models.load(found, weights=weights)
    with torch.device("meta" if meta else "cpu"):
        examples = _long_enough(inputs or found.inputs(), dynamic or {})
    program = trace_module(module, examples, static=found.static, dynamic=dynamic, name=found.name)
    return Subject(found.name, program if raw else clean(program), found)


def with_sampler(subject: Subject, path: Path | None) -> Subject:
    """The subject with the loop that a file describes (``models.sampler_files``); itself without a file.

    Raises:
        UsageError: The model has no loop, or the file describes none that is built.
    """
    if path is None:
        return subject
    model = subject.model
    if model is None or model.sampler is None:
        raise UsageError(f"--sampler {path}: {subject.name} has no denoising loop")
    return replace(subject, model=replace(model, sampler=read_sampler(path, model.sampler)))


def _long_enough(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, Tensor]:
    """The inputs with axes that vary repeated where they are 1 long: torch.export takes such an axis for fixed."""
    return {
        key: value.repeat([2 if axis in dynamic.get(key, {}) and n == 1 else 1 for axis, n in enumerate(value.shape)])
        for key, value in inputs.items()
    }


def dynamic_axes(model: str, sizes: Sequence[str]) -> Dynamic:
    """The axes of a registered model whose extents are named by ``sizes``; UsageError for a size it does not have."""
    found = models.find(model)
    known = sorted({name for axes in found.dynamic.values() for text in axes.values() for name in names(text)})
    if unknown := [size for size in sizes if size not in known]:
        raise UsageError(f"{model}: size {unknown[0]!r} cannot vary; those that can are {', '.join(known) or 'none'}")
    return {
        key: kept
        for key, axes in found.dynamic.items()
        if (kept := {axis: text for axis, text in axes.items() if names(text) <= set(sizes)})
    }


def smallest_sizes(graph: Graph) -> dict[str, int]:
    """The least value of each named size that is not degenerate: 2 or what its range begins with."""
    return {size.name: max(size.minimum, 2) for size in graph.sizes}


def clean(program: Program) -> Program:
    """The program after the clean-up passes, parameters that nobody uses dropped."""
    from intarsia.ir.target import load_target

    graph = find_pass("clean").run(program.graph, load_target("null"), {})
    return Program(graph, {param.name: program.weights[param.name] for param in graph.params})


def registered(name: str) -> models.Model | None:
    """The model of the registry that a graph was traced from, by its name."""
    return models.find(name) if name in models.names() else None


def workload(subject: Subject, *, seed: int, effort: str, progress: Progress, record: bool = True) -> Workload:
    """What the search judges a changed program by.

    A model with a sampler and prompts is judged on whole videos; any other graph on its outputs for random inputs.
    ``record=False`` leaves out the calibration inputs, which cost whole videos of the unchanged model.
    """
    if effort not in SAMPLES:
        raise UsageError(f"effort {effort!r} is unknown. Known: {', '.join(SAMPLES)}")
    model, graph = subject.model, subject.program.graph
    if model is None or model.sampler is None or model.condition is None:
        return _random_workload(graph, model.sampler if model else None, seed=seed, effort=effort)
    videos = _VideoWorkload(graph, model, seed, effort)
    loop = videos.loop(subject.program)
    calls = loop.record("calibration", videos.spread_steps(), progress) if record else ()
    spread = tuple(call for samples in zip(*calls, strict=True) for call in samples)
    return Workload(spread, videos.outputs, videos.describe(), loop)


def _random_workload(graph: Graph, sampler: FlowMatchEuler | None, *, seed: int, effort: str) -> Workload:
    """Outputs for random inputs; a denoiser's timesteps are of steps spread evenly over its sampler's loop."""

    def batches(split: str) -> list[tuple[Tensor, ...]]:
        first, count = seed * 3_000 + 1_000 * SPLITS.index(split), 4 * SAMPLES[effort][split]
        made = [example_inputs(graph, seed=first + index) for index in range(count)]
        if sampler is None:
            return made
        steps = sampler.timesteps()
        spread = [steps[(2 * index + 1) * len(steps) // (2 * count)] for index in range(count)]
        return [at_timestep(inputs, graph, step) for inputs, step in zip(made, spread, strict=True)]

    def outputs(run: Run, split: str, progress: Progress) -> Tensor:
        with torch.no_grad():
            return torch.cat([run(*batch)[0].float() for batch in batches(split)])

    describe = {
        "kind": "outputs on random inputs",
        "seed": seed,
        "effort": effort,
        "samples": {split: 4 * count for split, count in SAMPLES[effort].items()},
        **({"sampler": json.loads(sampler.to_json())} if sampler else {}),
    }
    return Workload(tuple(batches("calibration")), outputs, describe)


@dataclass(frozen=True)
class _VideoWorkload:
    """Whole videos from the model's sampler, one guided video a run."""

    graph: Graph
    model: models.Model
    seed: int
    effort: str

    def describe(self) -> dict[str, object]:
        """What tells this workload from others."""
        return {
            "kind": "videos",
            "model": self.model.name,
            "seed": self.seed,
            "effort": self.effort,
            "samples": dict(SAMPLES[self.effort]),
            "sampler": json.loads(self._sampler.to_json()),
        }

    @property
    def _sampler(self) -> FlowMatchEuler:
        assert self.model.sampler is not None
        return self.model.sampler

    def outputs(self, run: Run, split: str, progress: Progress) -> Tensor:
        """Videos (N, C, F, H, W) in [-1, 1] of a split."""
        return self._videos(cast("Denoise", denoiser(run, self.graph)), split, progress)

    def _videos(self, denoise: Denoise, split: str, progress: Progress) -> Tensor:
        prompts, seed = self._asked(split)
        progress.start(f"{split} videos", len(prompts) * self._sampler.steps)
        made = sampled(denoise, self.graph, self.model, self._sampler, prompts, seed=seed, progress=progress)
        progress.finish()
        return made

    def loop(self, program: Program) -> Loop:
        """The sampler's loop around ``program``."""
        sampler = self._sampler

        def by_step(served: Sequence[tuple[int, int, Run]]) -> Run:
            ranges = step_ranges([Phase((), first, last) for first, last, _ in served], sampler.timesteps())
            return phased([run for *_, run in served], ranges, self.graph)

        def together(step: Together, split: str, progress: Progress) -> Tensor:
            prompts, seed = self._asked(split)
            start = noise(video_shape(self.graph), seed=seed, count=len(prompts))
            assert self.model.condition is not None
            denoise = cast("Denoise", denoiser_together(step, self.graph))
            return sampler.sample(denoise, start, self.model.condition(prompts)).clamp(-1, 1)

        return Loop(sampler.steps, partial(self._recorded, program), together, by_step, sampler.guide)

    def spread_steps(self) -> list[int]:
        """Denoising steps, evenly spread."""
        every = max(1, self._sampler.steps // RECORDED_STEPS)
        return list(range(every // 2, self._sampler.steps, every))

    def _asked(self, split: str) -> tuple[list[str], int]:
        return asked_of(self.model, split, SAMPLES[self.effort][split], self.seed)

    def _recorded(
        self, program: Program, split: str, steps: Sequence[int], progress: Progress
    ) -> list[list[tuple[Tensor, ...]]]:
        """The inputs of the unchanged denoiser's calls at ``steps``, by step, of all videos of a split."""
        run, timesteps = NullEngine(materialize(program)), self._sampler.timesteps()
        at = [value.name for value in self.graph.inputs].index(TIMESTEP)
        recorded: dict[int, list[tuple[Tensor, ...]]] = {step: [] for step in steps}

        def record(*inputs: Tensor) -> tuple[Tensor, ...]:
            told = float(inputs[at].flatten()[0])
            step = min(range(len(timesteps)), key=lambda number: abs(timesteps[number] - told))
            if step in recorded:
                recorded[step].append(tuple(tensor.clone() for tensor in inputs))
            return run(*inputs)

        self._videos(cast("Denoise", denoiser(record, self.graph)), split, progress)
        return [recorded[step] for step in steps]


def asked_of(model: models.Model, split: str, count: int, seed: int) -> tuple[list[str], int]:
    """So many prompts of a split, and the seed of its noise; splits share neither, with three prompts or more.

    Each split has a third of the prompts, which recur, with other noise, where more are asked for.
    """
    place, known = SPLITS.index(split), model.prompts
    room = max(1, len(known) // len(SPLITS))
    prompts = [known[(seed + room * place + index % room) % len(known)] for index in range(count)]
    return prompts, len(SPLITS) * seed + place


def video_shape(graph: Graph) -> tuple[int, ...]:
    """Extents (C, F, H, W) of one video of the graph's first input; UsageError if they are not fixed."""
    type_ = graph.inputs[0].type
    assert isinstance(type_, TensorType)
    if not all(isinstance(dim, int) for dim in type_.shape[1:]):
        raise UsageError(f"graph {graph.name}: videos need fixed sizes, input %{graph.inputs[0].name} is {type_}")
    return tuple(int(dim) for dim in type_.shape[1:])


def sampled(
    denoise: Denoise,
    graph: Graph,
    model: models.Model,
    sampler: FlowMatchEuler,
    prompts: Sequence[str],
    *,
    seed: int,
    progress: Progress,
) -> Tensor:
    """Videos (N, C, F, H, W) in [-1, 1], one a prompt, one after the other; video i has noise i of ``seed``."""
    assert model.condition is not None
    made: list[Tensor] = []
    for index, prompt in enumerate(prompts):
        start = noise(video_shape(graph), seed=seed, count=1, first=index)
        conditioning = model.condition([prompt])
        made.append(sampler.sample(denoise, start, conditioning, progress=lambda _done, _all: progress.advance()))
    return torch.cat(made).clamp(-1, 1)
