"""How often a network names the right class, for a module and for an engine alike."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from intarsia.ir.errors import UsageError


@dataclass(frozen=True)
class Classified:
    """Share of pictures whose largest logit is the label's, 0 to 1, and all logits (N, classes), f32, on the CPU."""

    accuracy: float
    logits: Tensor


def classify(
    network: Callable[[Tensor], Tensor | Sequence[Tensor]], pictures: Tensor, labels: Tensor, *, batch: int = 500
) -> Classified:
    """What `network` says of pictures (N, C, H, W), given `batch` at a time on their device.

    It answers with logits, or with a tuple that starts with them, as modules and engines do. Every batch is whole, so
    that an engine of fixed shape can be judged: the last one is filled up with zeros, whose answers are dropped.
    Raises UsageError where there is nothing to judge or the counts differ.
    """
    if len(pictures) != len(labels) or not len(pictures):
        raise UsageError(
            f"classify: {len(pictures)} pictures and {len(labels)} labels; give as many of both, at least one"
        )
    with torch.inference_mode():
        logits = torch.cat(list(_answers(network, pictures, batch)))
    right = int((logits.argmax(1) == labels.cpu()).sum())
    return Classified(right / len(labels), logits)


def _answers(network: Callable[[Tensor], Tensor | Sequence[Tensor]], pictures: Tensor, batch: int) -> Iterator[Tensor]:
    for part in pictures.split(batch):
        whole = functional.pad(part, (0, 0) * 3 + (0, batch - len(part)))
        said = network(whole)
        logits = said if isinstance(said, Tensor) else said[0]
        yield logits[: len(part)].float().cpu()
