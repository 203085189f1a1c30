"""What fine-tuning makes small: the distance from the float network's answers, and from labels where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from intarsia.ir.errors import UsageError
from intarsia.search.sensitivity import Batch

KINDS = ("classes", "numbers")


@dataclass(frozen=True)
class Call:
    """Inputs of one call, in the graph's order, and the right classes (N) where they are known."""

    inputs: Batch
    labels: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """The loss of a network's first output beside the float network's.

    Attributes:
        outputs: ``classes``: scores (N, classes), compared by the Kullback-Leibler divergence of their softmax at
            ``temperature``, times its square. ``numbers``: any output, compared by the mean squared difference.
        temperature: Above 0.
        distillation: Share of that divergence where there are labels; the rest is their cross entropy. 0 to 1.

    Source: Hinton et al. (arXiv 1503.02531), section 2; HAWQ-V3 distils at a temperature of 6 with a share of 0.95.
    """

    outputs: str = "classes"
    temperature: float = 4.0
    distillation: float = 0.9

    def __post_init__(self) -> None:
        if self.outputs not in KINDS:
            raise UsageError(f"loss: outputs {self.outputs!r} is unknown. Known: {', '.join(KINDS)}")
        if not self.temperature > 0:
            raise UsageError(f"loss: temperature is {self.temperature}; it is above 0")
        if not 0 <= self.distillation <= 1:
            raise UsageError(f"loss: distillation is {self.distillation}; it is a share from 0 to 1")

    def __call__(self, output: Tensor, taught: Tensor, labels: Tensor | None) -> Tensor:
        """A scalar, in the mean over samples; ``taught`` is the float network's answer."""
        if self.outputs == "numbers":
            return mse_loss(output, taught)
        new, old = log_softmax(output / self.temperature, -1), log_softmax(taught / self.temperature, -1)
        divergence = kl_div(new, old, reduction="batchmean", log_target=True) * self.temperature**2
        if labels is None:
            return divergence
        return self.distillation * divergence + (1 - self.distillation) * cross_entropy(output, labels)


def check(call: Call, output: Tensor, loss: Loss) -> None:
    """UsageError unless the loss can be taken of this answer to this call."""
    if loss.outputs == "numbers":
        if call.labels is not None:
            raise UsageError("fine-tuning: there are labels, and outputs are said to be numbers; leave out one")
        return
    if output.ndim != 2:
        raise UsageError(
            f"fine-tuning: the first output is {tuple(output.shape)}, no scores (N, classes); "
            "say that outputs are numbers"
        )
    if call.labels is None:
        return
    if tuple(call.labels.shape) != (len(output),) or call.labels.is_floating_point():
        kind = str(call.labels.dtype).removeprefix("torch.")
        raise UsageError(
            f"fine-tuning: labels are {tuple(call.labels.shape)} of {kind}; {len(output)} samples want as many classes"
        )
    low, high = int(call.labels.min()), int(call.labels.max())
    if low < 0 or high >= output.shape[1]:
        raise UsageError(
            f"fine-tuning: labels lie from {low} to {high}; the network has classes 0 to {output.shape[1] - 1}"
        )


@dataclass(frozen=True)
class Score:
    """How a network does on held-out samples.

    Attributes:
        loss: As it is trained by, in the mean.
        agreement: Share of samples on which it names the float network's class; None where outputs are no classes.
        accuracy: Share of samples on which it names the label; None without labels.
    """

    loss: float
    agreement: float | None = None
    accuracy: float | None = None

    @classmethod
    def from_json(cls, facts: object) -> Score:
        """What ``asdict`` gave and a log kept."""
        assert isinstance(facts, dict)
        return cls(**facts)

    def __str__(self) -> str:
        """``loss 0.0123, 95.20% as float, 88.10% right``."""
        shares = {"as float": self.agreement, "right": self.accuracy}
        return ", ".join([f"loss {self.loss:.4g}", *(f"{share:.2%} {name}" for name, share in shares.items() if share)])


def score(outputs: Sequence[Tensor], taught: Sequence[Tensor], calls: Sequence[Call], loss: Loss) -> Score:
    """The score of answers to all calls together."""
    output, told = torch.cat(list(outputs)), torch.cat(list(taught))
    parts = [call.labels for call in calls if call.labels is not None]
    labels = torch.cat(parts).to(output.device) if len(parts) == len(calls) else None
    value = float(loss(output, told, labels))
    if loss.outputs == "numbers":
        return Score(value)
    named = output.argmax(1)
    right = None if labels is None else float((named == labels).float().mean())
    return Score(value, float((named == told.argmax(1)).float().mean()), right)
