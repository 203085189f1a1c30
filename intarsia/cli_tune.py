"""The verb ``tune``: the best tile of each kernel and shape that an engine launches, and records of it as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia import configuration, outputs, terminal
from intarsia.backends.writing import new_file
from intarsia.cli_options import AnyTarget, AsJson, Budget, Config, Effort, EffortOption, Seed, Sizes
from intarsia.ir.errors import QualityError, UsageError

if TYPE_CHECKING:
    from intarsia.tune_flow import Tuning

EXPORT, IMPORT = "export", "import"


def tune(
    ctx: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(help="A model or .graph file; or export, or import.", metavar="[MODEL|export|import]"),
    ] = None,
    file: Annotated[Path | None, typer.Argument(help="Of export and import.", metavar="[FILE]")] = None,
    *,
    target: AnyTarget = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan; the model as it is without one.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="In place of a plan: a pass to run as it is; repeatable.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option("--kernel", help="In place of a model: one kernel, such as linear_i8.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Of --kernel: tokens=32760,rows=1536,columns=1536.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of --kernel: element type.")] = "bf16",
    size: Sizes = None,
    effort: EffortOption = Effort.DEFAULT,
    seed: Seed = 0,
    budget: Budget = None,
    config: Config = None,
    json: AsJson = False,
) -> int:
    """Search tile sizes, warps and stages of Triton kernels; keep what is found for the engines that are built next."""
    if what in (EXPORT, IMPORT):
        if file is None or target or kernel:
            raise UsageError(f"tune {what} takes a file and nothing else: intarsia tune {what} tuning.jsonl")
        return _write(file, json=json) if what == EXPORT else _read(file, json=json)
    if file is not None:
        raise UsageError(f"tune takes one model; {file} is a second one")
    if (what is None) == (kernel is None) or target is None:
        raise UsageError("tune takes a model, or --kernel with --shape; and --target")
    if kernel is None and shape is not None:
        raise UsageError("--shape is of --kernel; sizes of a model's graph are --size NAME=NUMBER")
    if kernel is not None and (plan or passes or size):
        raise UsageError("--plan, --pass and --size are of a model; --kernel takes --shape and --dtype")
    seconds, sizes = configuration.seconds(budget), configuration.sizes(size or ())
    from intarsia import progress
    from intarsia.ir.plan import Plan
    from intarsia.tune_flow import tune_kernel, tune_model

    with progress.shown() as told:
        if kernel is not None:
            extents = _extents(shape)
            found = tune_kernel(
                kernel,
                extents,
                dtype,
                target=target,
                effort=effort.value,
                seed=seed,
                budget=seconds,
                progress=told,
            )
        else:
            found = tune_model(
                str(what),
                target=target,
                plan=Plan.load(plan) if plan else None,
                passes=tuple(passes or ()),
                sizes=sizes,
                effort=effort.value,
                seed=seed,
                budget=seconds,
                progress=told,
            )
    _show(found, json=json)
    if not found.complete:
        terminal.say("the time was spent before all candidates were looked at; what was found is kept")
    terminal.say(f"reproduce: {configuration.command(ctx)}")
    return 0 if found.complete else terminal.BUDGET_SPENT


def _extents(text: str | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in (text or "").split(","):
        name, _, number = part.strip().partition("=")
        if not (name and number.isascii() and number.isdigit() and int(number) >= 0):
            raise UsageError(f"--shape {text!r}: expected extents such as tokens=32760,rows=1536,columns=1536")
        found[name] = int(number)
    return found


def _write(file: Path, *, json: bool) -> int:
    outputs.check_output_file(file)
    from intarsia.tune_flow import export_records

    with new_file(file) as draft:
        count = export_records(draft)
    if json:
        terminal.print_json({"output": str(file), "records": count})
    else:
        terminal.print_lines([f"{file}: {count} records"])
    return 0


def _read(file: Path, *, json: bool) -> int:
    from intarsia import progress
    from intarsia.tune_flow import import_records

    with progress.shown() as told:
        found = import_records(file, progress=told)
    for line in found.refused:
        terminal.say(f"refused: {line}")
    if found.refused and not found.taken:
        raise QualityError(f"{file}: none of its {len(found.refused)} records holds here: {found.refused[0]}")
    counts = {"taken": found.taken, "refused": len(found.refused), "stale": found.stale, "broken_lines": found.broken}
    if json:
        terminal.print_json({**counts, "reasons": list(found.refused)})
    else:
        told_counts = f"{found.taken} records taken, {len(found.refused)} refused"
        terminal.print_lines([f"{file}: {told_counts}, {found.stale} stale, {found.broken} broken lines"])
    return 0


def _show(found: Tuning, *, json: bool) -> None:
    from intarsia.summaries import table

    rows = [
        {
            "kernel": one.site.key.kernel,
            "bucket": one.site.key.bucket,
            "dtype": one.site.key.dtype,
            "calls": one.site.calls,
            "shape": dict(one.site.problem.shape),
            "tile": dict(one.best.choice) if one.best else None,
            "how": one.best.how if one.best else None,
            "seconds": one.best.seconds if one.best else None,
            "default": dict(one.default.choice) if one.default else None,
            "default_seconds": one.default.seconds if one.default else None,
            "tried": one.tried,
            "looked_at": one.measured,
            "refused": one.refused,
            "complete": one.complete,
        }
        for one in found.sites
    ]
    how = f"measured on {found.clock}" if found.clock else "ranked by a cost model, not measured: no GPU of this target"
    if json:
        facts = {"database": str(found.database), "clock": found.clock, "how": how, "complete": found.complete}
        terminal.print_json({**facts, "stale": found.stale, "broken_lines": found.broken, "kernels": rows})
        return
    cells = [
        (
            str(row["kernel"]).removeprefix("intarsia."),
            f"{row['bucket']} {row['dtype']}",
            _text(row["tile"]),
            _ratio(row["seconds"], row["default_seconds"]),
            f"{row['tried']} ({row['refused']} refused)",
        )
        for row in rows
    ]
    title = ("kernel", "shapes", "tile", "times default", "tried")
    notes = f"{found.database}: {found.stale} stale records, {found.broken} broken lines"
    terminal.print_lines([table(title, cells), f"{how}; {notes}"])


def _text(tile: object) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items()) if isinstance(tile, dict) else "none fits"


def _ratio(seconds: object, default: object) -> str:
    good = isinstance(seconds, float) and isinstance(default, float) and seconds > 0
    return f"{default / seconds:.2f}" if good else "-"  # type: ignore[operator]
