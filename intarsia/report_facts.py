"""The files of a bundle, read for a report: no engine, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.backends.manifest import OWN
from intarsia.backends.phases import StepRange
from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan

METRICS = {"psnr": "PSNR", "ssim": "SSIM", "motion_psnr": "motion PSNR"}
"""What people call the metrics."""

_UNITS = {"psnr": " dB", "motion_psnr": " dB"}


@dataclass(frozen=True)
class Facts:
    """The bundle's files, read."""

    folder: Path
    manifest: Mapping[str, Any]
    plan: Plan | None
    measured: Mapping[str, Any]
    config: Mapping[str, Any]
    pictures: Mapping[str, bytes]

    @property
    def quality(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures by metric, in the order in which people read them."""
        metrics: Mapping[str, Mapping[str, Any]] = self.manifest.get("quality", {}).get("metrics", {})
        return {name: metrics[name] for name in (*METRICS, *metrics) if name in metrics}

    @property
    def measured_on(self) -> str:
        """What the quality was measured on."""
        kind = self.manifest.get("quality", {}).get("workload", {}).get("kind")
        return "random inputs" if kind == "outputs on random inputs" else "held-out noise"

    @property
    def goal(self) -> Mapping[str, float]:
        """What was asked, by metric; empty where nothing was."""
        text = str(self.manifest.get("quality", {}).get("goal") or "")
        return {name: float(bound) for name, _, bound in (term.partition(">=") for term in text.split(",") if term)}

    @property
    def predicted(self) -> Mapping[str, Any]:
        """Seconds and bytes as the cost model says, for the engine and for the unchanged model."""
        found: Mapping[str, Any] = self.manifest.get("predicted", {})
        return found

    @property
    def in_float(self) -> tuple[str, ...] | None:
        """What an integer network leaves in float, as its graphs say; None where no graph has integers."""
        from intarsia.backends.variant import GRAPH
        from intarsia.passes.integer_only import INTO, left_in_float

        graphs = (Path(name) for name in self.manifest["files"] if Path(name).name == GRAPH)
        wholes = (name for name in graphs if not name.parent.name.startswith("segment-"))
        texts = ((self.folder / name).read_text() for name in wholes)
        return left_in_float(Graph.parse(text) for text in texts if INTO in text)

    @property
    def phases(self) -> tuple[StepRange, ...]:
        """The loop's phases; none where one program runs at every step."""
        return tuple(StepRange.from_json(one) for one in self.manifest.get("phases", ()))

    @property
    def engine_bytes(self) -> int:
        """Size of the engines' files."""
        return sum(entry["bytes"] for name, entry in self.manifest["files"].items() if name.startswith("engine/"))

    @property
    def not_run(self) -> tuple[str, ...]:
        """Backends whose engines did not run where the bundle was made."""
        return tuple(name for name, one in self.manifest["engines"].items() if one["sample"] != OWN)

    @property
    def on_reference(self) -> bool:
        """Whether the quality is that of an engine's reference, since no engine ran where the bundle was made."""
        return bool(self.manifest.get("quality", {}).get("engine", {}).get("on_reference"))

    @property
    def backends(self) -> str:
        """Names of the backends whose engines are here."""
        return ", ".join(self.manifest["engines"])


def read_facts(folder: Path) -> Facts:
    """The files of the bundle in ``folder``; UsageError if it is no bundle or one of them is no JSON."""
    manifest = _object(folder, "manifest.json")
    if not {"engines", "target", "files", "command"} <= manifest.keys():
        raise UsageError(f"{folder} is no bundle: manifest.json lacks what export writes")
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").is_file() else None
    measurements = _object(folder, "measurements.json") if (folder / "measurements.json").is_file() else {}
    config = _object(folder, "config.json") if (folder / "config.json").is_file() else {}
    names = ("frames.png", "steps.png", "steps.gif")
    pictures = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return Facts(folder, manifest, plan, measurements.get("measured", {}), config, pictures)


def _object(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        data = json.loads((folder / name).read_text())
    except OSError as error:
        raise UsageError(f"{folder} is no bundle: {name}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{folder / name}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{folder / name}: expected keys and values, found {data!r}")
    return data


def timing(measured: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What the clock said of ``engine`` or ``eager``; None if it was not asked."""
    found = measured.get(name)
    return found if isinstance(found, Mapping) and found.get("seconds") else None


def figure(metric: str, value: float) -> str:
    """A value of a metric with its unit."""
    return f"{value:.4f}" if metric == "ssim" else f"{value:.2f}{_UNITS.get(metric, '')}"
