"""Results of the verbs as plain JSON values, and as lines for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from intarsia.backends.manifest import claims_by_part
from intarsia.backends.phases import StepRange, title
from intarsia.report_facts import METRICS, figure
from intarsia.units import amount, duration, growth, size, speed

if TYPE_CHECKING:
    from intarsia.backends.bundle import Bundle
    from intarsia.backends.verify import VerifyReport
    from intarsia.ir.program import Program
    from intarsia.search.explain import Explanation, Row
    from intarsia.search.search import SearchResult

Lines = Sequence[str | Table]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0) -> Table:
    """A table without frames, its last ``right`` columns aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        made.add_column(column, overflow="fold", justify="right" if index >= len(columns) - right else "left")
    for row in rows:
        made.add_row(*row)
    return made


def traced(program: Program, graph_file: Path, weight_file: Path | None) -> tuple[dict[str, object], Lines]:
    """Where a trace was written, and how large it is."""
    graph = program.graph
    parameters = sum(program.weights[value.name].numel() for value in graph.params)
    facts: dict[str, object] = {
        "output": str(graph_file),
        "weights": str(weight_file) if weight_file else None,
        "name": graph.name,
        "fingerprint": graph.fingerprint,
        "nodes": len(graph.nodes),
        "parameters": parameters,
    }
    count = f"{len(graph.nodes):,} nodes, {amount(parameters).strip()} parameters"
    return facts, [
        f"{graph_file}: {graph.name}, {count}, fingerprint {graph.fingerprint}",
        f"{weight_file}: weights" if weight_file else "no weights were written",
    ]


def inspected(facts: Mapping[str, Any]) -> Lines:
    """What ``inspection.inspect`` found, for a person."""
    if facts["kind"] == "plan":
        return _plan(facts)
    if "segments" in facts:
        lines: list[str | Table] = [*_graph(facts)]
        for number, segment in enumerate(facts["segments"]):
            lines += ["", f"segment {number} of {len(facts['segments'])}{_once(segment)}", *_graph(segment)]
        return lines
    if "phases" not in facts:
        return _graph(facts)
    ranges = tuple(StepRange.from_json(one) for one in facts["phases"])
    lines = [title(ranges, 0), *_graph(facts)]
    for phase, later in facts["later"].items():
        lines += ["", title(ranges, int(phase)), *_graph(later)]
    return lines


def _graph(facts: Mapping[str, Any]) -> Lines:
    """A graph: its interface, its work, and what a machine and a backend make of it."""
    head = {key: facts[key] for key in ("name", "fingerprint", "nodes", "inputs", "outputs", "sizes")}
    counts = {
        "flops": f"{amount(facts['flops'])}FLOP",
        "bytes moved": size(facts["bytes_moved"]),
        "parameters": amount(facts["parameters"]).strip(),
        "weights": size(facts["weight_bytes"]),
    }
    if facts["operators_unknown"]:
        counts["not counted"] = ", ".join(facts["operators_unknown"])
    lines: list[str | Table] = [*pairs(head), *pairs(counts)]
    total = facts["flops"] or 1
    by_class = [
        (name, f"{amount(flops)}FLOP", f"{flops / total:.1%}") for name, flops in facts["flops_by_class"].items()
    ]
    lines += ["", table(("work", "operations", "share"), by_class, right=2)]
    if facts["attention_sites"]:
        lines += ["", _attention(facts["attention_sites"])]
    if "step_allocation" in facts:
        lines += ["", *_step_allocation(facts)]
    if facts.get("in_float") is not None:
        lines += ["", *_arithmetic(facts["in_float"])]
    if "backend" in facts:
        lines += ["", *_taken(facts["backend"])]
    if "target" in facts:
        bounds = [(name, duration(seconds)) for name, seconds in facts["seconds_by_bound"].items()]
        lines += ["", f"{facts['target']}: {duration(facts['predicted_seconds'])} a call"]
        lines.append(table(("bound by", "seconds"), bounds, right=1))
    return lines


