"""One self-contained HTML page about a bundle: what was decided where, what was predicted, measured and lost."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from intarsia.backends.manifest import SEGMENTS, claims_by_part
from intarsia.backends.writing import new_file
from intarsia.report_bits import BitsSection, bits_section
from intarsia.report_charts import BarGroup, MetricRow, Trail, bars, bars_note, metric_row, trail
from intarsia.report_facts import METRICS, Facts, figure, read_facts, timing
from intarsia.report_heads import HeadsSection, heads_section
from intarsia.report_map import Map, maps
from intarsia.units import duration, growth, size, speed


def write_report(folder: Path, output: Path) -> Path:
    """Write the page about the bundle in ``folder`` to ``output``, whole or not at all; the path written.

    Raises:
        UsageError: The folder is no bundle.
    """
    text = render(folder)
    with new_file(output) as partial:
        partial.write_text(text)
    return output


def render(folder: Path) -> str:
    """The page about the bundle in ``folder``, made from the bundle's files alone; UsageError if it is none."""
    from jinja2 import Environment, StrictUndefined

    template = files("intarsia").joinpath("report.html.jinja").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(page=page_of(folder))


@dataclass(frozen=True)
class Card:
    """One figure at the head of the page; the mood is ``good``, ``bad`` or empty."""

    label: str
    value: str
    detail: str
    mood: str = ""


@dataclass(frozen=True)
class File:
    """A file of the bundle."""

    name: str
    bytes: str
    sha256: str


@dataclass(frozen=True)
class Picture:
    """A picture with its heading, what it shows (for those who cannot see it), a caption, and itself as a URI."""

    title: str
    alternative: str
    caption: str
    uri: str


PICTURES = {
    "frames.png": (
        "Frames",
        "Frames of the reference's videos and of the engine's, from the same noise",
        "Left what the unchanged model makes, right what the engine makes of the same noise and prompt.",
    ),
    "steps.png": (
        "Steps of tokens",
        "How many steps each token got, over a video, and which share of each frame's tokens each step computed",
        "Of the last held-out video. Bright tokens got many steps; the chart tells which steps they were.",
    ),
    "steps.gif": (
        "Step by step",
        "The video, step by step; tokens that a step did not compute are veiled",
        "The same video: at each step, tokens under a veil were not computed.",
    ),
}
"""Heading, alternative and caption of a bundle's pictures, by file."""


@dataclass(frozen=True)
class PhaseRow:
    """A phase of the denoising loop: its steps, whose program it runs, and what a call of it takes."""

    steps: str
    program: str
    predicted: str
    measured: str


@dataclass(frozen=True)
class SegmentRow:
    """A segment of a step: when it runs, and what a call of it takes."""

    runs: str
    predicted: str
    measured: str


@dataclass(frozen=True)
class Page:
    """Everything the template prints."""

    title: str
    verdict: str
    cards: tuple[Card, ...]
    pictures: tuple[Picture, ...]
    measured_on: str
    metrics: tuple[MetricRow, ...]
    bars: tuple[BarGroup, ...]
    bars_note: str
    phases: tuple[PhaseRow, ...]
    segments: tuple[SegmentRow, ...]
    loop: str
    maps: tuple[Map, ...]
    heads: HeadsSection | None
    bits: BitsSection | None
    trail: Trail | None
    command: str
    identity: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    configuration: tuple[tuple[str, str], ...]
    files: tuple[File, ...]


def page_of(folder: Path) -> Page:
    """What the page about the bundle in ``folder`` says."""
    facts = read_facts(folder)
    manifest = facts.manifest
    model = facts.config.get("model") or facts.folder.resolve().name
    target = manifest["target"]
    return Page(
        title=f"{model} for {target['name']}",
        verdict=_verdict(facts),
        cards=_cards(facts),
        pictures=tuple(Picture(*PICTURES[name], _data_uri(name, data)) for name, data in facts.pictures.items()),
        measured_on=facts.measured_on,
        metrics=tuple(metric_row(name, values, facts.goal.get(name)) for name, values in facts.quality.items()),
        bars=bars(facts),
        bars_note=bars_note(facts),
        phases=_phases(facts),
        segments=_segments(facts),
        loop=_loop(facts),
        maps=maps(facts.plan) if facts.plan else (),
        heads=heads_section(facts.folder, facts.plan),
        bits=bits_section(facts.plan),
        trail=trail(facts.plan, facts.goal) if facts.plan else None,
        command=str(manifest["command"]),
        identity=(
            ("target", f"{target['name']}: {target['summary']}"),
            *(
                (f"engine of {name}", f"{one['backend']}: {_check(one)}; the stored answer is {one['sample']}")
                for name, one in manifest["engines"].items()
            ),
            *(("left in float", line) for line in facts.in_float or ()),
            *((name, str(text)) for name, text in manifest.get("fingerprints", {}).items() if text),
            *(
                (f"{backend}{f', {part}' if part else ''}: {name}", _as_text(value))
                for backend, claims in manifest["engines"].items()
                for part, one in claims_by_part(claims).items()
                for name, value in {**({"check": one["check"]} if part else {}), **one["info"]}.items()
            ),
        ),
        versions=tuple((name, str(text)) for name, text in manifest.get("versions", {}).items()),
        configuration=tuple((name, _as_text(value)) for name, value in facts.config.items()),
        files=tuple(
            File(name, f"{entry['bytes']:,}", str(entry["sha256"])) for name, entry in sorted(manifest["files"].items())
        ),
    )


