"""Trains wan-mini by flow matching on videos of moving shapes, then reads the labels off what it samples.

python -m intarsia.models.train_wan_mini --minutes 8 --device cuda --out DIR
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from intarsia.models import detector, shapes
from intarsia.models.base import find, load
from intarsia.models.sampler import TIMESTEPS, Denoise, FlowMatchEuler, denoiser, noise
from intarsia.models.sheet import contact_sheet

TRAINING_SEED = 1  # of one generator on the training device
EVALUATION_SEED = 20261122  # of one generator for each sample, on the CPU: no noise is shared with training
EVALUATION_COUNT = 64
LOG_SECONDS = 10.0
CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class Recipe:
    """How wan-mini is trained; the learning rate warms up and decays over the minutes, not over steps."""

    minutes: float = 8.0
    batch: int = 256
    device: str = "cpu"
    compile: bool = False
    learning_rate: float = 2e-3
    warm_up: float = 0.05  # share of the time
    shift: float = 3.0  # of the noise levels trained on: what moves where is decided near pure noise
    label_dropout: float = 0.1
    average: float = 0.999  # decay a step of the averaged weights


@dataclass(frozen=True)
class Training:
    """What a step changes in place: the network, its averaged weights, the optimizer's moments, the randomness."""

    module: nn.Module
    averaged: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    generator: torch.Generator

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, in the order of the averaged weights."""
        return dict(self.module.named_parameters())


def main() -> None:
    """Train, sample, report."""
    recipe, out, resume = _arguments()
    train(recipe, out, resume=resume)
    model = find("wan-mini")
    assert model.sampler is not None
    module = load(model, weights=out / "wan-mini.safetensors", device=recipe.device)
    report = evaluate(denoiser(module), model.sampler, device=recipe.device, sheet=out / "wan-mini.png")
    text = json.dumps(report)
    _replace(out / "evaluation.json", text.encode())
    print(text)


def train(recipe: Recipe, out: Path, *, resume: Path | None = None) -> None:
    """Writes the averaged weights, `wan-mini.safetensors`, and what is needed to resume into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    training = _fresh(recipe)
    first = _restore(training, resume) if resume else 0
    if recipe.compile:
        _compile_blocks(training.module)
    step = first
    losses: list[Tensor] = []
    logged = saved = time.monotonic()
    for elapsed in _shares(recipe.minutes * 60):
        losses.append(_step(training, recipe, step=step, learning_rate=_learning_rate(recipe, elapsed)))
        step += 1
        if step == first + 1 or time.monotonic() - logged > LOG_SECONDS:
            loss = torch.stack(losses).mean().item()
            rate = len(losses) / (time.monotonic() - logged)
            print(f"step {step}  loss {loss:.4f}  {rate:.1f} steps/s  {elapsed:.0%} of the time", flush=True)
            losses, logged = [], time.monotonic()
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(training, out, step)
            saved = time.monotonic()
    _save(training, out, step)


