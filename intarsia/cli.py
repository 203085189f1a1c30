"""The command line: every verb reads its options, calls ``intarsia.flow`` and prints what came out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from intarsia import cli_calibrate, cli_finetune, cli_solve, configuration, outputs, terminal
from intarsia.backends.writing import new_file
from intarsia.cli_options import (
    AnyGoal,
    AnyTarget,
    AsJson,
    BackendNames,
    BitsData,
    BitsLabels,
    BitsSamples,
    Budget,
    Config,
    Effort,
    EffortOption,
    EngineName,
    FailOnNoGain,
    Folder,
    Fresh,
    Kind,
    Mean,
    Minimize,
    MinimizeOption,
    Model,
    OutputFolder,
    Passes,
    Reference,
    Sampler,
    Seed,
    Sizes,
    Std,
    Strategy,
    TargetName,
    Weights,
    samples_of,
)
from intarsia.ir.errors import MissingEnvironment, UsageError
from intarsia.ir.registry import unknown

if TYPE_CHECKING:
    from rich.table import Table

_RESUMABLE = {"search", "optimize"}
"""Verbs that journal what they measure."""


class Verbs(TyperGroup):
    """The verbs, with every error turned into one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run the verb that ``args`` names and end the process with its exit code."""
        words = list(sys.argv[1:] if args is None else args)
        extra |= {"standalone_mode": False, "prog_name": "intarsia"}
        sys.exit(terminal.run(lambda: super(Verbs, self).main(words, **extra), as_json="--json" in words))

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an interruption says what is saved."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.invoked_subcommand in _RESUMABLE:
                saved = f"what was measured is kept in {terminal.cache_folder()}; the same command goes on from there"
            elif ctx.invoked_subcommand == "finetune":
                saved = "the last checkpoint stays in the folder of -o; the same command goes on from there"
            else:
                saved = "nothing was written under the final name; the same command starts over"
            raise terminal.Interrupted(saved) from None
        except BrokenPipeError as error:
            raise terminal.ReaderLeft from error


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Search sparsity, steps and precision of video diffusion transformers jointly; ship a verified engine.",
)


@app.callback(invoke_without_command=True)
def intarsia(
    ctx: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Search sparsity, steps and precision of video diffusion transformers jointly; ship a verified engine."""
    if show_version:
        typer.echo(f"intarsia {version('intarsia')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def doctor(json: AsJson = False) -> int:
    """Say what this machine has, what is missing, and what that costs."""
    from intarsia import progress
    from intarsia.doctor import diagnose, lines
    from intarsia.units import size

    with progress.shown():
        diagnosis = diagnose()
    _show(diagnosis.to_json(), lines(diagnosis, size=size), json=json)
    return 0 if diagnosis.working else terminal.ENVIRONMENT


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
    json: AsJson = False,
) -> None:
    """List models, targets, passes, patterns, kernels and backends."""
    from dataclasses import asdict

    from intarsia import summaries
    from intarsia.listing import KINDS, entries

    found = {name: entries(name) for name in ([kind.value] if kind else KINDS)}
    data = {name: [asdict(entry) for entry in these] for name, these in found.items()}
    tables = [
        summaries.table((name, "what it is", "from"), [(entry.name, entry.summary, entry.origin) for entry in these])
        for name, these in found.items()
    ]
    _show(data[kind.value] if kind else data, tables, json=json)


