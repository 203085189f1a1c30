"""What a network is asked to do while plans are compared: inputs to be sensitive on, and whole answers to be judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from intarsia.search.progress import Progress

Run = Callable[..., tuple[Tensor, ...]]
"""One call of the network: tensors in the graph's input order in, tensors in output order out."""

Split = Literal["calibration", "validation", "held-out"]
"""Disjoint noise: to measure sensitivity on, to choose a plan by, and to report."""

Outputs = Callable[[Run, Split, Progress], Tensor]
"""Whole answers of the network, one sample a row: videos (N, C, F, H, W) in [-1, 1], or anything (N, ...)."""


Together = Callable[[Sequence[tuple[Tensor, ...]]], Sequence[Tensor]]
"""One step of a loop for all its samples: the inputs of every call in, the first output of every call out."""


@dataclass(frozen=True)
class Loop:
    """The denoising loop around a network.

    Attributes:
        steps: Calls one after the other that make a sample.
        record: Inputs of the unchanged network's calls at these steps, for a split: by step, all samples.
        together: Loops over a step for all samples of a split side by side, and gives the same as ``Workload.outputs``.
        by_step: One network of several, each with the first and the last step that it serves.
        guide: What the loop keeps of the rows of one call's output, a linear function.
    """

    steps: int
    record: Callable[[Split, Sequence[int], Progress], Sequence[Sequence[tuple[Tensor, ...]]]]
    together: Callable[[Together, Split, Progress], Tensor]
    by_step: Callable[[Sequence[tuple[int, int, Run]]], Run]
    guide: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """Inputs and answers of a network, and the facts that identify them.

    Attributes:
        calibration: Inputs of single calls, each a tuple in the graph's input order, from all parts of the loop.
        outputs: Loops over a network, a sampler say, for a split; the same network gives the same tensor.
        describe: Plain JSON values that tell this workload from others (sampler, prompts, seed, counts).
        loop: The loop, where the network is called in one.
    """

    calibration: tuple[tuple[Tensor, ...], ...]
    outputs: Outputs
    describe: Mapping[str, object] = field(default_factory=dict[str, object])
    loop: Loop | None = None