def _step_allocation(facts: Mapping[str, Any]) -> Lines:
    """What caches of step allocation would take, and how many guidance branches find room on the target."""
    found = facts["step_allocation"]
    if "refused" in found:
        return [found["refused"]]
    if "bytes" in found:
        return [f"step allocation: caches {size(found['bytes'])} a call"]
    bounded = found["caches"][0]["branches"] is not None
    room = f"; {facts['target']} has {size(found['memory'])}, weights {size(facts['weight_bytes'])}" if bounded else ""
    rows = [
        (row["caches"], row["dtype"], size(row["bytes"]), *([str(row["branches"] or "none")] if bounded else []))
        for row in found["caches"]
    ]
    columns = ("caches", "stored in", "bytes", *(["that fit"] if bounded else []))
    return [f"step allocation: caches of a guidance branch{room}", table(columns, rows, right=len(columns) - 2)]


def _taken(facts: Mapping[str, Any]) -> Lines:
    """What a backend would make of a graph, and what it refuses."""
    lines: list[str | Table] = []
    if facts["target_refused"]:
        lines.append(f"{facts['name']} builds nothing for this target: {facts['target_refused']}")
    if facts["put_in"]:
        lines.append(f"put in: {', '.join(f'{count} {op}' for op, count in facts['put_in'].items())}")
    for name, places in facts["passed_over"].items():
        reasons = Counter(places.values())
        first = {reason: place for place, reason in reversed(places.items())}
        rows = [(str(count), first[reason], reason) for reason, count in reasons.items()]
        lines += [f"{name} passed over:", table(("places", "first", "why"), rows)] if rows else []
    if not facts["refused"]:
        return [*lines, f"{facts['name']} takes every operator"]
    refused = [(one["op"], str(one["calls"]), one["place"], one["source"], one["reason"]) for one in facts["refused"]]
    return [*lines, f"{facts['name']} refuses:", table(("operator", "calls", "first", "source", "why"), refused)]


def _plan(facts: Mapping[str, Any]) -> Lines:
    """A plan: what it is for, what the search knew, and how often each option was chosen."""
    known = {name: value for name, value in facts["notes"].items() if name not in {"places", "refused", "tried"}}
    lines = pairs({"graph": facts["graph"], "target": facts["target"], **known})
    for number, phase in enumerate(facts["phases"]):
        last = "the last" if phase["last"] is None else phase["last"]
        steps = f"steps {phase['first']} to {last}"
        lines.append(steps if len(facts["phases"]) == 1 else f"phase {number}: {steps}")
        for step in phase["steps"]:
            counts = Counter(step["chosen"].values())
            lines.append(
                f"  {step['run']}: {', '.join(f'{option} at {n}' for option, n in counts.items()) or 'no change'}"
            )
    return lines


