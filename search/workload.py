"""What a network is asked to do while plans are compared: inputs to be sensitive on, and whole answers to be judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Workload:
    """Inputs and answers of a network, and the facts that identify them.

    Attributes:
        calibration: Inputs of single calls, each a tuple in the graph's input order, from all parts of the loop.
        outputs: Loops over a network, a sampler say, for a split; the same network gives the same tensor.
        describe: Plain JSON values that tell this workload from others (sampler, prompts, seed, counts).
    """

    calibration: tuple[tuple[Tensor, ...], ...]
    outputs: Outputs
    describe: Mapping[str, object] = field(default_factory=dict[str, object])
