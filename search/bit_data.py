"""What sensitivities to bits are measured on: calibration inputs, and a loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.search.sensitivity import Batch

LOSSES = ("labels", "distillation", "squared")


@dataclass(frozen=True)
class Data:
    """Calibration inputs with a loss; the network's first output is what the loss looks at.

    ``labels`` is cross entropy with what the user knows to be right. Without labels the loss is the distance from the
    unchanged network's own answer: ``distillation``, the Kullback-Leibler divergence of classes (N, classes), or
    ``squared``, half the squared difference of any output, for networks that do not classify. Both are 0 with a
    gradient of 0 where they are measured; their Hessian is the Gauss-Newton matrix, so no trace is negative.

    Attributes:
        batches: Inputs of single calls, each a tuple in the graph's input order.
        labels: Right classes (N) of each batch; None where they are not known.
        squared: Whether outputs are numbers rather than scores of classes.
    """

    batches: Sequence[Batch]
    labels: Sequence[Tensor] | None = None
    squared: bool = False

    @property
    def loss(self) -> str:
        """One of ``LOSSES``."""
        if self.labels is not None:
            return "labels"
        return "squared" if self.squared else "distillation"

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over inputs, labels and the loss."""
        digest = sha256(self.loss.encode())
        for tensor in (*(tensor for batch in self.batches for tensor in batch), *(self.labels or ())):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def shares(self) -> tuple[float, ...]:
        """Each batch's share of all samples."""
        counts = [batch[0].shape[0] for batch in self.batches]
        return tuple(count / sum(counts) for count in counts)

    def value(self, output: Tensor, number: int, unchanged: Tensor) -> Tensor:
        """The loss of the batch of this number, in the mean over its samples; ``unchanged`` is the float answer."""
        match self.loss:
            case "labels":
                assert self.labels is not None
                return cross_entropy(output, self.labels[number])
            case "squared":
                return (output - unchanged).square().sum() / (2 * len(output))
            case _:
                new, old = log_softmax(output, -1), log_softmax(unchanged, -1)
                return kl_div(new, old, reduction="batchmean", log_target=True)

    def score(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient's expected square is the diagonal of the Fisher information, summed over samples.

        The log likelihood of answers drawn from the network's own distribution: of samples that are drawn one by one,
        what two contribute is 0 on average, so a batch needs one gradient. Labels are not looked at.
        """
        if self.squared and self.labels is None:
            noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            return (noise.to(output.device) * output).sum()
        logs = log_softmax(output, -1)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(output.device)
        return logs.gather(-1, drawn).sum()


def check(data: Data, graph: Graph) -> None:
    """UsageError in one line if there is nothing to measure on, or something that no number comes out of."""
    if not data.batches:
        raise UsageError("sensitivity: there are no calibration inputs; give at least one batch")
    for number, batch in enumerate(data.batches):
        if len(batch) != len(graph.inputs):
            raise UsageError(f"sensitivity: batch {number} has {len(batch)} inputs, the graph {len(graph.inputs)}")
        for value, tensor in zip(graph.inputs, batch, strict=True):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UsageError(f"sensitivity: batch {number}: %{value.name} holds values that are not finite")
    if data.labels is None:
        return
    if data.squared:
        raise UsageError("sensitivity: labels are given, and outputs are said to be numbers; leave out one")
    if len(data.labels) != len(data.batches):
        raise UsageError(f"sensitivity: {len(data.labels)} batches have labels, of {len(data.batches)}")
    for number, (batch, labels) in enumerate(zip(data.batches, data.labels, strict=True)):
        if tuple(labels.shape) != (batch[0].shape[0],):
            raise UsageError(
                f"sensitivity: batch {number} has {batch[0].shape[0]} samples, its labels are {tuple(labels.shape)}"
            )