def _attention(sites: Sequence[Mapping[str, Any]]) -> Table:
    """Attention sites, alike ones in one row."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for site in sites:
        key = tuple(site[name] for name in ("kind", "batch", "heads", "queries", "keys", "head_dim"))
        alike.setdefault(key, []).append(site["name"])
    rows = [(str(len(names)), *map(str, key), names[0]) for key, names in alike.items()]
    columns = ("count", "attention", "batch", "heads", "queries", "keys", "head dim", "first")
    return table(columns, rows)


def searched(result: SearchResult, output: Path) -> tuple[dict[str, object], Lines]:
    """What a search found."""
    from intarsia.passes.quantize_integer_layers import BITS

    before, after = result.baseline, result.predicted
    facts: dict[str, object] = {
        "output": str(output),
        "graph": result.plan.graph,
        "target": result.plan.target,
        "baseline": {"seconds": before.seconds, "bytes": before.bytes},
        "predicted": {"seconds": after.seconds, "bytes": after.bytes},
        "gain": result.gain,
        "complete": result.complete,
        "quality": result.quality.to_json() if result.quality else None,
        "tried": [trial.to_json() for trial in result.tried],
    }
    changed = Counter(option for phase in result.plan.phases for step in phase.steps for option in step.chosen.values())
    bits = {option: count for option, count in sorted(changed.items()) if option in BITS}
    told = ", ".join(f"{count} at {option}" for option, count in bits.items())
    steps = result.plan.notes.get("steps")
    if isinstance(steps, dict):
        facts["steps"] = steps
        head: list[str | Table] = [f"{output}: {steps['policies']} policies tried", _policies(steps["finalists"])]
    else:
        done = f"layers {told}" if bits else f"{changed.total()} places changed"
        head = [f"{output}: {done}, {len(result.tried)} plans measured end to end"]
    lines = [
        *head,
        f"weights    {size(before.bytes)} to {size(after.bytes)}, {growth(before.bytes, after.bytes)}",
        f"predicted  {_faster(before.seconds, after.seconds)} on {result.plan.target}",
        *(
            _metrics(result.quality.to_json(), {})
            if result.quality
            else [f"quality    not measured: {'no goal asks for it' if result.complete else 'the time was spent'}"]
        ),
    ]
    return facts, lines if result.gain > 0 else [*lines, "nothing was gained: the plan leaves the model as it is"]


def _policies(finalists: Sequence[Mapping[str, Any]]) -> Table:
    """Policies of a loop's steps that were measured on validation noise, the best first."""
    ranked = sorted(finalists, key=lambda one: -one["validation_psnr"])
    rows = [(one["kind"], f"{one['share']:.0%}", f"{one['validation_psnr']:.2f} dB", one["policy"]) for one in ranked]
    return table(("steps", "of the time", "PSNR", "policy"), rows)


def explained(explanation: Explanation, place: str | None) -> tuple[dict[str, object], Lines] | None:
    """Rows of an explanation, of one place where it is given; None if there is no such place.

    A layer's attention stands for all of its heads: ``blocks.3.attn1.y`` for ``blocks.3.attn1.y#0`` and the others.
    """
    from intarsia.search.explain_bits import limits_kept

    rows = [row for row in explanation.rows if place is None or place in (row.place, row.place.partition("#")[0])]
    if not rows:
        return None
    data = explanation.to_json()
    wanted = {row.place for row in rows}
    many = any(row.phase for row in explanation.rows)
    every = data["rows"]
    assert isinstance(every, list)
    data["rows"] = [row for row in every if row["place"] in wanted]
    if place is None:
        told = [(str(row.phase), _steps(row), name, row.chosen or "not offered", row.why) for name, row in _alike(rows)]
        columns = ("phase", "steps", "place", "chosen", "why")
        first = 0 if many else 2
        listed = table(columns[first:], [row[first:] for row in told])
        kept = limits_kept(explanation.notes)
        limits = [f"limits     {kept}; no other choice within them has a smaller sum of errors"] if kept else []
        return data, [listed, *limits, *_arithmetic(explanation.in_float)]
    lines: list[str | Table] = []
    for row in rows:
        lines += [*([f"phase {row.phase}, steps {_steps(row)}"] if many else []), *_options(row)]
    return data, lines


