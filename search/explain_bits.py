"""Why a layer has its bits, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from intarsia.ir.plan import Plan
from intarsia.search.bit_layers import shown
from intarsia.search.weighed import Weighed, share

Key = tuple[int, str]
"""A pass's number, and a place of it."""


def bit_entries(plan: Plan, phase: int) -> dict[Key, Mapping[str, Any]]:
    """What a search over bits noted of each layer in a phase; empty for a plan that no such search made."""
    if not str(plan.notes.get("strategy", "")).startswith("bits"):
        return {}
    first = plan.phases[phase].first
    entries = cast("Sequence[Mapping[str, Any]]", plan.notes.get("places", ()))
    return {
        (int(entry["step"]), str(entry["place"])): entry for entry in entries if entry.get("steps", [first])[0] == first
    }


def why_bits(entry: Mapping[str, Any], options: Sequence[Weighed], chosen: str, notes: Mapping[str, Any]) -> str:
    """One clause: what the choice saves and costs, what the next one on either side would, and what decides for it."""
    if "fixed" in entry:
        return f"eight bits: {entry['fixed']}"
    (taken,) = (option for option in options if option.option == chosen)
    in_order = sorted(options, key=lambda option: option.bops or 0.0)
    place = in_order.index(taken)
    total = notes.get("error")
    told = [f"costs {_error(taken, total)}" if taken.error else "as in float"]
    if place:
        fewer = in_order[place - 1]
        saved = f"save {_operations(taken, fewer)} and {taken.bytes - fewer.bytes:,} bytes"
        told.append(f"{fewer.option} would {saved}, and cost {_error(fewer, total)}")
    elif len(in_order) > 1:
        more = in_order[1]
        told.append(f"saves {_operations(more, taken)} and {more.bytes - taken.bytes:,} bytes against {more.option}")
    if entry.get("tied"):
        told.append(f"tied to {', '.join(entry['tied'])}, which read the same value")
    return "; ".join(told)


def limits_kept(notes: Mapping[str, Any]) -> str:
    """What the whole plan takes of what was limited: ``bops 1.59 G of 1.64 G``; empty where nothing was."""
    limits, used = notes.get("limits", {}), notes.get("used", {})
    return ", ".join(f"{name} {short(used[name], name)} of {short(limit, name)}" for name, limit in limits.items())


def short(value: float, measure: str) -> str:
    """A measure to three digits: ``1.59 G``."""
    return shown(float(f"{value:.3g}"), measure)


def _error(option: Weighed, total: object) -> str:
    """``0.0031 (0.0014 to 0.0048), 32% of the plan's error``."""
    spread = f" ({option.interval[0]:.2g} to {option.interval[1]:.2g})" if option.interval else ""
    part = share(option.error, total if isinstance(total, float) else None).removeprefix(" at")
    return f"{option.error or 0.0:.2g}{spread},{part}" if total else f"{option.error or 0.0:.2g}{spread}"


def _operations(more: Weighed, fewer: Weighed) -> str:
    return f"{short((more.bops or 0.0) - (fewer.bops or 0.0), 'bops')} bit operations"
