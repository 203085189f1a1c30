"""Calls of a model's own denoising loop as calibration data: of many prompts, each at some of its steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from intarsia.backends.by_step import TIMESTEP
from intarsia.backends.null import NullEngine
from intarsia.backends.runner import denoiser
from intarsia.ir.program import materialize
from intarsia.models.sampler import Denoise, noise
from intarsia.search.progress import Progress
from intarsia.search.workload import Run
from intarsia.subject import Subject, asked_of, video_shape

PROMPTS = 16
"""Videos that are looked at: what a prompt's words make of a network, no other prompt shows. Validation videos of
wan-mini in W8A8 are at 21.7 dB with one prompt, 26.5 with 4, 36.7 to 40.9 with 8, by which they are, 42.0 with 16."""


@dataclass(frozen=True)
class Recorded:
    """One call of the unchanged network.

    Attributes:
        video: Its number.
        step: Of the loop.
        staggered: Whether it is one of those that are spread evenly over videos and steps.
        inputs: In the graph's order.
    """

    video: int
    step: int
    staggered: bool
    inputs: tuple[Tensor, ...]


def recorded(
    subject: Subject, *, every: int, always: Collection[int], seed: int, progress: Progress, run: Run | None = None
) -> tuple[Recorded, ...]:
    """Calls of ``PROMPTS`` videos of the calibration split, in the order of steps, then of videos.

    Video i is seen at every ``every``-th step from -i on, so that with at most ``PROMPTS`` all together see every step,
    and at the steps ``always``: what the network is told of the time must not leave the range that was seen, so these
    are the ends of whatever is calibrated together.

    Args:
        subject: A model with a sampler and prompts.
        run: The unchanged network; eager PyTorch unless given.
    """
    graph, model = subject.program.graph, subject.model
    assert model is not None
    assert model.sampler is not None
    assert model.condition is not None
    prompts, noise_seed = asked_of(model, "calibration", PROMPTS, seed)
    timesteps, network = model.sampler.timesteps(), run or NullEngine(materialize(subject.program))
    at = [value.name for value in graph.inputs].index(TIMESTEP)
    found: list[Recorded] = []
    progress.start("calibration videos", len(prompts) * model.sampler.steps)
    for video, prompt in enumerate(prompts):

        def record(*inputs: Tensor, video: int = video) -> tuple[Tensor, ...]:
            told = float(inputs[at].flatten()[0])
            step = min(range(len(timesteps)), key=lambda number: abs(timesteps[number] - told))
            staggered = (step + video) % every == 0
            if staggered or step in always:
                found.append(Recorded(video, step, staggered, tuple(tensor.clone() for tensor in inputs)))
            progress.advance()
            return network(*inputs)

        start = noise(video_shape(graph), seed=noise_seed, count=1, first=video)
        model.sampler.sample(cast("Denoise", denoiser(record, graph)), start, model.condition([prompt]))
    progress.finish()
    return tuple(sorted(found, key=lambda call: (call.step, call.video)))
