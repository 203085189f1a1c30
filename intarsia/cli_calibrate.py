"""The verb ``calibrate``: ranges of activations, measured on a user's data, written as a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia import configuration, outputs, terminal
from intarsia.backends.writing import new_file
from intarsia.cli_options import AsJson, Config, Data, Mean, Model, Std, Weights, scaling_of


def calibrate(
    ctx: typer.Context,
    model: Model,
    *,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a .json file.")],
    method: Annotated[str, typer.Option("--method", help="minmax, percentile(keep=99.99) or mse(bits=8).")] = "minmax",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to take, at most.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw, where there are more samples.")] = 0,
    mean: Mean = None,
    std: Std = None,
    target: Annotated[
        str, typer.Option("--target", help="The machine that the plan names: a shipped target or a .toml file.")
    ] = "null",
    weights: Weights = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Measure the ranges of activations on your data, batch norms folded; write them as a plan."""
    scaling = scaling_of(mean, std)
    outputs.check_output_file(output)
    from intarsia import progress, summaries
    from intarsia.calibration_flow import calibrated

    with progress.shown() as told:
        found = calibrated(
            model,
            data,
            target=target,
            method=method,
            samples=samples,
            seed=seed,
            scaling=scaling,
            weights=weights,
            progress=told,
        )
        with new_file(output) as file:
            file.write_text(found.plan.to_json())
    for line in found.warnings:
        terminal.say(f"warning: {line}")
    if json:
        facts = {"output": str(output), "samples": found.samples, "ranges": found.ranges}
        terminal.print_json({**facts, "warnings": list(found.warnings)})
    else:
        rows = [(place, f"{low:.4g}", f"{high:.4g}") for place, (low, high) in found.ranges.items()]
        listed = summaries.table(("value", "lowest", "highest"), rows, right=2)
        terminal.print_lines([listed, f"{output}: {len(rows)} ranges, from {found.samples} samples"])
    terminal.say(f"reproduce: {configuration.command(ctx, output=output)}")
