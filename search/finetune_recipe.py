"""How weights move in fine-tuning: steps, rates, and what is made small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.search.finetune_loss import Loss

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Recipe:
    """How the weights move: up to ``learning_rate`` along a line, and down to 0 along half a cosine.

    Attributes:
        steps: In all; the data begins anew, with the next epoch's number, where it ends.
        learning_rate: At its peak.
        calls: Of the network in each step, whose gradients are added up.
        optimizer: ``sgd`` (Nesterov's momentum) or ``adamw``.
        momentum: Of ``sgd``.
        weight_decay: On weights of two or more axes.
        warm_up: Share of the steps.
        loss: What is made small.
        device: Where PyTorch trains.
    """

    steps: int
    learning_rate: float = 0.01
    calls: int = 1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: float = 0.05
    loss: Loss = field(default_factory=Loss)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer {self.optimizer!r} is unknown. Known: {', '.join(OPTIMIZERS)}")
        if self.steps < 1 or self.calls < 1:
            raise UsageError(f"fine-tuning: {self.steps} steps of {self.calls} calls; it takes one of each or more")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"fine-tuning: warm_up is {self.warm_up}; it is a share of the steps, below 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UsageError(f"fine-tuning: the learning rate is {self.learning_rate}; it is above 0")

    def rate(self, step: int) -> float:
        """The learning rate of the step of this number, from 0."""
        share = (step + 0.5) / self.steps
        if share < self.warm_up:
            return self.learning_rate * share / self.warm_up
        return self.learning_rate * (1 + math.cos(math.pi * (share - self.warm_up) / (1 - self.warm_up))) / 2

    def optimizer_of(self, leaves: Sequence[Tensor]) -> torch.optim.Optimizer:
        """What moves these leaves."""
        groups = [
            {"params": [leaf for leaf in leaves if leaf.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [leaf for leaf in leaves if leaf.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.learning_rate)
        nesterov = self.momentum > 0
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=nesterov)

    def settings(self) -> dict[str, object]:
        """All of it by name, the loss's settings among them; plain JSON values."""
        found = asdict(self)
        return {**found, **found.pop("loss")}
