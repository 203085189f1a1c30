"""The verb ``calibrate``: ranges of activations, measured on a user's data, written as a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia import outputs, terminal
from intarsia.backends.writing import new_file


def calibrate(
    model: Annotated[str, typer.Argument(help="A registered model or a .graph file.")],
    *,
    data: Annotated[str, typer.Option("--data", help="A folder, an .npy or .npz file, or loader.py:function.")],
    target: Annotated[str, typer.Option("--target", help="Machine: a shipped target or a .toml file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a .json file.")],
    method: Annotated[str, typer.Option("--method", help="minmax, percentile(keep=99.99) or mse(bits=8).")] = "minmax",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to take, at most.")] = 256,
    mean: Annotated[str, typer.Option("--mean", help="Of pictures in 0..1, one number or one a channel.")] = "0.5",
    std: Annotated[str, typer.Option("--std", help="Of pictures in 0..1, one number or one a channel.")] = "0.5",
    weights: Annotated[Path | None, typer.Option("--weights", help="Safetensors: a file or a folder of them.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure the ranges of activations on your data, batch norms folded; write them as a plan."""
    outputs.check_output_file(output)
    from intarsia import progress, summaries
    from intarsia.calibration_flow import calibrated, numbers

    with progress.shown() as told:
        found = calibrated(
            model,
            data,
            target=target,
            method=method,
            samples=samples,
            mean=numbers("--mean", mean),
            std=numbers("--std", std),
            weights=weights,
            progress=told,
        )
        with new_file(output) as file:
            file.write_text(found.plan.to_json())
    for line in found.warnings:
        terminal.say(f"warning: {line}")
    if json:
        terminal.print_json({"output": str(output), "ranges": found.ranges, "warnings": list(found.warnings)})
        return
    rows = [(place, f"{low:.4g}", f"{high:.4g}") for place, (low, high) in found.ranges.items()]
    listed = summaries.table(("value", "lowest", "highest"), rows, right=2)
    terminal.print_lines([listed, f"{output}: {len(rows)} ranges"])
