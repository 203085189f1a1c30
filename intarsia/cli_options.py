"""The options that verbs share, and what those of them mean together."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia import configuration
from intarsia.ir.errors import UsageError

if TYPE_CHECKING:
    from intarsia.bit_flow import Samples
    from intarsia.calibration_files import Scaling


class Effort(StrEnum):
    """How much is measured."""

    QUICK = "quick"
    DEFAULT = "default"
    FULL = "full"


class Minimize(StrEnum):
    """What the search makes small."""

    BOTH = "both"
    SECONDS = "seconds"
    BYTES = "bytes"


class Kind(StrEnum):
    """What can be listed."""

    MODELS = "models"
    TARGETS = "targets"
    PASSES = "passes"
    PATTERNS = "patterns"
    KERNELS = "kernels"
    BACKENDS = "backends"


Model = Annotated[str, typer.Argument(help="A registered model (see: intarsia list models) or a .graph file.")]
Folder = Annotated[Path, typer.Argument(help="A bundle folder, as export and optimize write it.")]
TargetName = Annotated[str, typer.Option("--target", help="Machine: a shipped target or a .toml file.")]
AnyTarget = Annotated[str | None, typer.Option("--target", help="Machine: a shipped target or a .toml file.")]
BackendNames = Annotated[
    list[str] | None,
    typer.Option("--backend", help="What the engine is built with: name(key=value); repeatable. [default: onnx]"),
]
EngineName = Annotated[
    str | None,
    typer.Option("--backend", help="Whose engine; the best one that runs here if left out."),
]
Reference = Annotated[
    bool,
    typer.Option("--reference", help="Where the engine cannot run here, run its files by other, slower means."),
]
AnyGoal = Annotated[str | None, typer.Option("--quality", help='Goal such as "psnr>=35"; not with a budget.')]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass", help="name(key=value) or ./file.py:Class(key=value); repeatable. [default: quantize-linear]"
    ),
]
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="places; heads(density=0.25): patterns of attention heads; bits(bops=0.5): bits of layers; "
        "steps(budget=0.5): tokens by denoising step.",
    ),
]
MinimizeOption = Annotated[Minimize, typer.Option("--minimize", help="What to make small.")]
EffortOption = Annotated[Effort, typer.Option("--effort", help="How much is measured.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Time for the search, such as 90s, 20m or 1h30m.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Safetensors: a file or a folder of them.")]
Sampler = Annotated[
    Path | None,
    typer.Option("--sampler", help="Another loop: a sampler.json of a bundle, or diffusers' scheduler_config.json."),
]
Sizes = Annotated[list[str] | None, typer.Option("--size", help="A named size, such as batch=2; repeatable.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure anew, whatever the journal holds.")]
FailOnNoGain = Annotated[bool, typer.Option("--fail-on-no-gain", help="Exit with code 5 if nothing was gained.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML or JSON with these options as keys; the command line comes first.",
        callback=configuration.from_file,
        is_eager=True,
    ),
]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")]
Data = Annotated[str, typer.Option("--data", help="A folder, an .npy or .npz file, or loader.py:function.")]
BitsData = Annotated[
    str | None,
    typer.Option("--data", help="For bits: a folder, an .npy or .npz file, or loader.py:function; not with a loop."),
]
BitsLabels = Annotated[Path | None, typer.Option("--labels", help="For bits: an .npy with one class a sample.")]
Mean = Annotated[str | None, typer.Option("--mean", help="Of pictures in 0 to 1, one number or one a channel.")]
Std = Annotated[str | None, typer.Option("--std", help="Of pictures in 0 to 1, one number or one a channel.")]
BitsSamples = Annotated[int | None, typer.Option("--samples", min=1, help="Samples of --data. [default: 256]")]


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
