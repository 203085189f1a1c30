"""Options of ``search`` and ``optimize`` that name what ``--strategy bits`` is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli_calibrate import scaling_of
from intarsia.ir.errors import UsageError

if TYPE_CHECKING:
    from intarsia.bit_flow import Samples

DataOption = Annotated[
    str | None,
    typer.Option("--data", help="For bits: a folder, an .npy or .npz file, or loader.py:function; not with a loop."),
]
LabelsOption = Annotated[Path | None, typer.Option("--labels", help="For bits: an .npy with one class a sample.")]
MeanOption = Annotated[str | None, typer.Option("--mean", help="Of pictures in 0 to 1, one number or one a channel.")]
StdOption = Annotated[str | None, typer.Option("--std", help="Of pictures in 0 to 1, one number or one a channel.")]
SamplesOption = Annotated[int | None, typer.Option("--samples", min=1, help="Samples of --data. [default: 256]")]


def samples_of(
    data: str | None, labels: Path | None, mean: str | None, std: str | None, count: int | None, *, seed: int
) -> Samples | None:
    """What ``--data`` and the options beside it ask for, None without any; UsageError for those without ``--data``."""
    beside = {"--labels": labels, "--mean": mean, "--std": std, "--samples": count}
    if data is None:
        if given := [option for option, value in beside.items() if value is not None]:
            raise UsageError(f"{given[0]} is given without --data, which it belongs to")
        return None
    from intarsia.bit_flow import SAMPLES, Samples

    return Samples(data, labels, count or SAMPLES, seed, scaling_of(mean, std))
