"""The verb ``finetune``: weights trained for a plan's grids, on a user's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia import configuration, outputs, terminal
from intarsia.cli_options import AsJson, Config, Data, Mean, Model, Std, Weights, scaling_of
from intarsia.ir.errors import UsageError


def finetune(
    ctx: typer.Context,
    model: Model,
    *,
    plan: Annotated[Path, typer.Option("--plan", help="A plan with quantize-integer.")],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for weights, plan, log and checkpoint.")],
    labels: Annotated[Path | None, typer.Option("--labels", help="An .npy with one class a sample of --data.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Data to judge by; a tenth of --data's files if left out.")
    ] = None,
    held_out_labels: Annotated[
        Path | None, typer.Option("--held-out-labels", help="An .npy with one class a sample of --held-out.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Rounds through files. [default: 2]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="In all, in place of --epochs.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples a step; of a function, one call is one.")] = 128,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="At its peak.")] = 0.01,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adamw.")] = "sgd",
    loss: Annotated[str, typer.Option("--outputs", help="What outputs are: classes or numbers.")] = "classes",
    temperature: Annotated[float, typer.Option("--temperature", help="Of distillation.")] = 4.0,
    distillation: Annotated[float, typer.Option("--distillation", help="Its share where there are labels.")] = 0.9,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of draws and orders.")] = 0,
    device: Annotated[str, typer.Option("--device", help="Where PyTorch trains, such as cuda.")] = "cpu",
    mean: Mean = None,
    std: Std = None,
    weights: Weights = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Train a model's weights for the grids of a plan, taught by the float model; goes on where it was stopped."""
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps exclude each other; give one of them")
    scaling = scaling_of(mean, std)
    outputs.check_output_folder(output)
    from dataclasses import asdict

    from intarsia import progress
    from intarsia.finetune_flow import WEIGHTS, Material, Wishes, finetuned
    from intarsia.ir.plan import Plan
    from intarsia.search.finetune import Recipe
    from intarsia.search.finetune_loss import Loss

    recipe = Recipe(
        steps=steps or 1,
        learning_rate=learning_rate,
        optimizer=optimizer,
        loss=Loss(loss, temperature, distillation),
        device=device,
    )
    wishes = Wishes(epochs=None if steps else epochs or 2, batch=batch, recipe=recipe)
    material = Material(data, labels, held_out, held_out_labels, scaling, seed=seed)
    with progress.shown() as told:
        found = finetuned(model, Plan.load(plan), material, output, wishes=wishes, weights=weights, progress=told)
    facts = {
        "output": str(output),
        "steps": len(found.losses),
        "seconds": round(found.seconds, 1),
        "before": found.before and asdict(found.before),
        "after": found.after and asdict(found.after),
    }
    if json:
        terminal.print_json(facts)
    else:
        terminal.print_lines(
            [
                f"{output / WEIGHTS}: {len(found.losses)} steps, loss {found.losses[0]:.4g} to {found.losses[-1]:.4g}",
                *(
                    f"held out {when}: {score}"
                    for when, score in (("before", found.before), ("after", found.after))
                    if score
                ),
            ]
        )
    terminal.say(f"reproduce: {configuration.command(ctx, output=output)}")