def _alike(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Places with their rows; neighbouring heads of which the same is to be said as one, ``blocks.3.y#0 to #7``."""

    def said(row: Row) -> tuple[object, ...]:
        site, of_heads, _ = row.place.partition("#")
        return (site, row.phase, row.chosen, row.why) if of_heads else (row.place, row.phase, row.run)

    for _, group in groupby(rows, said):
        alike = list(group)
        last = alike[-1].place.rpartition("#")[2]
        yield alike[0].place + (f" to #{last}" if len(alike) > 1 else ""), alike[0]


def _steps(row: Row) -> str:
    first, last = row.steps
    return f"{first} to {'the last' if last is None else last}"


def _options(row: Row) -> Lines:
    """A place with all its options; those of a head of attention have no weights, and change no bytes."""
    from intarsia.search.explain_heads import abridged

    of_weights = "#" not in row.place
    of_bits = any(option.bops is not None for option in row.options)
    options = [
        (
            f"{abridged(option.option)}{' *' if option.option == row.chosen else ''}",
            "not measured" if option.error is None else f"{option.error:.3g}",
            *([_interval(option.interval)] if of_bits else []),
            *([f"{option.bytes:+,}"] if of_weights else []),
            f"{1e6 * option.seconds:+.3g} us",
            *([f"{amount(option.bops or 0.0).strip()}"] if of_bits else []),
        )
        for option in row.options
    ]
    columns = (
        "option (* chosen)",
        "error",
        *(["95 % interval"] if of_bits else []),
        *(["bytes"] if of_weights else []),
        "seconds",
        *(["bit operations"] if of_bits else []),
    )
    listed = table(columns, options, right=len(columns) - 1)
    return [row.place, listed, row.why] if options else [f"{row.place}: {row.why}"]


def _interval(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:.2g} to {ends[1]:.2g}" if ends else "-"


def bundled(bundle: Bundle) -> tuple[dict[str, object], Lines]:
    """What a bundle holds and claims."""
    from intarsia.passes.integer_only import left_in_float

    manifest, predicted, measured = bundle.manifest, bundle.manifest["predicted"], bundle.measurements
    target = manifest["target"]["name"]
    in_float = left_in_float(variant.graph for variant in bundle.variants)
    facts: dict[str, object] = {
        "output": str(bundle.folder),
        "backends": list(bundle.engines),
        "target": target,
        "complete": not cut_short(bundle),
        "fingerprints": manifest["fingerprints"],
        "engine_bytes": bundle.engine_bytes,
        "engines": manifest["engines"],
        "predicted": predicted,
        "quality": manifest["quality"],
        "measured": measured,
        **({} if in_float is None else {"in_float": list(in_float)}),
        "report": str(bundle.folder / "report.html"),
        **({"phases": [one.to_json() for one in bundle.phases]} if bundle.phases else {}),
    }
    made = f"{'engine' if len(bundle.engines) == 1 else 'engines'} of {', '.join(bundle.engines)}"
    lines = [f"{bundle.folder}: {bundle.graph.name} for {target}, {made}, {size(bundle.engine_bytes)}"]
    for name in bundle.engines:
        claims = manifest["engines"][name]
        checks = "; ".join(one["check"] for one in claims_by_part(claims).values())
        lines.append(f"engine     {name}: {checks}; the stored answer is {claims['sample']}")
    if "baseline_bytes" in predicted:
        before, after = predicted["baseline_bytes"], predicted["bytes"]
        change = f"{size(before)}, as before" if before == after else f"{size(before)} to {size(after)}"
        told = f"; {predicted['four_bits']}" if "four_bits" in predicted else ""
        lines.append(f"weights    {change}" + ("" if before == after else f", {growth(before, after)}") + told)
        lines.append(f"predicted  {_faster(predicted['baseline_seconds'], predicted['seconds'])} on {target}")
    if "engine" in measured and "eager" in measured:
        timing = _faster(measured["eager"]["seconds"], measured["engine"]["seconds"])
        lines.append(f"measured   {timing} on {measured['engine']['device']}")
    lines += _phases(predicted, "predicted") + _segments(predicted, "predicted")
    lines += _phases(measured.get("engine", {}), "measured") + _segments(measured.get("engine", {}), "measured")
    quality = manifest["quality"]
    lines += _metrics(quality.get("metrics", {}), _bounds(str(quality.get("goal") or "")))
    return facts, [*lines, *_arithmetic(in_float), f"report     {facts['report']}"]


def cut_short(bundle: Bundle) -> bool:
    """Whether the search behind the bundle ran out of time."""
    return bundle.plan is not None and bundle.plan.notes.get("complete") is False


def verified(report: VerifyReport) -> Lines:
    """The checks of a bundle, one a line."""
    rows = [(check.status, check.name, check.detail) for check in report.checks]
    return [report.folder, table(("", "check", "found"), rows)]


def pairs(facts: Mapping[str, object], *, indent: str = "") -> list[str]:
    """Keys and values for a person, nested ones indented."""
    lines: list[str] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *pairs(value, indent=indent + "  ")]
        elif isinstance(value, list | tuple):
            lines.append(f"{indent}{key}: {', '.join(map(str, value)) or 'none'}")
        elif isinstance(value, float):
            lines.append(f"{indent}{key}: {value:.4g}")
        else:
            lines.append(f"{indent}{key}: {value}")
    return lines


