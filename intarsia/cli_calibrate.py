"""The verb ``calibrate``: ranges of activations, measured on a user's data, written as a plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia import configuration, outputs, terminal
from intarsia.backends.writing import new_file
from intarsia.ir.errors import UsageError

if TYPE_CHECKING:
    from intarsia.calibration_files import Scaling


def calibrate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A registered model or a .graph file.")],
    *,
    data: Annotated[str, typer.Option("--data", help="A folder, an .npy or .npz file, or loader.py:function.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a .json file.")],
    method: Annotated[str, typer.Option("--method", help="minmax, percentile(keep=99.99) or mse(bits=8).")] = "minmax",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to take, at most.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw, where there are more samples.")] = 0,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Of pictures in 0 to 1, one number or one a channel.")
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", help="Of pictures in 0 to 1, one number or one a channel.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="The machine that the plan names: a shipped target or a .toml file.")
    ] = "null",
    weights: Annotated[Path | None, typer.Option("--weights", help="Safetensors: a file or a folder of them.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML or JSON with these options as keys; the command line comes first.",
            callback=configuration.from_file,
            is_eager=True,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
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


def scaling_of(mean: str | None, std: str | None) -> Scaling | None:
    """The scaling of pictures that ``--mean`` and ``--std`` ask for, None without both; UsageError for one alone."""
    from intarsia.calibration_files import Scaling

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError(f"{'--mean' if mean is None else '--std'} is missing; pictures become (value - mean) / std")
    return Scaling(_numbers("--mean", mean), _numbers("--std", std))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """One or more finite numbers between commas; UsageError with the option if it is not that."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise UsageError(f"{option} {text!r}: expected numbers such as 0.485,0.456,0.406")
    return found