@app.command()
def trace(
    model: Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .graph file; weights go beside it.")],
    meta: Annotated[bool, typer.Option("--meta", help="Shapes only: no memory for weights, none written.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="As PyTorch traced it, without the clean-up passes.")] = False,
    dynamic: Annotated[
        list[str] | None, typer.Option("--dynamic", help="A size that may vary, such as batch; repeatable.")
    ] = None,
    weights: Weights = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Trace a model into a graph that a person can read."""
    beside = output.with_suffix(".safetensors")
    if output.suffix != ".graph":
        raise UsageError(f"-o {output}: a graph's file is called NAME.graph")
    if meta and beside.exists():
        raise UsageError(f"{beside} would be taken for the graph's weights, and --meta writes none; choose another -o")
    outputs.check_output_file(output)
    from intarsia import flow, progress, summaries
    from intarsia.ir.program import save_weights
    from intarsia.subject import dynamic_axes

    with progress.shown():
        axes = dynamic_axes(model, dynamic) if dynamic else None
        program = flow.trace(model, dynamic=axes, meta=meta, raw=raw, weights=weights)
        with new_file(output) as graph_file:
            graph_file.write_text(str(program.graph))
            if not program.is_meta:
                with new_file(beside) as weight_file:
                    save_weights(program.weights, weight_file)
    _show(*summaries.traced(program, output, None if program.is_meta else beside), json=json)


@app.command()
def inspect(
    subject: Annotated[str, typer.Argument(help="A model, a .graph file, a bundle folder or a plan.", metavar="WHAT")],
    *,
    target: AnyTarget = None,
    backend: Annotated[str | None, typer.Option("--backend", help="Also say what this backend cannot take.")] = None,
    size: Sizes = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Count what a graph computes and moves, and predict how long a machine takes for it."""
    from intarsia import inspection, progress, summaries

    with progress.shown():
        facts = inspection.inspect(subject, target=target, sizes=configuration.sizes(size or ()), backend=backend)
    _show(facts, summaries.inspected(facts), json=json)


@app.command()
def search(
    ctx: typer.Context,
    model: Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a .json file.")],
    target: TargetName,
    quality: AnyGoal = None,
    passes: Passes = None,
    strategy: Strategy = "places",
    minimize: MinimizeOption = Minimize.BOTH,
    effort: EffortOption = Effort.DEFAULT,
    seed: Seed = 0,
    budget: Budget = None,
    weights: Weights = None,
    sampler: Sampler = None,
    fresh: Fresh = False,
    fail_on_no_gain: FailOnNoGain = False,
    data: BitsData = None,
    labels: BitsLabels = None,
    mean: Mean = None,
    std: Std = None,
    samples: BitsSamples = None,
    config: Config = None,
    json: AsJson = False,
) -> int:
    """Search what fits each layer, under a quality goal; write the answer as a plan."""
    seconds = configuration.seconds(budget)
    given = samples_of(data, labels, mean, std, samples, seed=seed)
    outputs.check_output_file(output)
    from intarsia import flow, progress, summaries

    with progress.shown() as told:
        result = flow.search(
            model,
            target=target,
            quality=quality,
            passes=tuple(passes or flow.PASSES),
            strategy=strategy,
            minimize=minimize.value,
            effort=effort.value,
            seed=seed,
            weights=weights,
            sampler=sampler,
            fresh=fresh,
            budget=seconds,
            fail_on_no_gain=fail_on_no_gain,
            samples=given,
            progress=told,
        )
        with new_file(output) as file:
            file.write_text(result.plan.to_json())
    _show(*summaries.searched(result, output), json=json)
    return _ended(configuration.command(ctx, output=output), complete=result.complete)


@app.command()
def explain(
    model: Model,
    *,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan, as search writes it.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="Without a plan: a pass to ask what it offers; repeatable.")
    ] = None,
    place: Annotated[str | None, typer.Option("--place", help="One place only, such as blocks.0.attn1.to_q.")] = None,
    target: AnyTarget = None,
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Say for each place what could be chosen, what was, and why."""
    from intarsia import flow, progress, summaries
    from intarsia.ir.plan import Plan

    with progress.shown():
        explanation = flow.explain(model, Plan.load(plan) if plan else None, passes=passes or (), target=target)
    told = summaries.explained(explanation, place)
    if told is None:
        known = [row.place for row in explanation.rows]
        raise UsageError(unknown("place", str(place), known[:12]))
    _show(*told, json=json)


@app.command()
def export(
    ctx: typer.Context,
    model: Model,
    *,
    output: OutputFolder,
    target: TargetName,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan; the model as it is without one.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="In place of a plan: a pass to run as it is; repeatable.")
    ] = None,
    backend: BackendNames = None,
    quality: Annotated[str | None, typer.Option("--quality", help="Goal that the engine must meet.")] = None,
    effort: EffortOption = Effort.DEFAULT,
    seed: Seed = 0,
    weights: Weights = None,
    sampler: Sampler = None,
    config: Config = None,
    json: AsJson = False,
) -> int:
    """Apply a plan and build the engine: a bundle that can be verified and run."""
    outputs.check_output_bundle(output)
    from intarsia import flow, progress, summaries
    from intarsia.ir.plan import Plan

    with progress.shown() as told:
        bundle = flow.export(
            model,
            Plan.load(plan) if plan else None,
            backends=tuple(backend or ("onnx",)),
            target=target,
            output=output,
            passes=tuple(passes or ()),
            weights=weights,
            sampler=sampler,
            quality=quality,
            effort=effort.value,
            seed=seed,
            config=configuration.resolved(ctx),
            command=configuration.command(ctx, output=Path("out")),
            progress=told,
        )
    _show(*summaries.bundled(bundle), json=json)
    return _ended(configuration.command(ctx, output=output))


@app.command()
def verify(
    folder: Folder,
    *,
    full: Annotated[bool, typer.Option("--full", help="Also measure the quality that the bundle claims.")] = False,
    backend: EngineName = None,
    reference: Reference = False,
    json: AsJson = False,
) -> int:
    """Check every file and every claim of a bundle."""
    from intarsia import flow, progress, summaries

    with progress.shown() as told:
        report = flow.verify(folder, full=full, engine=backend, reference=reference, progress=told)
    _show(report.to_json(), summaries.verified(report), json=json)
    for check in report.not_run:
        terminal.say(f"not run: {check.detail}; all else holds. Verify where it runs, or add --reference")
    return 0 if report.passed else MissingEnvironment.exit_code


@app.command()
def run(
    ctx: typer.Context,
    folder: Folder,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the videos and a contact sheet.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to show; repeatable.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Videos of each prompt.")] = 1,
    seed: Seed = 0,
    backend: EngineName = None,
    reference: Reference = False,
    config: Config = None,
    json: AsJson = False,
) -> int:
    """Make videos with a bundle's engine."""
    outputs.check_output_folder(output)
    from intarsia import flow, progress

    with progress.shown() as told:
        paths, chosen = flow.run(
            folder,
            prompts=tuple(prompt or ()),
            seed=seed,
            count=count,
            output=output,
            engine=backend,
            reference=reference,
            progress=told,
        )
    files = [str(path) for path in paths]
    facts = {"files": files, "backend": chosen.name, "on_reference": chosen.on_reference, "why": chosen.why}
    _show(facts, [*files, chosen.why], json=json)
    return _ended(configuration.command(ctx, output=output))


@app.command()
def bench(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(help="A bundle folder, or a model to run eagerly.", metavar="WHAT")],
    *,
    backend: EngineName = None,
    repeats: Annotated[int, typer.Option("--repeats", min=3, help="Timed runs.")] = 20,
    seed: Seed = 0,
    config: Config = None,
    json: AsJson = False,
) -> int:
    """Time an engine on this machine: median and spread."""
    from intarsia import flow, progress, summaries

    with progress.shown() as told:
        facts = flow.bench(subject, engine=backend, repeats=repeats, seed=seed, progress=told)
    _show(facts, summaries.timed(facts), json=json)
    return _ended(configuration.command(ctx))


@app.command()
def report(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An .html file.")] = None,
    json: AsJson = False,
) -> None:
    """Write one HTML page that tells what was decided and what came of it."""
    from intarsia.report import write_report

    path = output or Path(f"{folder.resolve().name}.html")
    outputs.check_output_file(path)
    written = write_report(folder, path)
    _show({"output": str(written)}, [str(written)], json=json)


@app.command()
def optimize(
    ctx: typer.Context,
    model: Model,
    *,
    output: OutputFolder,
    target: TargetName,
    quality: AnyGoal = None,
    backend: BackendNames = None,
    passes: Passes = None,
    strategy: Strategy = "places",
    minimize: MinimizeOption = Minimize.BOTH,
    effort: EffortOption = Effort.DEFAULT,
    seed: Seed = 0,
    budget: Budget = None,
    weights: Weights = None,
    sampler: Sampler = None,
    fresh: Fresh = False,
    fail_on_no_gain: FailOnNoGain = False,
    data: BitsData = None,
    labels: BitsLabels = None,
    mean: Mean = None,
    std: Std = None,
    samples: BitsSamples = None,
    config: Config = None,
    json: AsJson = False,
) -> int:
    """Search, export, verify and report in one go."""
    seconds = configuration.seconds(budget)
    given = samples_of(data, labels, mean, std, samples, seed=seed)
    outputs.check_output_bundle(output)
    from intarsia import flow, progress, summaries

    with progress.shown() as told:
        bundle = flow.optimize(
            model,
            target=target,
            quality=quality,
            backends=tuple(backend or ("onnx",)),
            output=output,
            passes=tuple(passes or flow.PASSES),
            strategy=strategy,
            minimize=minimize.value,
            effort=effort.value,
            seed=seed,
            weights=weights,
            sampler=sampler,
            fresh=fresh,
            budget=seconds,
            fail_on_no_gain=fail_on_no_gain,
            samples=given,
            config=configuration.resolved(ctx),
            command=configuration.command(ctx, output=Path("out")),
            progress=told,
        )
    _show(*summaries.bundled(bundle), json=json)
    return _ended(configuration.command(ctx, output=output), complete=not summaries.cut_short(bundle))


app.command()(cli_calibrate.calibrate)
app.command()(cli_finetune.finetune)
app.add_typer(cli_solve.app, name="solve")


def _show(data: object, lines: Sequence[str | Table], *, json: bool) -> None:
    """The result on stdout: ``data`` as the one JSON document, or ``lines`` for a person."""
    if json:
        terminal.print_json(data)
        return
    terminal.print_lines(lines)


def _ended(command: str, *, complete: bool = True) -> int:
    """Say how the run is repeated; the exit code."""
    if not complete:
        terminal.say("the time was spent before the search had ended; the best so far is saved")
    terminal.say(f"reproduce: {command}")
    return 0 if complete else terminal.BUDGET_SPENT


def main() -> None:
    """The entry point of the command ``intarsia``."""
    # Threads that spin for long while they wait slow every call twentyfold when another program is busy on the same
    # cores; threads that sleep at once slow every call twofold when none is. wan-mini on two cores, seconds a call,
    # alone and beside one busy process: OpenMP's default 0.07 and 1 to 3, sleeping 0.14 and 0.12, this 0.09 and 0.42.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    app()
