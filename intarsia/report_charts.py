"""A report's charts: quality on an axis, quantities as bars, plans over their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.ir.plan import Plan
from intarsia.report_facts import METRICS, Facts, figure, timing
from intarsia.units import duration, size


@dataclass(frozen=True)
class MetricRow:
    """A quality metric as text, and its marks on an axis, in percent of its length."""

    name: str
    summary: str
    mean_text: str
    interval_text: str
    worst_text: str
    floor_text: str
    goal_text: str
    mean: float
    low: float | None
    high: float | None
    floor: float | None
    goal: float | None
    dots: tuple[float, ...]


@dataclass(frozen=True)
class Bar:
    """A quantity beside others of its group; ``kind`` is ``before`` or ``after``."""

    label: str
    text: str
    percent: float
    kind: str


@dataclass(frozen=True)
class BarGroup:
    """Bars of one scale."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Tick:
    """A number on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A plan that was measured."""

    x: float
    y: float
    met: bool
    chosen: bool
    text: str


@dataclass(frozen=True)
class Trail:
    """The plans that were measured end to end, over their size or what they compute."""

    note: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    goal: float | None
    dots: tuple[Dot, ...]


def metric_row(name: str, values: Mapping[str, Any], goal: float | None) -> MetricRow:
    """A metric with its marks between the floor or the worst sample on the left and the best on the right."""
    numbers = [float(value) for value in values.get("samples", ())] + [float(values["mean"])]
    edges = [
        *numbers,
        *(float(values[key]) for key in ("low", "high", "floor", "worst") if values.get(key) is not None),
    ]
    edges += [goal] if goal is not None else []
    least, most = min(edges), max(edges)
    span = (most - least) or 1.0

    def at(value: float | None) -> float | None:
        return None if value is None else round(2 + 94 * (float(value) - least) / span, 2)

    floor, mean = at(values.get("floor")), at(values["mean"])
    assert mean is not None
    low, high = values.get("low"), values.get("high")
    interval = "one sample" if low is None or high is None else f"{figure(name, low)} to {figure(name, high)}"
    return MetricRow(
        name=METRICS.get(name, name),
        summary=f"{figure(name, values['mean'])} ({interval})",
        mean_text=figure(name, values["mean"]),
        interval_text=interval,
        worst_text=figure(name, values["worst"]),
        floor_text="-" if values.get("floor") is None else figure(name, values["floor"]),
        goal_text="-" if goal is None else figure(name, goal),
        mean=mean,
        low=at(low),
        high=at(high),
        floor=floor,
        goal=at(goal),
        dots=tuple(mark for mark in map(at, values.get("samples", ())) if mark is not None),
    )


def bars(facts: Facts) -> tuple[BarGroup, ...]:
    """Seconds of a call and bytes, of the unchanged model and of the engine, as far as they are known."""
    predicted, model = facts.predicted, "unchanged model"
    seconds = [(f"{model}, predicted", predicted.get("baseline_seconds"), "before")]
    seconds += [("engine, predicted", predicted.get("seconds"), "after")]
    for name, label, kind in (("eager", f"{model}, measured", "before"), ("engine", "engine, measured", "after")):
        found = timing(facts.measured, name)
        seconds.append((label, found["seconds"] if found else None, kind))
    weights = [(f"{model}, weights", predicted.get("baseline_bytes"), "before")]
    weights += [("engine, weights predicted", predicted.get("bytes"), "after")]
    weights += [("engine, files", float(facts.engine_bytes) or None, "after")]
    groups = (_group("Seconds a call", seconds, duration), _group("Bytes", weights, size))
    return tuple(group for group in groups if group.bars)


def _group(title: str, quantities: Sequence[tuple[str, float | None, str]], word: Callable[[float], str]) -> BarGroup:
    known = [(label, value, kind) for label, value, kind in quantities if value]
    most = max((value for _, value, _ in known), default=1.0)
    return BarGroup(
        title, tuple(Bar(label, word(value), round(100 * value / most, 1), kind) for label, value, kind in known)
    )


def bars_note(facts: Facts) -> str:
    """How the seconds were predicted, and on what they were measured."""
    target = facts.manifest["target"]["name"]
    engine = timing(facts.measured, "engine")
    note = f"Predicted from first principles for {target}: every call alone, nothing fused."
    note += " A call is the mean of the loop's calls." if facts.phases else ""
    if engine is None:
        return f"{note} Nothing was measured."
    quartiles = f"{duration(engine['low'])} to {duration(engine['high'])}"
    return f"{note} Measured on {engine['device']}: median of {engine['repeats']} calls, quartiles {quartiles}."


def trail(plan: Plan, goal: Mapping[str, float]) -> Trail | None:
    """The plans that the search measured, by the first metric that was asked for, over what they differ in.

    That is the share of pairs that attention computes where the search noted it, else bytes, else seconds.
    """
    found = plan.notes.get("tried")
    tried = [item for item in found if item.get("quality") and item.get("bytes")] if isinstance(found, list) else []
    if len(tried) < 2:
        return None
    metric = next(iter(goal), next(iter(tried[0]["quality"])))
    key, label, word = _abscissa(tried)
    points = [(float(item[key]), float(item["quality"][metric]), item["margin"] >= 0) for item in tried]
    good = [index for index, (_, _, met) in enumerate(points) if met]
    largest = max(good, key=lambda index: float(tried[index]["error"]), default=-1)
    chosen = next((index for index in good if tried[index]["quality"] == plan.notes.get("quality")), largest)
    bound = goal.get(metric)
    x_low, x_high = _range(x for x, _, _ in points)
    y_low, y_high = _range([*(y for _, y, _ in points), *([bound] if bound is not None else [])])

    def across(x: float) -> float:
        return round(56 + 644 * (x - x_low) / (x_high - x_low), 1)

    def down(y: float) -> float:
        return round(216 - 200 * (y - y_low) / (y_high - y_low), 1)

    name = METRICS.get(metric, metric)
    return Trail(
        note=f"{len(points)} plans, each run whole on validation noise. {'' if bound is None else _MET}"
        "The large dot was chosen.",
        x_label=label,
        y_label=name,
        x_ticks=tuple(Tick(across(x), word(x)) for x in _ticks(x_low, x_high)),
        y_ticks=tuple(Tick(down(y), f"{y:.3g}") for y in _ticks(y_low, y_high)),
        goal=None if bound is None else down(bound),
        dots=tuple(
            Dot(across(x), down(y), met, index == chosen, f"{word(x)}, {figure(metric, y)}")
            for index, (x, y, met) in enumerate(points)
        ),
    )


_MET = "A plan meets the goal (darker dot) when the mean less one standard error does. "


def _abscissa(tried: Sequence[Mapping[str, Any]]) -> tuple[str, str, Callable[[float], str]]:
    """What measured plans are drawn over: its key in the notes, what it is called, and how it is written."""
    if all("density" in item for item in tried):
        return "density", "share of pairs that attention computes", "{:.1%}".format
    if len({item["bytes"] for item in tried}) > 1:
        return "bytes", "bytes of weights", size
    return "seconds", "seconds a call, predicted", duration


def _range(numbers: Iterable[float]) -> tuple[float, float]:
    """Least and greatest with a twelfth of their distance around them."""
    values = list(numbers)
    least, most = min(values), max(values)
    around = (most - least) / 12 or abs(most) / 12 or 1.0
    return least - around, most + around


def _ticks(low: float, high: float) -> tuple[float, ...]:
    return tuple(low + (high - low) * (index + 0.5) / 4 for index in range(4))