def _check(claims: Mapping[str, Any]) -> str:
    """What was proven of an engine, or of those of its segments, without running them."""
    return claims.get("check") or f"{len(claims[SEGMENTS])} segments, one after the other"


def _phases(facts: Facts) -> tuple[PhaseRow, ...]:
    predicted, measured = facts.predicted.get("phases"), facts.measured.get("engine", {}).get("phases")

    def call(figures: Sequence[Mapping[str, float]] | None, number: int) -> str:
        return duration(figures[number]["seconds"]) if figures else "-"

    return tuple(
        PhaseRow(
            f"{one.first} to {one.last}",
            "its own" if one.program == number else f"that of phase {one.program}",
            call(predicted, number),
            call(measured, number),
        )
        for number, one in enumerate(facts.phases)
    )


def _segments(facts: Facts) -> tuple[SegmentRow, ...]:
    predicted, measured = facts.predicted.get("segments", ()), facts.measured.get("engine", {}).get("segments")
    return tuple(
        SegmentRow(
            "once for each prompt" if one["once"] else "at steps",
            duration(one["seconds"]),
            duration(measured[number]["seconds"]) if measured else "-",
        )
        for number, one in enumerate(predicted)
    )


def _loop(facts: Facts) -> str:
    """Seconds of all steps together, predicted and measured, as far as they are known."""
    known = {
        "predicted": facts.predicted.get("loop_seconds"),
        "measured": facts.measured.get("engine", {}).get("loop_seconds"),
    }
    return ", ".join(f"{duration(seconds)} {how}" for how, seconds in known.items() if seconds)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _data_uri(name: str, data: bytes) -> str:
    return f"data:image/{Path(name).suffix[1:]};base64,{base64.b64encode(data).decode()}"


def _verdict(facts: Facts) -> str:
    """One sentence: what was gained and what it cost."""
    before, after = facts.predicted.get("baseline_bytes"), facts.predicted.get("bytes")
    slow, fast = facts.predicted.get("baseline_seconds"), facts.predicted.get("seconds")
    gains: list[str] = []
    if before and after and before != after:
        gains.append(f"its weights are {growth(before, after)}")
    if slow and fast and slow != fast:
        gains.append(f"it is predicted to run {speed(slow, fast)}")
    text = f"An engine for {facts.backends}"
    text += f": {' and '.join(gains)}." if gains else ", of the model as it is."
    if facts.not_run:
        text += f" Built and checked, not run where it was made: {', '.join(facts.not_run)}."
    if facts.quality:
        name = next(iter(facts.goal), next(iter(facts.quality)))
        values = facts.quality[name]
        subject = "it stays" if not facts.on_reference else "its reference, run in its place, stays"
        text += f" On {facts.measured_on} {subject} at {figure(name, values['mean'])} {METRICS.get(name, name)}"
        bound = facts.goal.get(name)
        text += f", where {figure(name, bound)} was asked." if bound is not None else "."
    return text


def _arithmetic(in_float: Sequence[str]) -> Card:
    if not in_float:
        return Card("Arithmetic", "integers only", "from where inputs are rounded to where outputs get their scale")
    count = f"{len(in_float)} operator{'s' * (len(in_float) > 1)} in float"
    return Card("Arithmetic", count, "all else in integers; listed below")


def _cards(facts: Facts) -> tuple[Card, ...]:
    cards: list[Card] = [_arithmetic(facts.in_float)] if facts.in_float is not None else []
    predicted = facts.predicted
    if predicted.get("baseline_bytes") and predicted.get("bytes"):
        before, after = predicted["baseline_bytes"], predicted["bytes"]
        change = "as before" if before == after else growth(before, after)
        cards.append(Card("Weights", change, f"{size(before)} to {size(after)}"))
    cards.append(Card("Engine on disk", size(facts.engine_bytes), f"the files of {facts.backends}"))
    if predicted.get("baseline_seconds") and predicted.get("seconds"):
        before, after = predicted["baseline_seconds"], predicted["seconds"]
        detail = f"{duration(before)} to {duration(after)} a call on {facts.manifest['target']['name']}"
        cards.append(Card("Predicted time", speed(before, after), detail))
    if engine := timing(facts.measured, "engine"):
        reference = timing(facts.measured, "eager")
        value = speed(reference["seconds"], engine["seconds"]) if reference else duration(engine["seconds"])
        before_text = f"{duration(reference['seconds'])} to " if reference else ""
        cards.append(
            Card("Measured time", value, f"{before_text}{duration(engine['seconds'])}; {engine.get('device', '')}")
        )
    for name, values in facts.quality.items():
        bound = facts.goal.get(name)
        met = None if bound is None else values["mean"] >= bound
        asked = "" if bound is None else f"asked {figure(name, bound)}; "
        floor = "" if values.get("floor") is None else f"floor {figure(name, values['floor'])}"
        mood = {True: "good", False: "bad", None: ""}[met]
        cards.append(Card(METRICS.get(name, name), figure(name, values["mean"]), asked + floor, mood))
    return tuple(cards)