def timed(facts: Mapping[str, Any]) -> Lines:
    """What the clock said of an engine."""
    spread = f"quartiles {duration(facts['low'])} to {duration(facts['high'])}"
    return [
        f"{facts['what']}: {duration(facts['seconds'])} a call, {spread}, {facts['repeats']} calls; {facts['device']}",
        f"engine     {facts['why']}",
        *_phases(facts, "measured"),
        *_segments(facts, "measured"),
    ]


_LISTED_PHASES = 12


def _phases(facts: Mapping[str, Any], how: str) -> list[str]:
    """Seconds of each phase and of the loop, a line each; nothing where there are no phases."""
    each = facts.get("phases", ())
    lines = [
        f"phase {number}    steps {one['first']} to {one['last']}: {duration(one['seconds'])} a call, {how}"
        for number, one in enumerate(each)
    ]
    if len(each) > _LISTED_PHASES:  # steps that compute other tokens in turns
        kinds: dict[float, int] = {}
        for one in each:
            kinds[one["seconds"]] = kinds.get(one["seconds"], 0) + one["last"] - one["first"] + 1
        lines = [f"steps      {count}: {duration(seconds)} a call, {how}" for seconds, count in kinds.items()]
    return [*lines, f"loop       {duration(facts['loop_seconds'])}, {how}"] if each else []


def _segments(facts: Mapping[str, Any], how: str) -> list[str]:
    """Seconds of each segment of a step, a line each; nothing where a step is of one piece."""
    return [
        f"segment {number}  {duration(one['seconds'])} a call{_once(one)}, {how}"
        for number, one in enumerate(facts.get("segments", ()))
    ]


def _once(segment: Mapping[str, Any]) -> str:
    return ", once for each prompt" if segment["once"] else ""


def _arithmetic(in_float: Sequence[str] | None) -> list[str]:
    """Whether a network computes with integers alone, and what it leaves in float; nothing for a network in float."""
    if in_float is None:
        return []
    if not in_float:
        return ["integers   only, from where inputs are rounded to where outputs get their scale"]
    count = f"{len(in_float)} operator{'s' * (len(in_float) > 1)}"
    return [f"integers   not only, {count} left in float", *(f"           {line}" for line in in_float)]


def _faster(before: float, after: float) -> str:
    return f"{duration(before)} to {duration(after)} a call, {speed(before, after)}"


def _metrics(metrics: Mapping[str, Any], bounds: Mapping[str, float]) -> list[str]:
    lines: list[str] = []
    for name in (name for name in (*METRICS, *(metrics.keys() - METRICS.keys())) if name in metrics):
        metric = metrics[name]
        text = f"{METRICS.get(name, name)}: {figure(name, metric['mean'])}"
        if metric["low"] is not None:
            text += f" (95 % interval {figure(name, metric['low'])} to {figure(name, metric['high'])})"
        text += f", worst {figure(name, metric['worst'])}"
        text += "" if metric["floor"] is None else f", floor {figure(name, metric['floor'])}"
        text += f", asked {figure(name, bounds[name])}" if name in bounds else ""
        lines.append(f"quality    {text}")
    return lines


def _bounds(goal: str) -> dict[str, float]:
    return {name: float(bound) for name, _, bound in (term.partition(">=") for term in goal.split(",") if term)}
