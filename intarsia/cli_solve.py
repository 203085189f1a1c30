"""The verbs ``solve ...``: integer programs from a file, solved exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia import terminal
from intarsia.cli_options import AsJson

app = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Solve an integer program from a file.",
)


@app.callback()
def solve() -> None:
    """Solve an integer program from a file."""


@app.command()
def bits(
    file: Annotated[
        Path, typer.Argument(help="Sensitivities, sizes and times by layer, as JSON.", metavar="FILE.json")
    ],
    *,
    limit: Annotated[
        list[str],
        typer.Option("--limit", help="size=0.5, bops=70G or latency=4ms; a fraction or a value with unit; repeatable."),
    ],
    json: AsJson = False,
) -> None:
    """Choose 4 or 8 bits for each layer, within limits."""
    from intarsia.search.bit_files import read_limits, read_problem
    from intarsia.search.bits import shown
    from intarsia.search.bits import solve as solve_bits

    problem = read_problem(file)
    limits = read_limits(limit, problem)
    found = solve_bits(problem, limits)
    if json:
        names = [layer.name for layer in problem.layers]
        terminal.print_json(
            {
                "bits": found.bits,
                "chosen": dict(zip(names, found.chosen, strict=True)),
                "perturbation": found.perturbation,
                "used": found.used,
                "limits": limits,
            }
        )
        return
    terminal.print_lines([found.bits])
    for measure, used in found.used.items():
        kept = f" of {shown(limits[measure], measure)}" if measure in limits else ""
        terminal.say(f"{measure}: {shown(used, measure)}{kept}")
    terminal.say(f"perturbation: {found.perturbation:.6g}")