def evaluate(
    denoise: Denoise,
    sampler: FlowMatchEuler,
    *,
    device: str = "cpu",
    count: int = EVALUATION_COUNT,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Shares of `count` samples of held-out noise whose shape, colour, motion and all three are read as asked."""
    known = shapes.labels()
    asked = [known[index % len(known)] for index in range(count)]
    conditioning = shapes.condition(list(map(str, asked)))
    start = noise((3, shapes.FRAMES, shapes.SIZE, shapes.SIZE), seed=EVALUATION_SEED, count=count)
    videos = sampler.sample(denoise, start.to(device), conditioning.to(device)).cpu()
    shown = detector.read(videos)
    if sheet is not None:
        captions = [f"{a}{'' if a == b else f'  (read: {b})'}" for a, b in zip(asked, shown, strict=True)]
        contact_sheet(videos, captions, columns=4).save(sheet)
    return {"count": count, "guidance": sampler.guidance, **asdict(detector.recognised(asked, shown))}


def _fresh(recipe: Recipe) -> Training:
    torch.manual_seed(TRAINING_SEED)
    torch.set_float32_matmul_precision("high")
    module = find("wan-mini").build().train().to(recipe.device)
    nn.init.zeros_(module.get_parameter("proj_out.weight"))
    # Scale and shift tables and norms are no matrices: decay would only pull them off their meaning.
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in module.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return Training(
        module=module,
        averaged={name: parameter.detach().clone() for name, parameter in module.named_parameters()},
        optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        generator=torch.Generator(recipe.device).manual_seed(TRAINING_SEED),
    )


def _compile_blocks(module: nn.Module) -> None:
    """Each transformer block is compiled on its own, once for all: they are alike."""
    for block in cast(nn.ModuleList, module.get_submodule("blocks")):
        block.compile()


def _shares(seconds: float) -> Iterator[float]:
    """The share of the time gone, 0 to 1, for as long as it lasts."""
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        yield elapsed / seconds


def _learning_rate(recipe: Recipe, elapsed: float) -> float:
    """Linear up to the peak, then down to zero along half a cosine."""
    if elapsed < recipe.warm_up:
        return recipe.learning_rate * elapsed / recipe.warm_up
    return recipe.learning_rate * (1 + math.cos(math.pi * (elapsed - recipe.warm_up) / (1 - recipe.warm_up))) / 2


def _step(training: Training, recipe: Recipe, *, step: int, learning_rate: float) -> Tensor:
    """The loss of one batch, a scalar left on the device, after the weights have moved."""
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate
    loss = _loss(training, recipe)
    loss.backward()
    nn.utils.clip_grad_norm_(training.module.parameters(), 1.0)
    training.optimizer.step()
    training.optimizer.zero_grad()
    decay = min(recipe.average, (1 + step) / (10 + step))
    live = [parameter.detach() for parameter in training.module.parameters()]
    torch._foreach_lerp_(list(training.averaged.values()), live, 1 - decay)
    return loss.detach()


def _loss(training: Training, recipe: Recipe) -> Tensor:
    """Mean squared error of the velocity (noise - video) at noise levels spread evenly, then shifted."""
    generator, device = training.generator, training.generator.device
    said = shapes.random_words(recipe.batch, generator)
    videos = shapes.draw(said, generator)
    dropped = torch.rand(recipe.batch, 1, generator=generator, device=device) < recipe.label_dropout
    text = shapes.embed(torch.where(dropped, shapes.NULL, said))
    # One level in each of `batch` equal strata: the loss then says more about the weights and less about the draw.
    strata = torch.arange(recipe.batch, device=device) + torch.rand(recipe.batch, generator=generator, device=device)
    even = strata / recipe.batch
    sigma = recipe.shift * even / (1 + (recipe.shift - 1) * even)
    drawn = torch.randn(videos.shape, generator=generator, device=device)
    level = sigma[:, None, None, None, None]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        velocity: Tensor = training.module(
            hidden_states=videos + level * (drawn - videos),
            timestep=sigma * TIMESTEPS,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
    return (velocity.float() - (drawn - videos)).square().mean()


def _save(training: Training, out: Path, step: int) -> None:
    parameters = training.parameters
    state = training.optimizer.state
    _save_tensors(out / "wan-mini.safetensors", training.averaged)
    _save_tensors(out / "live.safetensors", parameters)
    for moment in ("exp_avg", "exp_avg_sq"):
        _save_tensors(
            out / f"{moment}.safetensors", {name: state[p][moment] for name, p in parameters.items() if p in state}
        )
    _replace(out / "step.json", json.dumps({"step": step}).encode())


def _restore(training: Training, folder: Path) -> int:
    """The number of steps taken before, after weights and moments are put back."""
    device = training.generator.device
    step = int(json.loads((folder / "step.json").read_text())["step"])
    live, averaged, first, second = (
        load_file(folder / f"{name}.safetensors", device=str(device))
        for name in ("live", "wan-mini", "exp_avg", "exp_avg_sq")
    )
    for name, parameter in training.parameters.items():
        parameter.data.copy_(live[name])
        training.averaged[name].copy_(averaged[name])
        count = torch.tensor(float(step), device=device)
        training.optimizer.state[parameter] = {"step": count, "exp_avg": first[name], "exp_avg_sq": second[name]}
    # Past draws are not repeated.
    training.generator.manual_seed(TRAINING_SEED + step)
    return step


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
    os.replace(unfinished, path)


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _arguments() -> tuple[Recipe, Path, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m intarsia.models.train_wan_mini", description=__doc__)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="how long to train; 0 only evaluates")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--device", default=Recipe.device)
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, help="at its peak")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint, figures and picture")
    parser.add_argument("--resume", type=Path, help="the --out folder of an earlier run")
    given = parser.parse_args()
    recipe = Recipe(
        minutes=given.minutes,
        batch=given.batch,
        device=given.device,
        compile=given.compile,
        learning_rate=given.learning_rate,
    )
    return recipe, given.out, given.resume


if __name__ == "__main__":
    main()
